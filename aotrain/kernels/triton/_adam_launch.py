"""`aotrain::adam_` on a GPU: address tables and launches of the kernel in `adam.py`.

A launch steps all parameters of one class: whether rows can be read as one (`flat`), whether blocks are cut off by the
end of their row, whether addresses allow vector loads. A model has one or two classes. What a launch needs to know of
the parameters is a table in device memory, built from addresses and shapes alone and kept for as long as these come
back, which for a training loop is as long as the allocator returns the gradients to the same places. With a table at
hand a step costs one kernel launch per class and, with stochastic rounding, one copy of 8 bytes per parameter.

A CUDA graph can capture a step whose table exists. Learning rate, bias corrections and rounding keys are then those of
the captured step.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl

from aotrain.kernels.triton._adam_maps import map_constants, packed_tables
from aotrain.kernels.triton.adam import NUM_COLUMNS, adam_kernel

# Elements per program: 16 for each of 256 threads, since with fewer the tables of the maps cost more than they save.
# The paths without vector loads need more registers per element. Chosen from compiled instruction and register counts
# (docs/LOG.md, benchmarks/results/aot_kernels.csv); not measured on a GPU yet.
_TILE = 4096
_SMALL_TILE = 1024
NUM_WARPS = 8
# float32 state has no blocks; its rows are cut for the grid.
FLOAT32_BLOCK = 256
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


class _Row(NamedTuple):
    """One parameter, as numbers."""

    addresses: tuple[int, ...]  # parameter, gradient, exp_avg and its scale, exp_avg_sq and its scale
    num_rows: int
    row_length: int
    first_index: int
    row_stride: int


class Class(NamedTuple):
    """Compile-time properties that the parameters of a launch share; named as the kernel's arguments."""

    FLAT: bool
    WHOLE: bool
    ALIGNED: bool
    ROUNDING: str


class _Launch(NamedTuple):
    shared: Class
    members: tuple[int, ...]
    table: torch.Tensor
    tiles: torch.Tensor


def adam_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_scales: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    exp_avg_sq_scales: Sequence[torch.Tensor],
    *,
    state_format: str,
    block_size: int,
    coupled_decay: float,
    maximize: bool = False,
    rounding_keys: Sequence[int] = (),
    first_indices: Sequence[int] = (),
    row_strides: Sequence[int] = (),
    **scalars: float,
) -> None:
    """See `aotrain.kernels.adam`. Tests call it with CPU tensors under Triton's interpreter."""
    lists = [params, grads, exp_avgs, exp_avg_scales, exp_avg_sqs, exp_avg_sq_scales]
    if state_format == "float32":
        block_size = FLOAT32_BLOCK
        lists[3], lists[5] = exp_avgs, exp_avg_sqs  # never read
    if not params:
        return
    device, dtypes = params[0].device, {(param.dtype, grad.dtype) for param, grad in zip(params, grads, strict=True)}
    if len(dtypes) != 1:
        raise ValueError(f"aotrain::adam_ takes parameters of one dtype and gradients of one dtype, got {dtypes}.")
    ((param_dtype, grad_dtype),) = dtypes
    stochastic = bool(rounding_keys) and param_dtype == torch.bfloat16
    rows = tuple(
        _row(tensors, first, stride)
        for *tensors, first, stride in zip(
            *lists, first_indices or [0] * len(params), row_strides or [0] * len(params), strict=True
        )
    )
    float32_scalars = {name: _to_float32(value) for name, value in scalars.items()}
    with torch.cuda.device_of(params[0]):
        maps = packed_tables(state_format, device)
        for launch in _launches(rows, state_format, block_size, stochastic, device, _stream(device)):
            keys = _upload([rounding_keys[i] for i in launch.members], device) if stochastic else launch.table
            adam_kernel[(len(launch.tiles),)](
                launch.table,
                launch.tiles,
                keys,
                maps,
                **float32_scalars,
                coupled_decay=_to_float32(coupled_decay),
                **kernel_constants(param_dtype, grad_dtype, state_format, block_size, launch.shared),
                MAXIMIZE=maximize,
                COUPLED=coupled_decay != 0.0,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )


