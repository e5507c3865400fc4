"""Scales of a matrix of which each rank holds a part: the same bits as on one rank.

A part may hold only some of the elements that share a scale: a shard of rows holds a piece of every column, and its
first row may lie in the middle of a 128 x 128 block. So each rank writes the largest magnitudes of its own elements
into a table of the whole matrix, zero elsewhere, the tables are combined by their maximum, and each rank quantizes its
part with the combined table.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from aotrain.formats import Scaling, scale_shape
from aotrain.formats.scaling import Block, block_amax

# Dimensions of a matrix, 0 for rows and 1 for columns, that are split over the ranks of a group.
Splits = tuple[tuple[int, dist.ProcessGroup], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A rectangle of a matrix: `shape` elements from `start` on, of `whole`; each (rows, columns)."""

    whole: tuple[int, int]
    start: tuple[int, int]
    shape: tuple[int, int]


def part_amax(x: torch.Tensor, block: Block, part: Part) -> torch.Tensor:
    """The whole matrix's table of largest magnitudes, float32, as far as its part x knows them."""
    table = x.new_zeros(scale_shape(part.whole, block), dtype=torch.float32)
    if x.numel() == 0:
        return table
    heads = [start % size if size > 0 else 0 for start, size in zip(part.start, block, strict=True)]
    if any(heads):  # so that the part's blocks are those of the whole
        x = torch.nn.functional.pad(x, (heads[1], 0, heads[0], 0))
    own = block_amax(x, block)
    first = [start // size if size > 0 else 0 for start, size in zip(part.start, block, strict=True)]
    table[first[0] : first[0] + own.shape[0], first[1] : first[1] + own.shape[1]] = own
    return table


def all_reduce_amax(tables: Sequence[torch.Tensor], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The tables' elementwise maximum over the ranks of a group, in one all-reduce. NaN wins over everything."""
    # As integers: float32 >= 0 has their order, with NaN above infinity, while the maximum of floats drops or keeps a
    # NaN depending on the library and the order of the ranks.
    flat = torch.cat([table.flatten() for table in tables]).view(torch.int32)
    dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=group)
    parts = flat.view(torch.float32).split([table.numel() for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


def scaling_of_part(scaling: Scaling, amax: torch.Tensor, part: Part) -> tuple[Scaling, torch.Tensor]:
    """The scaling and amax with which quantizing a part gives its codes in the whole, from the whole's table.

    Blocks that the part cuts become blocks of one element in that dimension, with repeated entries of the table.
    """
    block = list(scaling.block)
    for dim in (0, 1):
        size, start, length = block[dim], part.start[dim], part.shape[dim]
        if size == -1:
            continue
        end = start + length
        if start % size == 0 and (end % size == 0 or end == part.whole[dim]):
            amax = amax.narrow(dim, start // size, -(-length // size))
        else:
            amax = amax.index_select(dim, torch.arange(start, end, device=amax.device) // size)
            block[dim] = 1
    return replace(scaling, block=(block[0], block[1])), amax


def all_reduce_over_splits(
    tables: Sequence[torch.Tensor], blocks: Sequence[Block], splits: Splits
) -> list[torch.Tensor]:
    """The tables of a matrix of which ranks hold parts, with blocks that reach across the splits combined."""
    combined = list(tables)
    for dim, group in splits:
        across = [number for number, block in enumerate(blocks) if block[dim] == -1]
        if across:
            reduced = all_reduce_amax([combined[number] for number in across], group)
            for number, table in zip(across, reduced, strict=True):
                combined[number] = table
    return combined
