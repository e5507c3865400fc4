"""Handing steps of Adam to the fused kernels, in batches that share a launch."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from aotrain.kernels._dispatch import warn_slow
from aotrain.kernels.adam import AdamScalars, AdamTensors, adam_problem, adam_step
from aotrain.optim.base import ParamStep
from aotrain.optim.sharding import local_of, row_index
from aotrain.optim.state import BlockMoment, Moment


def fused_adam_steps(
    steps: list[ParamStep], scalars_of: Callable[[Mapping[str, Any], int], AdamScalars]
) -> list[ParamStep]:
    """Do the steps that a kernel can do; returns the others, which on a GPU is said once.

    Args:
        steps: parameters with the moments exp_avg and exp_avg_sq, and max_exp_avg_sq for amsgrad.
        scalars_of: scalars of a parameter group at a step number.
    """
    batches: dict[tuple[Any, ...], list[AdamTensors]] = defaultdict(list)
    scalars: dict[tuple[int, int], AdamScalars] = {}
    rest = []
    for step in steps:
        tensors, options, problem = _prepare(step)
        if tensors is None:
            if step.grad.is_cuda:
                warn_slow("adam_", problem)
            rest.append(step)
            continue
        at = id(step.group), step.number
        if at not in scalars:
            scalars[at] = scalars_of(step.group, step.number)
        batches[scalars[at], tensors.param.device, tensors.param.dtype, tensors.grad.dtype, *options].append(tensors)
    for (scalar_values, _, _, _, state_format, block_size, maximize, stochastic), batch in batches.items():
        adam_step(
            batch,
            scalar_values,
            state_format=state_format,
            block_size=block_size,
            maximize=maximize,
            stochastic=stochastic,
        )
    return rest


def _prepare(step: ParamStep) -> tuple[AdamTensors | None, tuple[str, int, bool, bool], str]:
    """(tensors, None if no kernel can take them; state format, block size, maximize, stochastic; why not)."""
    first, *others = step.moments
    block_size = first.block_size if isinstance(first, BlockMoment) else 1
    options = first.kernel_format, block_size, step.group["maximize"], step.stochastic
    if len(others) != 1:
        return None, options, "there is no kernel for amsgrad"
    index = row_index(step.param) if step.stochastic else (0, 0)
    if index is None:
        return None, options, "there is no kernel for stochastic rounding of parameters that are split inside rows"
    (exp_avg, exp_avg_scale), (exp_avg_sq, exp_avg_sq_scale) = (_stored(step, moment) for moment in step.moments)
    tensors = AdamTensors(
        param=local_of(step.param),
        grad=step.grad,
        exp_avg=exp_avg,
        exp_avg_scale=exp_avg_scale,
        exp_avg_sq=exp_avg_sq,
        exp_avg_sq_scale=exp_avg_sq_scale,
        rounding_key=step.rounding_key if step.stochastic else 0,
        first_index=index[0],
        row_stride=index[1],
    )
    problem = adam_problem(tensors, state_format=options[0], block_size=block_size)
    return (tensors if problem is None else None), options, problem or ""


def _stored(step: ParamStep, moment: Moment) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(codes, scale) or (values, None) on this rank."""
    values, *scale = (local_of(step.state[key]) for key in moment.keys)
    return values, (scale[0] if scale else None)