def kernel_constants(
    param_dtype: torch.dtype, grad_dtype: torch.dtype, state_format: str, block_size: int, shared: Class
) -> dict[str, object]:
    """Compile-time constants of a launch, but for those that the options of the optimizer decide."""
    return {
        "PARAM_TYPE": _TYPES[param_dtype],
        "GRAD_TYPE": _TYPES[grad_dtype],
        "STATE": state_format,
        "SIGNED_MAP": map_constants(state_format, True),
        "UNSIGNED_MAP": map_constants(state_format, False),
        "BLOCK": block_size,
        "TILE_BLOCKS": _tile_blocks(block_size, shared),
        **shared._asdict(),
    }


def _tile_blocks(block_size: int, shared: Class) -> int:
    """Blocks per program."""
    return max(1, (_TILE if shared.ALIGNED and shared.ROUNDING != "stochastic" else _SMALL_TILE) // block_size)


@functools.lru_cache(maxsize=64)
def _launches(
    rows: tuple[_Row, ...],
    state_format: str,
    block_size: int,
    stochastic: bool,
    device: torch.device,
    stream: int,  # a table is only safe to use on the stream that it was copied on
) -> tuple[_Launch, ...]:
    """What to launch for these parameters, their tables on the device."""
    classes: dict[Class, list[int]] = {}
    described = [_describe(row, state_format, block_size, stochastic) for row in rows]
    for index, (shared, _) in enumerate(described):
        if rows[index].num_rows * rows[index].row_length > 0:
            classes.setdefault(shared, []).append(index)
    if not classes:
        return ()
    table: list[int] = []
    tiles = []
    for shared, members in classes.items():
        counts = []
        for index in members:
            num_rows, row_length = described[index][1]
            blocks_per_row = -(-row_length // block_size)
            num_blocks = num_rows * blocks_per_row
            position = (num_blocks, row_length, blocks_per_row, sum(counts))
            table += (*rows[index].addresses, *position, rows[index].first_index, rows[index].row_stride)
            counts.append(-(-num_blocks // _tile_blocks(block_size, shared)))
        tiles.append(_tile_map(tuple(counts), device, stream))
    tables = _upload(table, device).split([NUM_COLUMNS * len(members) for members in classes.values()])
    return tuple(
        _Launch(shared, tuple(members), part, tile_map)
        for (shared, members), part, tile_map in zip(classes.items(), tables, tiles, strict=True)
    )


@functools.lru_cache(maxsize=64)
def _tile_map(counts: tuple[int, ...], device: torch.device, stream: int) -> torch.Tensor:
    """The parameter of each program, int32; `counts` are programs per parameter."""
    tiles = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), torch.tensor(counts))
    return _to_device(tiles, device)


def _describe(row: _Row, state_format: str, block_size: int, stochastic: bool) -> tuple[Class, tuple[int, int]]:
    """(class of a parameter, (rows, row length) as the kernel sees them)."""
    quantized = state_format != "float32"
    # Several rows can be read as one where neither blocks nor random bits begin anew.
    flat = not (stochastic and row.row_stride != row.row_length and row.num_rows != 1)
    if quantized and row.row_length % block_size:
        flat = False
    num_rows, row_length = (1, row.num_rows * row.row_length) if flat else (row.num_rows, row.row_length)
    whole = row_length % block_size == 0
    aligned = (
        block_size % 16 == 0
        and all(address % 16 == 0 for address in row.addresses)
        and (row_length % 16 == 0 or (flat and whole))
    )
    rounding = "nearest"
    if stochastic:
        starts = (row.first_index, block_size, 0 if flat else row.row_stride)
        rounding = "stochastic8" if all(start % 8 == 0 for start in starts) else "stochastic"
    return Class(flat, whole, aligned, rounding), (num_rows, row_length)


def _row(tensors: Sequence[torch.Tensor], first_index: int, row_stride: int) -> _Row:
    shape = tensors[0].shape
    return _Row(tuple(tensor.data_ptr() for tensor in tensors), shape[0], shape[1:].numel(), first_index, row_stride)


def _upload(values: list[int], device: torch.device) -> torch.Tensor:
    """int64 tensor on the device."""
    return _to_device(torch.tensor(values, dtype=torch.int64), device)


def _to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that does not wait for the GPU."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _to_float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
