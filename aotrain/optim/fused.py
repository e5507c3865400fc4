"""Handing steps of Adam to the fused kernels, in batches that share a launch."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from aotrain.kernels._dispatch import warn_slow
from aotrain.kernels.adam import AdamScalars, AdamTensors, adam_problem, adam_step
from aotrain.optim.base import ParamStep
from aotrain.optim.sharding import local_of, row_index
from aotrain.optim.state import BlockMoment, Moment


class _Prepared(NamedTuple):
    """What of a parameter's step stays the same from step to step, and what it was derived from."""

    stored: tuple[torch.Tensor, ...]
    options: tuple[Any, ...]
    grad_dtype: torch.dtype
    tensors: AdamTensors
    state_format: str
    block_size: int
    keys: tuple[str, ...]

    def fits(self, step: ParamStep, local: torch.Tensor) -> bool:
        """Whether nothing that matters has changed; gradients are new at every step."""
        grad, state = step.grad, step.state
        return (
            local.data_ptr() == self.tensors.param.data_ptr()
            and grad.dtype == self.grad_dtype
            and grad.shape == local.shape
            and grad.is_contiguous()
            and grad.device == local.device
            and self.options == _options(step)
            and all(state.get(key) is tensor for key, tensor in zip(self.keys, self.stored, strict=True))
        )


class FusedAdamSteps:
    """The steps of one optimizer's parameters by kernels, with what can be prepared once.

    Args:
        scalars_of: scalars of a parameter group at a step number.
    """

    def __init__(self, scalars_of: Callable[[Mapping[str, Any], int], AdamScalars]) -> None:
        self._scalars_of = scalars_of
        self._prepared: dict[torch.Tensor, _Prepared] = {}

    def __call__(self, steps: list[ParamStep]) -> list[ParamStep]:
        """Do the steps that a kernel can do; returns the others, which on a GPU is said once.

        Args:
            steps: parameters with the moments exp_avg and exp_avg_sq, and max_exp_avg_sq for amsgrad.
        """
        batches: dict[tuple[Any, ...], list[AdamTensors]] = defaultdict(list)
        scalars: dict[tuple[int, int], AdamScalars] = {}
        rest = []
        for step in steps:
            prepared = self._prepare(step)
            if isinstance(prepared, str):
                if step.grad.is_cuda:
                    warn_slow("adam_", prepared)
                rest.append(step)
                continue
            at = id(step.group), step.number
            if at not in scalars:
                scalars[at] = self._scalars_of(step.group, step.number)
            stochastic = step.stochastic
            key = step.rounding_key if stochastic else 0
            tensors = prepared.tensors._replace(grad=step.grad, rounding_key=key)
            param = tensors.param
            form = prepared.state_format, prepared.block_size, step.group["maximize"], stochastic
            batches[scalars[at], param.device, param.dtype, prepared.grad_dtype, *form].append(tensors)
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

    def _prepare(self, step: ParamStep) -> _Prepared | str:
        """The step's tensors, or why no kernel can take them."""
        local = local_of(step.param)
        known = self._prepared.get(step.param)
        if known is not None and known.fits(step, local):
            return known
        self._prepared.pop(step.param, None)
        moments = step.moments
        if len(moments) != 2:
            return "there is no kernel for amsgrad"
        index = row_index(step.param) if step.stochastic else (0, 0)
        if index is None:
            return "there is no kernel for stochastic rounding of parameters that are split inside rows"
        first = moments[0]
        block_size = first.block_size if isinstance(first, BlockMoment) else 1
        (exp_avg, exp_avg_scale), (exp_avg_sq, exp_avg_sq_scale) = (_stored(step, moment) for moment in moments)
        tensors = AdamTensors(
            param=local,
            grad=step.grad,
            exp_avg=exp_avg,
            exp_avg_scale=exp_avg_scale,
            exp_avg_sq=exp_avg_sq,
            exp_avg_sq_scale=exp_avg_sq_scale,
            first_index=index[0],
            row_stride=index[1],
        )
        problem = adam_problem(tensors, state_format=first.kernel_format, block_size=block_size)
        if problem is not None:
            return problem
        keys = tuple(key for moment in moments for key in moment.keys)
        prepared = _Prepared(
            stored=tuple(step.state[key] for key in keys),
            options=_options(step),
            grad_dtype=step.grad.dtype,
            # Not the gradient, whose memory would be held until the next step.
            tensors=tensors._replace(grad=local),
            state_format=first.kernel_format,
            block_size=block_size,
            keys=keys,
        )
        self._prepared[step.param] = prepared
        return prepared


def _options(step: ParamStep) -> tuple[Any, ...]:
    """What of the group decides about the state and about rounding."""
    group = step.group
    return group["bits"], group["block_size"], group["amsgrad"], step.stochastic


def _stored(step: ParamStep, moment: Moment) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(codes, scale) or (values, None) on this rank."""
    values, *scale = (local_of(step.state[key]) for key in moment.keys)
    return values, (scale[0] if scale else None)
