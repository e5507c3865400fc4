"""The same parts for any stock torchtitan config, from its command line.

    torchrun -m torchtitan.train --module aotrain.integrations.torchtitan.registry --config llama3.llama3_8b
        --override.imports 'aotrain.integrations.torchtitan.overrides.float8_linear={"recipe": "float8_tensorwise"}'
        aotrain.integrations.torchtitan.overrides.optimizer

``float8_linear`` converts the linear layers of all transformer blocks, and ``experts`` the experts of MoE layers; the
output layer and the gates of routers stay as they are. For another choice of layers, write such a function in a module
of your own, with ``fqns`` globs as you need them, around ``linear.float8_linear_config`` or
``experts.experts_config``. On torch 2.15 with a GPU, ``--module llama3`` takes these imports just as well.
"""

from __future__ import annotations

from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config.override import derive, override
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

from aotrain.integrations.torchtitan.attention import DocumentSDPA
from aotrain.integrations.torchtitan.dispatcher import QuantizedTokenDispatcher, dispatcher_config
from aotrain.integrations.torchtitan.experts import experts_config
from aotrain.integrations.torchtitan.linear import Float8Linear, NVFP4Linear, float8_linear_config
from aotrain.integrations.torchtitan.metrics import RunMetrics
from aotrain.integrations.torchtitan.optim import LowBitOptimizers, with_low_bit

# Parts of a transformer block whose linear layers are converted: all but the gates of routers.
_PARTS = ("attention", "attn", "linear_attn", "feed_forward", "shared_experts", "mlp")


@override(
    target=Linear.Config,
    fqns=[f"*.layers.*.{part}.*" for part in _PARTS],
    exact=True,
    description="float8 products in transformer blocks",
)
def float8_linear(
    config: Linear.Config,
    *,
    recipe: str = "float8_rowwise",
    emulate: bool = False,
    fsdp_float8_all_gather: bool = False,
) -> Float8Linear.Config | NVFP4Linear.Config:
    """Every linear layer of the transformer blocks in the formats of ``recipe``."""
    return float8_linear_config(config, recipe=recipe, emulate=emulate, fsdp_float8_all_gather=fsdp_float8_all_gather)


@override(target=AllToAllTokenDispatcher.Config, exact=True, description="tokens travel to their experts in float8")
def token_dispatcher(
    config: AllToAllTokenDispatcher.Config, *, payload: str = "mxfp8", pad_multiple: int = 1
) -> QuantizedTokenDispatcher.Config:
    """Expert parallelism with low-precision all-to-all, and groups padded for grouped products."""
    return dispatcher_config(config, payload=payload, pad_multiple=pad_multiple)


@override(target=GroupedExperts.Config, description="low-precision experts")
def experts(
    config: GroupedExperts.Config, *, recipe: str = "float8_rowwise", emulate: bool = False
) -> GroupedExperts.Config:
    """The experts of all MoE layers in the formats of ``recipe``."""
    return experts_config(config, recipe=recipe, emulate=emulate)


@override(target=OptimizersContainer.Config, description="low-bit AdamW state")
def optimizer(config: OptimizersContainer.Config, *, name: str = "adamw_8bit") -> LowBitOptimizers.Config:
    """All Adam and AdamW parameter groups with the optimizer ``name``, keeping their hyper-parameters."""
    return with_low_bit(config, name)


@override(target=FlexAttention.Config, description="document-masked SDPA in place of FlexAttention")
def sdpa(config: FlexAttention.Config) -> DocumentSDPA.Config:
    """Attention that runs on any device and keeps packed documents apart."""
    return derive(config, DocumentSDPA.Config)


@override(target=VarlenAttention.Config, exact=True, description="document-masked SDPA in place of varlen attention")
def sdpa_for_varlen(config: VarlenAttention.Config) -> DocumentSDPA.Config:
    """``sdpa`` for configs that use flash attention with variable lengths."""
    return derive(config, DocumentSDPA.Config)


@override(target=MetricsProcessor.Config, description="console lines and metrics.jsonl")
def metrics(config: MetricsProcessor.Config, *, low_precision: bool = True) -> RunMetrics.Config:
    """Console lines, metrics.jsonl, and no utilization of the bf16 peak while ``low_precision``."""
    return derive(config, RunMetrics.Config, low_precision=low_precision)
