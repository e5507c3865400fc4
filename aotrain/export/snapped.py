"""Find weights that lie on a quantized grid already.

A symmetric int4 scale is amax / 7.5, and the largest value on such a grid is 7 or 8 steps, so quantizing a weight that
has been quantized before, with scales of its own, finds another scale and other codes: 88 % of the weights changed by
6.6 % in a small model. Such a checkpoint must be exported with the scales that made it, or from what it was made of.
"""

import torch

from aotrain.export.parts import Rows

# A block of 16 has at least this many non-zero elements, or it says nothing.
_BLOCK, _NONZERO = 16, 12
# 2- to 4-bit symmetric grids have at most nine magnitudes (0 to 8 steps, or e2m1's eight).
_MAGNITUDES = 9
# Blocks needed for a verdict, and rows looked at.
_BLOCKS, _ROWS = 4, 64


def looks_snapped(weight: Rows) -> bool:
    """Whether every block of 16 elements of a weight has as few magnitudes as 4-bit codes give.

    Args:
        weight: [rows, columns] floating; 64 of its rows are looked at.
    """
    count, columns = weight.shape
    usable = columns // _BLOCK * _BLOCK
    if count == 0 or usable == 0:
        return False
    rows = torch.cat([weight[row : row + 1] for row in range(0, count, max(1, count // _ROWS))][:_ROWS])
    magnitudes = rows[:, :usable].float().abs().reshape(-1, _BLOCK)
    magnitudes = magnitudes[(magnitudes > 0).sum(dim=1) >= _NONZERO]
    if len(magnitudes) < _BLOCKS:
        return False
    ordered = magnitudes.sort(dim=1).values
    distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1)
    return bool((distinct <= _MAGNITUDES).all())
