"""Transformers' MoE models: experts by conversion and by registry, the same bits, and no silent high precision."""

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from aotrain.integrations.huggingface.experts import register_experts
from aotrain.nn import conversion_report, convert_moe_training
from aotrain.nn.experts import expert_scaling
from aotrain.testing import assert_bitwise_equal

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, moe_intermediate_size=24, num_experts=4)),
    # Interleaved gates, [E, K, N] weights, a bias per expert.
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**COMMON, head_dim=16, num_local_experts=4)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **COMMON,
            moe_intermediate_size=24,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            first_k_dense_replace=1,
        )
    ),
}


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).train()


def train_once(model: PreTrainedModel, forward: object = None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    loss = (forward or model)(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_bitwise_equal(got[name].detach(), value.detach(), what=name)


@pytest.mark.parametrize("name", MODELS)
def test_conversion_and_registry_give_the_same_bits(name: str):
    assert "aotrain_float8_rowwise" in register_experts()
    model = build(name)
    plain, keys = train_once(model), list(model.state_dict())
    model.set_experts_implementation("aotrain_float8_rowwise")
    by_registry = train_once(model)
    model.set_experts_implementation("grouped_mm")
    assert_same(train_once(model), plain)
    convert_moe_training(model)
    by_conversion = train_once(model)
    assert_same(by_conversion, by_registry)
    assert list(model.state_dict()) == keys
    changed = [key for key in plain if "experts" in key and not torch.equal(plain[key], by_conversion[key])]
    assert {key.rsplit(".", 1)[-1] for key in changed} >= {"gate_up_proj", "down_proj"}
    assert abs(plain["loss"] - by_conversion["loss"]) < 0.01 * plain["loss"]
    assert all(fqn.endswith("mlp.experts") for fqn in conversion_report(model).converted)


def test_a_loop_over_experts_is_refused_with_the_remedy():
    model = convert_moe_training(build("mixtral"))
    model.set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.experts .*set_experts_implementation\('grouped_mm'\)"):
        train_once(model)
    model.set_experts_implementation("grouped_mm")
    train_once(model)
    # Generation switches to another implementation for single tokens, and trains nothing.
    model.set_experts_implementation("batched_mm")
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))


def test_saves_and_loads_as_the_original(tmp_path):
    model = convert_moe_training(build("qwen3_moe"))
    model.save_pretrained(tmp_path)
    loaded = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    assert all(expert_scaling(module) is None for module in loaded.modules())
    assert_same(dict(loaded.named_parameters()), dict(model.named_parameters()))
    train_once(convert_moe_training(loaded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_compiled_experts_are_intercepted(dtype: torch.dtype):
    """With float32 weights transformers calls an operator of its own when it is compiled."""
    torch.compiler.reset()
    experts = convert_moe_training(build("mixtral", dtype)).model.layers[0].mlp.experts
    x = torch.randn(12, 32, dtype=dtype)
    chosen, weights = torch.randint(4, (12, 2)), torch.rand(12, 2, dtype=dtype)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(x, chosen, weights).detach(), experts(x, chosen, weights).detach())
