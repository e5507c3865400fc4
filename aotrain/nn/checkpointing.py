"""Selective activation checkpointing that knows low-precision products.

    from torch.utils.checkpoint import checkpoint
    checkpoint(block, x, use_reentrant=False, context_fn=save_products())

keeps the outputs of matrix products and attention and recomputes what is cheap: norms, activations, casts. torch's own
lists of expensive operations do not have `aotrain::scaled_mm`, so under them every float8 product is computed twice.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import aotrain.kernels.nvfp4_grouped_mm  # registers torch.ops.aotrain
import aotrain.kernels.scaled_grouped_mm  # noqa: F401

_aten = torch.ops.aten
_PRODUCTS = (
    *(torch.ops.aotrain.scaled_mm.default, torch.ops.aotrain.mx_mm.default, torch.ops.aotrain.nvfp4_mm.default),
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.linear.default),
    *(_aten._scaled_mm.default, _aten._int_mm.default),
    *(torch.ops.aotrain.scaled_grouped_mm.default, torch.ops.aotrain.nvfp4_grouped_mm.default),
    *(torch.ops.aotrain.grouped_mm.default, _aten._grouped_mm.default),
)
_ATTENTION = tuple(
    getattr(_aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math",
    )
)


def save_products(every: int = 1, extra_ops: Iterable[Any] = ()) -> Callable[[], tuple[Any, Any]]:
    """`context_fn` of `torch.utils.checkpoint.checkpoint`: what to keep of a block.

    Args:
        every: keep the output of one in so many products; 2 halves the memory of the products and repeats half of them
            in backward. Attention is always kept.
        extra_ops: further operations to keep, such as `torch.ops.mylib.attention.default`.

    Raises:
        ValueError: `every` is below 1.
    """
    if every < 1:
        raise ValueError(f"save_products got every={every}; want 1 (all products) or more.")
    always = {*_ATTENTION, *extra_ops}

    def contexts() -> tuple[Any, Any]:
        seen = {False: 0, True: 0}

        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if op in always:
                return CheckpointPolicy.MUST_SAVE
            if op not in _PRODUCTS:
                return CheckpointPolicy.PREFER_RECOMPUTE
            # The same products must be chosen in the forward and in its repetition.
            seen[ctx.is_recompute] += 1
            keep = seen[ctx.is_recompute] % every == 0
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    return contexts
