"""State of sharded parameters: DTensors on the parameter's own mesh, so that checkpoints know what each rank holds.

torch.distributed.tensor takes half a second to import, so it is only imported once a parameter is known to be a
DTensor; whoever made that parameter has imported it already.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: torch.Tensor) -> "TypeGuard[DTensor]":
    """Whether this is a DTensor, without importing the module that defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_flattened(param: torch.Tensor) -> bool:
    """Whether FSDP1 (`FullyShardedDataParallel`) owns this parameter and keeps a piece of a flat buffer in it."""
    return getattr(param, "_fsdp_flattened", False)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor: its local shard, or the tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def even_inner_shards(param: torch.Tensor) -> bool:
    """Whether each rank holds equally long rows, so that every rank's row has the same number of blocks.

    Rows may be split unevenly (dimension 0, what FSDP2 does). A split of an inner dimension (tensor parallelism) must
    divide it, and may not interleave.
    """
    if not is_dtensor(param):
        return True
    for mesh_dim, placement in enumerate(param.placements):
        dim = getattr(placement, "dim", 0)
        if dim == 0:
            continue
        if not placement.is_shard() or param.shape[dim] % param.device_mesh.size(mesh_dim):
            return False
    return True


def shard_like(param: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """The tensor whose part on this rank is `local`, distributed over dimension 0 and rows as the parameter is.

    Args:
        param: the parameter, sharded as `even_inner_shards` allows.
        local: codes in the parameter's local shape, or scales [local rows, blocks per local row].

    Returns:
        `local` itself for an ordinary parameter, else a DTensor with the parameter's mesh. Its placements are the
        parameter's, except that a two-dimensional `local` of a parameter with more dimensions is split along its
        dimension 1 wherever the parameter is split inside rows.
    """
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    placements: list[Any] = []
    shape = list(local.shape)
    shape[0] = param.shape[0]
    for mesh_dim, placement in enumerate(param.placements):
        dim = getattr(placement, "dim", 0)
        if dim > 0:
            dim = min(dim, local.ndim - 1)
            shape[dim] *= param.device_mesh.size(mesh_dim)
            placement = Shard(dim)
        placements.append(placement)
    stride = torch.empty(shape, device="meta").stride()
    spec = DTensorSpec(param.device_mesh, tuple(placements), TensorMeta(torch.Size(shape), stride, local.dtype))
    # DTensor.from_local would move state in host memory (CPU offload) to the mesh's device; the constructor keeps it.
    return DTensor(local, spec, requires_grad=False)


def gather_full(local: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """The whole tensor of which each rank holds `local`, sharded as the parameter is.

    Collective for a DTensor, and then on the mesh's device, wherever `local` is.
    """
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor import DTensor

    shape, stride = param.shape, torch.empty(param.shape, device="meta").stride()
    sharded = DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride
    )
    return sharded.full_tensor()


def local_part(full: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that every rank has whole, sharded as the parameter is and on its device."""
    if not is_dtensor(param):
        return full
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: nothing is sent, each rank cuts its own part.
    local = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None).to_local()
    return local.to(local_of(param).device)


def global_index(param: torch.Tensor) -> torch.Tensor:
    """Row-major position of each local element in the global parameter, int64 in the local shape."""
    local = local_of(param)
    index = torch.zeros((), dtype=torch.int64, device=local.device)
    for dim, offset in enumerate(_offsets(param)):
        positions = torch.arange(offset, offset + local.shape[dim], device=local.device)
        index = index * param.shape[dim] + positions.view(-1, *[1] * (param.ndim - dim - 1))
    return index.expand(local.shape)


def row_index(param: torch.Tensor) -> tuple[int, int] | None:
    """(first, stride) such that element c of local row r is at first + r * stride + c in the global parameter.

    A row is what follows dimension 0. None if a row is not contiguous in the global parameter.
    """
    local, offsets = local_of(param), _offsets(param)
    if tuple(local.shape[2:]) != tuple(param.shape[2:]):
        return None
    first = 0
    for size, offset in zip(param.shape, offsets, strict=True):
        first = first * size + offset
    return first, param.shape[1:].numel()


def _offsets(param: torch.Tensor) -> Sequence[int]:
    """Where this rank's part begins in each dimension."""
    if not is_dtensor(param):
        return [0] * param.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)[1]
