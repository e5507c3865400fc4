"""Norm of gradients that live partly on devices, partly in host memory, and are perhaps sharded over ranks.

Each tensor is reduced where it is; only one number per device and device mesh moves.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from aotrain.optim.sharding import is_dtensor


def total_norm(
    params: Sequence[torch.Tensor], grads: Sequence[tuple[torch.Tensor, torch.Tensor]], norm_type: float
) -> torch.Tensor:
    """Norm over all gradients of all ranks, a float32 host scalar, the same on every rank.

    Args:
        params: every parameter of the optimizer; which collectives run depends on these only, so that a rank
            without gradients takes part.
        grads: (parameter, this rank's part of its gradient, on any device).
        norm_type: 1, 2, inf, ...
    """
    # Mesh and sharded mesh dimensions -> this rank's norms of the parameters sharded so.
    norms: dict[tuple[Any, tuple[int, ...]], dict[torch.device, list[torch.Tensor]]] = {}
    devices: dict[tuple[Any, tuple[int, ...]], torch.device] = {}
    for param in params:
        norms.setdefault(_sharding(param), {})
        devices.setdefault(_sharding(param), param.device)
    for param, local in grads:
        if local.numel() > 0:
            dtype = torch.float64 if local.dtype == torch.float64 else torch.float32
            norm = torch.linalg.vector_norm(local, norm_type, dtype=dtype)
            norms[_sharding(param)].setdefault(norm.device, []).append(norm)
    totals = []
    for sharding, by_device in norms.items():
        # float64: the sum of thousands of squares is not what should limit the result.
        parts = [torch.linalg.vector_norm(torch.stack(part).double(), norm_type).cpu() for part in by_device.values()]
        local_norm = _combine(parts, norm_type)
        totals.append(_over_ranks(local_norm, sharding, devices[sharding], norm_type))
    return _combine(totals, norm_type).float()


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What to multiply gradients of this norm with, as `torch.nn.utils.clip_grad_norm_` defines it."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def _combine(norms: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack(list(norms)), norm_type)


def _sharding(param: torch.Tensor) -> tuple[Any, tuple[int, ...]]:
    if not is_dtensor(param):
        return (None, ())
    dims = tuple(dim for dim, placement in enumerate(param.placements) if not placement.is_replicate())
    return (param.device_mesh, dims)


def _over_ranks(
    norm: torch.Tensor, sharding: tuple[Any, tuple[int, ...]], device: torch.device, norm_type: float
) -> torch.Tensor:
    mesh, dims = sharding
    if not dims:
        return norm
    from torch import distributed as dist

    # On the parameter's device: the mesh's process groups need not be able to reduce host memory.
    maximum = math.isinf(norm_type)
    value = (norm if maximum else norm**norm_type).to(device)
    for dim in dims:
        dist.all_reduce(value, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=mesh.get_group(dim))
    return value.cpu() if maximum else value.cpu() ** (1.0 / norm_type)
