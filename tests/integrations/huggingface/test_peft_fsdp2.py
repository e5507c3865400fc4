"""LoRA and QAT through peft under FSDP2 on gloo: the adapters of one process, bit for bit, and the merged weight."""

from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="needs the [hf] extra: pip install -e '.[hf]'")

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from aotrain.integrations.huggingface.peft import QATLoraLinear, qat_lora_config
from aotrain.optim import AdamW8bit
from aotrain.qat import prepare_qat, share_global_scales
from aotrain.testing import assert_bitwise_equal
from tests.distributed.ranks import run_ranks
from tests.integrations.huggingface.tiny import tiny_llama, token_rows

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# Who has the scheme: the adapters, or the layers that were prepared before; NVFP4 with the scales of fused groups.
RUNS = ("adapters int4-g32", "layers 8da4w", "adapters nvfp4")


def build(run: str) -> nn.Module:
    owner, scheme = run.split()
    model = tiny_llama()
    if owner == "layers":
        prepare_qat(model, scheme)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(model, qat_lora_config(config, scheme if owner == "adapters" else None))
    if scheme == "nvfp4":
        share_global_scales(model)
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    return list(model.base_model.model.model.layers)


def shard(model: nn.Module, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    for module in (*layers_of(model), model):
        fully_shard(module, mp_policy=policy or MixedPrecisionPolicy())
    return model


def loss_of(model: nn.Module) -> torch.Tensor:
    tokens = torch.stack([row["input_ids"] for row in token_rows(8)])
    return model(input_ids=tokens).logits.float().square().mean()


def train(model: nn.Module) -> dict[str, torch.Tensor]:
    """Losses, last gradients and trained factors."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 14
    optimizer = AdamW8bit(trainable.values(), lr=1e-2)
    results = {}
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        results[f"loss {step}"] = loss.detach()
    for name, parameter in trainable.items():
        for kind, tensor in (("gradient of", parameter.grad), ("trained", parameter.detach())):
            results[f"{kind} {name}"] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return results


def in_bfloat16() -> torch.Tensor:
    """Loss of a model whose weights and factors are gathered in bfloat16."""
    return loss_of(shard(build(RUNS[0]), BFLOAT16)).detach()


def adapters_apart() -> str:
    model = build(RUNS[0])
    for module in model.modules():
        if isinstance(module, QATLoraLinear):
            fully_shard(module.lora_A["default"])
            break
    try:
        loss_of(model)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def on_ranks(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for run in RUNS:
        model = shard(build(run))
        results[run] = train(model)
        gathered = get_model_state_dict(model, options=FULL)
        results[f"{run}, saved"] = get_peft_model_state_dict(model, state_dict=gathered) if rank == 0 else {}
    results["bfloat16"] = in_bfloat16()
    results["apart"] = adapters_apart()
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_ranks, 2)


@pytest.mark.parametrize("run", RUNS)
def test_adapters_are_those_of_one_process(ranks, run: str):
    model = build(run)
    want = train(model)
    for results in ranks:
        assert results[run].keys() == want.keys()
        for key, value in want.items():
            assert_bitwise_equal(results[run][key], value, what=key)
    # What is gathered and saved is merged to the weights of one process.
    loaded = build(run)
    set_peft_model_state_dict(loaded, ranks[0][f"{run}, saved"])
    expected = model.merge_and_unload().state_dict()
    for name, weight in loaded.merge_and_unload().state_dict().items():
        assert_bitwise_equal(weight, expected[name], what=name)


def test_mixed_precision_merges_what_was_gathered(ranks):
    model = build(RUNS[0])
    for parameter in model.parameters():  # and no buffers: FSDP2 leaves frequencies of positions alone
        parameter.data = parameter.data.bfloat16()
    want = loss_of(model).detach()
    for results in ranks:
        assert_bitwise_equal(results["bfloat16"], want)


def test_factors_that_are_sharded_apart_are_explained(ranks):
    for results in ranks:
        assert "fully_shard whole blocks" in results["apart"]
