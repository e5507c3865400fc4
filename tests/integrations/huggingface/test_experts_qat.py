"""QAT of transformers' experts: values in training are those of the matrices in the checkpoint, bit for bit."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from aotrain.qat.experts import prepare_moe_qat
from aotrain.quantization import get_scheme
from aotrain.testing import assert_bitwise_equal
from tests.integrations.huggingface.test_experts import COMMON, train_once

SIZES = COMMON | {"hidden_size": 64, "num_hidden_layers": 1, "head_dim": 32}


def qwen3_moe(dtype: torch.dtype, intermediate: int = 96) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=intermediate, num_experts=4)
    return Qwen3MoeForCausalLM(config).to(dtype).train()


class Recorder:
    """A scheme that keeps the stacks of values that it gave."""

    def __init__(self, scheme: object) -> None:
        self.scheme, self.given = scheme, []

    def values(self, x: torch.Tensor) -> torch.Tensor:
        self.given.append(self.scheme.values(x))
        return self.given[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int4-g32", "8da4w", "fp8-weight-only", "mxfp4", "q4_0"])
def test_forward_uses_what_the_checkpoint_quantizes_to(name: str, dtype: torch.dtype, tmp_path):
    model = qwen3_moe(dtype)
    plain = train_once(model)
    report = prepare_moe_qat(model, name)
    assert report.converted == ("model.layers.0.mlp.experts",)
    quantizer = model.model.layers[0].mlp.experts.weight_fake_quantizer
    quantizer.scheme = recorder = Recorder(quantizer.scheme)
    with torch.no_grad():
        model(input_ids=torch.arange(16)[None])
    gate_up, down = recorder.given
    quantizer.scheme = recorder.scheme

    model.save_pretrained(tmp_path)
    saved, scheme = load_file(tmp_path / "model.safetensors"), get_scheme(name).weight
    for expert in range(4):
        key = f"model.layers.0.mlp.experts.{expert}."
        gate, up = gate_up[expert].chunk(2)
        for part, seen in {"gate_proj": gate, "up_proj": up, "down_proj": down[expert]}.items():
            assert_bitwise_equal(seen, scheme.values(saved[f"{key}{part}.weight"]), what=part)

    trained = train_once(model)
    assert trained.keys() == plain.keys()
    assert not torch.equal(trained["loss"], plain["loss"])
    assert abs(trained["loss"] - plain["loss"]) < 0.02 * plain["loss"]


def test_gpt_oss_quantizes_along_the_contracted_dimension():
    """Its weights are [E, K, N]."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**(SIZES | {"intermediate_size": 96}), num_local_experts=4)).bfloat16()
    prepare_moe_qat(model, "int4-g32")
    experts = model.model.layers[0].mlp.experts
    experts.weight_fake_quantizer.scheme = recorder = Recorder(experts.weight_fake_quantizer.scheme)
    with torch.no_grad():
        model(input_ids=torch.arange(16)[None])
    scheme = get_scheme("int4-g32").weight
    for seen, weight in zip(recorder.given, (experts.gate_up_proj, experts.down_proj), strict=True):
        for expert in range(4):
            assert_bitwise_equal(seen[expert], scheme.values(weight[expert].t().contiguous()))
    experts.weight_fake_quantizer.scheme = scheme
    assert train_once(model.train())["model.layers.0.mlp.experts.down_proj"].any()


def test_blocks_that_lie_in_gate_and_up_are_refused():
    model = qwen3_moe(torch.bfloat16)
    with pytest.raises(ValueError, match="gate and up are saved apart, and blocks of 128 rows"):
        prepare_moe_qat(model, "fp8-block")
    prepare_moe_qat(qwen3_moe(torch.bfloat16, intermediate=128), "fp8-block")
