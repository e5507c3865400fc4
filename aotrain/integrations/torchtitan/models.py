"""The models that a job can name, as torchtitan ``ModelSpec``s.

Sizes that torchtitan ships are taken from it. ``debug`` is ours: small enough to learn the byte-level look of source
code within seconds on two CPU cores (dim 128, 4 layers, 4 heads, 320 tokens, 0.9 M parameters; ``moe_models`` has its
twin with experts).
"""

from __future__ import annotations

import importlib
from functools import partial

import torch.nn as nn
from torchtitan.config.override import derive
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm, compute_ffn_hidden_dim
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.models.common.config_utils import decoder_vocab_size, make_ffn_config, make_gqa_config
from torchtitan.models.common.param_init import depth_scaled_std
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.module import Module

from aotrain.integrations.torchtitan.attention import DocumentSDPA
from aotrain.integrations.torchtitan.families import DEBUG, FAMILIES

# Vocabulary of the debug model: the byte tokenizer's 259 ids, padded to a multiple of 64 for float8 and for sharding.
DEBUG_VOCAB_SIZE = 320


def model_spec(family: str, size: str, attention: str) -> ModelSpec:
    """A fresh spec; its config tree may be changed freely.

    Args:
        family, size: of ``families.FAMILIES``.
        attention: "sdpa", "flex" or "varlen".
    """
    if (family, size) == ("llama3", DEBUG):
        return _debug_spec(attention)
    if size == DEBUG:
        from aotrain.integrations.torchtitan.moe_models import debug_moe_spec

        spec = debug_moe_spec("varlen" if attention == "sdpa" else attention)
    else:
        package = importlib.import_module(f"torchtitan.models.{FAMILIES[family].package}")
        flavor = FAMILIES[family].sizes[size]
        spec = package.model_registry(flavor, attn_backend="varlen" if attention == "sdpa" else attention)
    if attention == "sdpa":
        for _, node, parent, attr in list(spec.traverse(VarlenAttention.Config)):
            assert isinstance(attr, str)
            setattr(parent, attr, derive(node, DocumentSDPA.Config))
    return spec


def llama3_spec(size: str, attention: str) -> ModelSpec:
    """``model_spec`` of the family llama3."""
    return model_spec("llama3", size, attention)


def vocab_size(spec: ModelSpec) -> int:
    """Number of token ids that the model's embedding holds."""
    return decoder_vocab_size(spec)


def _debug_spec(attention: str) -> ModelSpec:
    return ModelSpec(
        name="llama3",
        flavor="debug",
        model=_debug_config(attention),
        parallelize_fn=parallelize_llama,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=Llama3StateDictAdapter,
    )


def _debug_config(attention: str) -> Llama3Model.Config:
    dim, num_layers, num_heads = 128, 4, 4
    output_std = dim**-0.5
    return Llama3Model.Config(
        dim=dim,
        vocab_size=DEBUG_VOCAB_SIZE,
        tok_embeddings=Embedding.Config(
            num_embeddings=DEBUG_VOCAB_SIZE, embedding_dim=dim, param_init={"weight": partial(nn.init.normal_, std=1.0)}
        ),
        norm=norm_config(dim),
        lm_head=Linear.Config(
            in_features=dim,
            out_features=DEBUG_VOCAB_SIZE,
            param_init=linear_init(output_std, cut=3 * output_std),
        ),
        layers=[_debug_layer(i, dim, num_heads, attention) for i in range(num_layers)],
    )


def _debug_layer(index: int, dim: int, num_heads: int, attention: str) -> Llama3TransformerBlock.Config:
    inner: Module.Config = {"sdpa": DocumentSDPA, "flex": FlexAttention, "varlen": VarlenAttention}[attention].Config()
    by_depth = linear_init(depth_scaled_std(0.02, index))
    return Llama3TransformerBlock.Config(
        attention_norm=norm_config(dim),
        ffn_norm=norm_config(dim),
        attention=make_gqa_config(
            dim=dim,
            n_heads=num_heads,
            wqkv_param_init=linear_init(0.02),
            wo_param_init=by_depth,
            inner_attention=inner,
            fuse_qkv=True,
            rope=ComplexRoPE.Config(dim=dim // num_heads, max_seq_len=131072, theta=500000, scaling="llama"),
        ),
        feed_forward=make_ffn_config(
            dim=dim,
            hidden_dim=compute_ffn_hidden_dim(dim, multiple_of=128),
            w1_param_init=linear_init(0.02),
            w2w3_param_init=by_depth,
        ),
    )


def norm_config(dim: int) -> RMSNorm.Config:
    """RMSNorm that starts with ones."""
    return RMSNorm.Config(normalized_shape=dim, param_init={"weight": nn.init.ones_})


def linear_init(std: float, cut: float = 2.0) -> dict:
    """``param_init`` of a linear layer: a normal distribution cut at plus and minus ``cut``; no bias."""
    return {"weight": partial(nn.init.trunc_normal_, std=std, a=-cut, b=cut), "bias": nn.init.zeros_}
