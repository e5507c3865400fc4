"""``debug`` of the family deepseek_v3: a mixture of experts that learns within seconds on two CPU cores.

DeepSeek-V3's parts in small: dim 128, 4 layers with latent attention of 4 heads; the first with a dense feed-forward,
the others with 8 experts of hidden size 128, of which a token takes 2, and a shared one. Sigmoid routing, balanced
without an auxiliary loss. 320 tokens, 1.8 M parameters.
"""

from __future__ import annotations

from functools import partial

import torch.nn as nn
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import ComplexRoPE, Embedding, Linear
from torchtitan.models.common.param_init import depth_scaled_std
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, build_mla_moe_layers, parallelize_deepseekv3
from torchtitan.models.deepseek_v3.state_dict_adapter import DeepSeekV3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec

from aotrain.integrations.torchtitan.models import DEBUG_VOCAB_SIZE, linear_init, norm_config

_DIM = 128
_HIDDEN = 128
_ROPE_DIM = 16


def debug_moe_spec(attention: str) -> ModelSpec:
    """A fresh spec; ``attention`` is "flex" or "varlen"."""
    return ModelSpec(
        name="deepseek_v3",
        flavor="debug",
        model=_config(attention),
        parallelize_fn=parallelize_deepseekv3,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=register_moe_load_balancing_hook,
        state_dict_adapter=DeepSeekV3StateDictAdapter,
    )


def _config(attention: str) -> DeepSeekV3Model.Config:
    output_std = _DIM**-0.5
    layers = build_mla_moe_layers(
        n_layers=4,
        n_dense_layers=1,
        dim=_DIM,
        n_heads=4,
        q_lora_rank=0,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=_ROPE_DIM,
        v_head_dim=32,
        mscale=1.0,
        dense_hidden_dim=3 * _HIDDEN,
        moe_hidden_dim=_HIDDEN,
        num_experts=8,
        num_shared_experts=1,
        router_top_k=2,
        router_score_func="sigmoid",
        router_route_norm=True,
        attn_backend=attention,
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        linear_init=linear_init(0.02),
        norm_init={"weight": nn.init.ones_},
        depth_init=lambda index: linear_init(depth_scaled_std(0.02, index)),
        depth_experts_init=_experts_init,
        rope=ComplexRoPE.Config(dim=_ROPE_DIM, max_seq_len=131072, theta=10000.0),
    )
    return DeepSeekV3Model.Config(
        dim=_DIM,
        vocab_size=DEBUG_VOCAB_SIZE,
        tok_embeddings=Embedding.Config(
            num_embeddings=DEBUG_VOCAB_SIZE,
            embedding_dim=_DIM,
            param_init={"weight": partial(nn.init.normal_, std=1.0)},
        ),
        norm=norm_config(_DIM),
        lm_head=Linear.Config(
            in_features=_DIM,
            out_features=DEBUG_VOCAB_SIZE,
            param_init=linear_init(output_std, cut=3 * output_std),
        ),
        layers=layers,
    )


def _experts_init(index: int) -> dict:
    down = partial(nn.init.trunc_normal_, std=depth_scaled_std(0.02, index))
    return {"w1_EFD": partial(nn.init.trunc_normal_, std=0.02), "w2_EDF": down, "w3_EFD": down}
