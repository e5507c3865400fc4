"""A Hugging Face configuration as a torchtitan model, and a Hugging Face checkpoint's names and rows.

The model is built from the numbers in config.json, not from a size that torchtitan ships. q, k and v are separate
layers, as in the checkpoint: each has the codes that its exported twin will have under every scheme, also where a scale
is of 128 rows or of a whole matrix, which torchtitan's fused layer would mix.

Llama's rotary embedding pairs neighbouring rows of a head in torchtitan, rows half a head apart in transformers, so the
rows of q and k change places on the way in and out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torchtitan.config.override import derive
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import FlexAttention, QKVLinear
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.models.qwen3 import parallelize_qwen3
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec

from aotrain.integrations.torchtitan.attention import DocumentSDPA
from aotrain.integrations.torchtitan.weight_init import NamedInit

HFConfig = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What torchtitan has for a `model_type` of transformers."""

    model: type[Decoder]
    block: type
    rope: type
    parallelize: Any
    adapter: type
    # Values that config.json may not leave; a key that is absent has them. Anything else torchtitan cannot compute.
    fixed: HFConfig
    # transformers' values of keys that config.json does not have.
    defaults: HFConfig
    rope_types: tuple[str, ...]
    qk_norm: bool = False


ARCHITECTURES = {
    "llama": Architecture(
        model=Llama3Model,
        block=Llama3TransformerBlock,
        rope=ComplexRoPE,
        parallelize=parallelize_llama,
        adapter=Llama3StateDictAdapter,
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        rope_types=("default", "llama3"),
    ),
    "qwen3": Architecture(
        model=Qwen3Model,
        block=Qwen3TransformerBlock,
        rope=CosSinRoPE,
        parallelize=parallelize_qwen3,
        adapter=Qwen3StateDictAdapter,
        fixed={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False},
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128},
        rope_types=("default",),
        qk_norm=True,
    ),
}
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def mismatches(config: HFConfig) -> Iterator[str]:
    """What in a configuration torchtitan's model cannot be, each with what was found and what is wanted."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        yield f"model_type got {kind!r}, want one of {', '.join(ARCHITECTURES)}, or engine: trl"
        return
    architecture = ARCHITECTURES[kind]
    for key in _NEEDED:
        if not isinstance(config.get(key), int):
            yield f"{key} got {config.get(key)!r}, want a whole number"
    for key, value in architecture.fixed.items():
        if config.get(key, value) != value:
            yield f"{key} got {config[key]!r}, torchtitan's {kind} has {value!r}; want engine: trl"
    if config.get("quantization_config"):
        yield "quantization_config: the weights are quantized already; want the checkpoint they were made from"
    rope = _rope_parameters(config)
    if rope["rope_type"] not in architecture.rope_types:
        yield f"rope_type got {rope['rope_type']!r}, torchtitan's {kind} has {', '.join(architecture.rope_types)}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor got {rope['partial_rotary_factor']!r}, torchtitan's {kind} has 1"


def _rope_parameters(config: HFConfig) -> HFConfig:
    """`rope_parameters` of transformers 5, from whichever keys there are."""
    found = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    found |= config.get("rope_parameters") or {}
    return {**found, "rope_type": found.get("rope_type") or found.get("type") or "default"}


def max_length(config: HFConfig) -> int:
    """Positions that a model of a configuration without mismatches has."""
    return {**ARCHITECTURES[config["model_type"]].defaults, **config}["max_position_embeddings"]


def model_spec(config: HFConfig, attention: str) -> ModelSpec:
    """The torchtitan model of a configuration without mismatches.

    Args:
        config: of transformers, as in config.json.
        attention: "sdpa" or "flex".
    """
    architecture = ARCHITECTURES[config["model_type"]]
    config = {**architecture.defaults, **config}
    dim, vocab, tied = config["hidden_size"], config["vocab_size"], bool(config.get("tie_word_embeddings", False))
    random = {"weight": partial(nn.init.normal_, std=config.get("initializer_range", 0.02)), "bias": nn.init.zeros_}
    model = architecture.model.Config(
        dim=dim,
        vocab_size=vocab,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab,
            embedding_dim=dim,
            param_init={"weight": skip_param_init} if tied else {"weight": random["weight"]},
        ),
        norm=_norm(config, dim),
        lm_head=Linear.Config(in_features=dim, out_features=vocab, param_init=random),
        layers=[_layer(architecture, config, random, attention) for _ in range(config["num_hidden_layers"])],
        enable_weight_tying=tied,
    )
    return ModelSpec(
        name=config["model_type"],
        flavor="from config.json",
        model=model,
        parallelize_fn=architecture.parallelize,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=architecture.adapter,
    )


def _norm(config: HFConfig, size: int) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=size, eps=config["rms_norm_eps"], param_init={"weight": nn.init.ones_})


def _layer(architecture: Architecture, config: HFConfig, random: dict[str, Any], kind: str) -> Any:
    dim, heads, head_dim = config["hidden_size"], config["num_attention_heads"], _head_dim(config)
    inner = {"sdpa": DocumentSDPA, "flex": FlexAttention}[kind]
    attention = make_gqa_config(
        dim=dim,
        n_heads=heads,
        n_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        wqkv_param_init=random,
        wo_param_init=random,
        inner_attention=inner.Config(),
        fuse_qkv=False,
        rope=_rope(architecture, config, head_dim),
        qk_norm=_norm(config, head_dim) if architecture.qk_norm else None,
    )
    attention.qkv_linear = derive(attention.qkv_linear, SeparateQKV.Config)
    return architecture.block.Config(
        attention_norm=_norm(config, dim),
        ffn_norm=_norm(config, dim),
        attention=attention,
        feed_forward=make_ffn_config(
            dim=dim, hidden_dim=config["intermediate_size"], w1_param_init=random, w2w3_param_init=random
        ),
    )


def _head_dim(config: HFConfig) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rope(architecture: Architecture, config: HFConfig, head_dim: int) -> Any:
    rope, scaling = _rope_parameters(config), {}
    if rope["rope_type"] == "llama3":
        scaling = {
            "scaling": "llama",
            "scaling_factor": float(rope["factor"]),
            "low_freq_factor": float(rope["low_freq_factor"]),
            "high_freq_factor": float(rope["high_freq_factor"]),
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        }
    longest = config["max_position_embeddings"]
    return architecture.rope.Config(dim=head_dim, max_seq_len=longest, theta=float(rope["rope_theta"]), **scaling)


class SeparateQKV(QKVLinear):
    """torchtitan's separate q, k and v. One configuration makes k and v, and their first random weights differ."""

    @dataclass(kw_only=True, slots=True)
    class Config(QKVLinear.Config):
        pass

    def __init__(self, config: Config) -> None:
        QKVLinear.__init__(self, config)
        self.wv._param_init = {
            name: replace(init, name=f"{init.name} of v") if isinstance(init, NamedInit) else init
            for name, init in (self.wv._param_init or {}).items()
        }


