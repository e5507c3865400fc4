"""Tiny transformers models, exported, loaded again, and compared with the scheme's own values."""

import os
from pathlib import Path

import pytest
import torch

from aotrain.export.selection import reason_to_skip
from aotrain.quantization import get_scheme
from aotrain.quantization.fused_groups import fused_groups, shared_global_scale
from aotrain.quantization.schemes import Nvfp4Scheme

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs the [hf] extra: pip install -e '.[hf]'")

TOKENS = torch.arange(16)[None] * 7 % 64


def save_llama(folder: Path) -> Path:
    """Two blocks, bfloat16, in several shards."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="400KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def save_mixture(folder: Path) -> Path:
    """One block with four experts, tied embeddings, bfloat16."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
    )
    transformers.Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def served_model(source: Path, scheme_name: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a checkpoint with the values of a scheme in place of its weights: what training saw."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    scheme = get_scheme(scheme_name, scale_dtype=dtype).weight
    weights = {}
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            for expert, stacked in enumerate(parameter.data):
                halves = zip(("gate_proj", "up_proj"), stacked.chunk(2), strict=True)
                weights |= {f"{name.removesuffix('.gate_up_proj')}.{expert}.{leaf}": half for leaf, half in halves}
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix(".down_proj")
            weights |= {f"{stem}.{expert}.down_proj": weight for expert, weight in enumerate(parameter.data)}
        elif reason_to_skip(name, parameter.shape, ("lm_head",)) is None:
            weights[name] = parameter.data
    for group in fused_groups(weights):
        shared = None
        if isinstance(scheme, Nvfp4Scheme):
            shared = shared_global_scale(weights[name].abs().amax() for name in group)
        for name in group:
            weights[name].copy_(scheme.decode(scheme.encode(weights[name], global_scale=shared), dtype))
    return model


def assert_same_weights(loaded: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Every parameter, bit for bit; quantized tensor classes are dequantized first."""
    found = dict(loaded.named_parameters())
    for name, parameter in expected.named_parameters():
        weight = found[name].detach()
        if type(weight) is not torch.Tensor and hasattr(weight, "dequantize"):
            weight = weight.dequantize()
        assert weight.dtype == parameter.dtype, name
        assert torch.equal(weight, parameter), name


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits
