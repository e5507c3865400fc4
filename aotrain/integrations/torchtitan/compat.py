"""Every difference between torch versions that torchtitan 0.3.0 and our adapter meet, in this one file.

torchtitan 0.3.0 is written for torch 2.15. On older ones some names are missing, and some of its defaults do not work.
``install`` adds the missing names and has to run before torchtitan is imported; the other functions answer which
default is safe. Remove a branch when the oldest torch we support no longer needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.compiler
import torch.distributed as dist
import torch.distributed.fsdp


def torch_version() -> tuple[int, int]:
    """(major, minor) of the running torch."""
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def install() -> list[str]:
    """Add the names that torchtitan 0.3.0 imports or calls and this torch lacks.

    Safe to call again. Returns the names that were added by this call.
    """
    added = []
    if dist.is_available() and not hasattr(dist, "set_timeout"):  # torch < 2.15
        dist.set_timeout = _set_timeout  # type: ignore[attr-defined]
        added.append("torch.distributed.set_timeout")
    if not hasattr(torch.distributed.fsdp, "DataParallelMeshDims"):  # torch < 2.13; only named in annotations then
        torch.distributed.fsdp.DataParallelMeshDims = _DataParallelMeshDims  # type: ignore[attr-defined]
        added.append("torch.distributed.fsdp.DataParallelMeshDims")
    if not hasattr(torch.compiler, "_is_non_strict_tracing"):  # torch < 2.13
        torch.compiler._is_non_strict_tracing = _never  # type: ignore[attr-defined]
        added.append("torch.compiler._is_non_strict_tracing")
    return added


def spmd_backend() -> Literal["partial_dtensor", "spmd_types"]:
    """torchtitan's sharding backend. Its default, spmd_types, needs an FSDP2 that came with torch 2.15."""
    return "spmd_types" if torch_version() >= (2, 15) else "partial_dtensor"


def chunked_loss_works() -> bool:
    """Whether the loss may own the output layer; on torch 2.11 its FSDP group fails in the backward pass."""
    return torch_version() >= (2, 13)


def cuda_graphs_work() -> bool:
    """Whether torchtitan's CUDA graph capture of the whole step may be left on."""
    return torch_version() >= (2, 15)


def expert_parallel_works() -> bool:
    """Whether torchtitan's FSDP of experts on several ranks finds the names it imports."""
    return torch_version() >= (2, 13)


def flex_attention_works() -> bool:
    """Whether torchtitan's FlexAttention may be the default on a GPU; not so on torch 2.11, where it is untried."""
    return torch_version() >= (2, 13)


def _set_timeout(timeout: timedelta, group: dist.ProcessGroup | None = None) -> None:
    dist.distributed_c10d._set_pg_timeout(timeout, group)


@dataclass
class _DataParallelMeshDims:
    shard: object = None
    replicate: object = None


def _never() -> bool:
    return False