class Layout:
    """Names and rows of one model on both sides: parameters are named "layers.0.feed_forward.w1.weight" in torchtitan,
    "model.layers.0.mlp.gate_proj.weight" in a checkpoint.

    Args:
        config: of transformers.
        spec: made of it.
    """

    def __init__(self, config: HFConfig, spec: ModelSpec) -> None:
        adapter: Any = spec.state_dict_adapter
        names = adapter(spec.model, None).from_hf_map
        self._to_hf = {titan: hf for hf, titan in names.items() if titan is not None}
        self._interleaved = ARCHITECTURES[config["model_type"]].rope is ComplexRoPE
        self.head_dim = _head_dim({**ARCHITECTURES[config["model_type"]].defaults, **config})
        self.tied = bool(config.get("tie_word_embeddings", False))

    def hf_name(self, titan: str) -> str:
        """A checkpoint's name of a parameter."""
        number = re.search(r"\d+", titan)
        name = self._to_hf[re.sub(r"\d+", "{}", titan, count=1)]
        return name.format(number.group(0)) if number else name

    def hf_layers(self, titan: str) -> tuple[str, ...]:
        """The checkpoint's layers that one configuration in the tree makes: k and v have one together."""
        parent, _, leaf = titan.rpartition(".")
        built = [f"{parent}.wk", f"{parent}.wv"] if leaf == "wkv" else [titan]
        return tuple(self.hf_name(f"{name}.weight").removesuffix(".weight") for name in built)

    def to_hf(self, titan: str, weight: torch.Tensor) -> torch.Tensor:
        """A whole parameter with its rows as a checkpoint has them."""
        return self._swap_rows(weight, 2, 1) if self.swaps_rows(titan) else weight

    def from_hf(self, titan: str, weight: torch.Tensor) -> torch.Tensor:
        """A checkpoint's tensor with its rows as the parameter has them."""
        return self._swap_rows(weight, 1, 2) if self.swaps_rows(titan) else weight

    def swaps_rows(self, titan: str) -> bool:
        """Whether rows of a parameter are in another order in the checkpoint."""
        return self._interleaved and titan.endswith((".wq.weight", ".wk.weight", ".wkv.weight"))

    def _swap_rows(self, weight: torch.Tensor, pair: int, half: int) -> torch.Tensor:
        """Rows of each head, seen as a table with 2 at position `pair` and half a head at `half`, transposed."""
        sizes = {pair: 2, half: self.head_dim // 2}
        heads = weight.view(-1, sizes[1], sizes[2], weight.shape[-1])
        return heads.transpose(1, 2).reshape(weight.shape)
