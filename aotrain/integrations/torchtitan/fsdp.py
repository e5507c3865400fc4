"""FSDP2 over gloo.

torchtitan turns off FSDP's gradient averaging by a divide factor of 1, which FSDP sends as a pre-multiplied sum; gloo
has no such reduction ("Cannot use ReduceOp.PREMUL_SUM with Gloo"). A plain sum is the same number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn as nn
from torch.distributed.fsdp import FSDPModule


def with_plain_sum(parallelize: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap a ``ModelSpec.parallelize_fn`` so that its FSDP modules reduce gradients with a plain sum."""

    @functools.wraps(parallelize)
    def parallelize_with_plain_sum(model: nn.Module, **kwargs: object) -> nn.Module:
        parallelized = parallelize(model, **kwargs)
        for module in parallelized.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return parallelized

    return parallelize_with_plain_sum
