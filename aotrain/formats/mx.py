"""MX operands of a matrix product: 1 x 32 blocks with E8M0 scales, with what training adds to a plain cast.

Source of the format: OCP Microscaling Formats (MX) Specification 1.0. What a `Scaling` may ask for besides:

- `hadamard`: the random Hadamard transform of `aotrain.formats.hadamard` along the columns. Both operands of a product
  have it, with the same signs, and it cancels. Its blocks are at most the scale's, so that a scale belongs to whole
  transformed blocks; a ragged last block comes back whole, filled from zeros.
- `rounding="stochastic"`: element i of the (transformed) operand, in row-major order, is rounded with the bits
  `philox_bits16(key, i)`.

The key is a digest of the operand's own bits (`stochastic_key`), not the state of a generator. So there is nothing to
save, nothing to advance and nothing to keep in step: a repeated backward, a resumed job, a compiled graph and a GPU
draw the same bits, ranks that hold the same gradient round it equally, and ranks that hold other gradients draw other
bits. An operand and its transposition have different digests, hence independent noise in the two products of backward.
"""

from dataclasses import replace

import torch

from aotrain.formats.cast import ScaledTensor, quantize
from aotrain.formats.hadamard import hadamard_signs, hadamard_transform
from aotrain.formats.random import philox_bits16
from aotrain.formats.scaling import BLOCKWISE_1X32, Scaling

# Seed of the signs of every transform: equal everywhere, so that operands cast at different times go together.
SIGNS_SEED = 0
# The odd multiplier of Knuth's multiplicative hashing, floor(2^64 / golden ratio), as int64.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
# |sum| of as many 16-bit integers is at most 2^30.
_ROWS_IN_32_BITS = 2**15


def is_mx(scaling: Scaling) -> bool:
    """Whether it is an MX operand: 1 x 32 blocks with E8M0 scales."""
    return scaling.block == BLOCKWISE_1X32 and scaling.scale.e8m0_rounding is not None


def quantize_mx(x_hp: torch.Tensor, scaling: Scaling, *, noise: torch.Tensor | None = None) -> ScaledTensor:
    """Transform, scale and round an operand of a matrix product.

    Args:
        x_hp: [..., rows, columns], float32, bfloat16 or float16; columns are the contracted dimension.
        scaling: an MX scaling.
        noise: for stochastic rounding instead of the bits described above; as for `quantize`, of the data's shape.

    Returns:
        ScaledTensor with data [..., rows, columns], columns rounded up to whole blocks of a Hadamard transform.

    Raises:
        ValueError: the scaling is not MX, or its transform is larger than a block.
    """
    check_mx(scaling)
    x = hadamard_transform(x_hp, signs_of(scaling, x_hp.device)) if scaling.hadamard else x_hp
    if scaling.rounding == "stochastic" and noise is None:
        noise = philox_bits16(stochastic_key(x_hp), torch.arange(x.numel(), device=x.device)).view(x.shape)
    q = quantize(x, replace(scaling, hadamard=0), noise=noise)
    return q._replace(scaling=scaling)


def check_mx(scaling: Scaling) -> None:
    """Raise ValueError for anything but an MX scaling whose transform lies within a block."""
    if not is_mx(scaling) or scaling.hadamard > scaling.block[1]:
        raise ValueError(f"got {scaling}; want blocks of 1x32 with E8M0 scales, and a transform of at most 32.")


def signs_of(scaling: Scaling, device: torch.device) -> torch.Tensor:
    """The signs of the scaling's Hadamard transform."""
    return hadamard_signs(SIGNS_SEED, scaling.hadamard, device)


def stochastic_key(x_hp: torch.Tensor) -> torch.Tensor:
    """Philox key, int64 without dimensions: `sum_j (2j + 1) * golden * (sum of the bits of column j)` modulo 2^64.

    A sum of integers, the same in any order. Depends on every bit of x.

    Args:
        x_hp: [..., columns], float32, bfloat16 or float16, any strides; the bits are read as signed integers.
    """
    bits = x_hp.view(torch.int32 if x_hp.dtype == torch.float32 else torch.int16).flatten(0, -2)
    if bits.dtype == torch.int16:  # sums that fit 32 bits take a ninth of the time on CPU
        columns = torch.stack([part.sum(0, dtype=torch.int32) for part in bits.split(_ROWS_IN_32_BITS)]).sum(0)
    else:
        columns = bits.sum(0, dtype=torch.int64)
    weights = (2 * torch.arange(columns.numel(), device=x_hp.device) + 1) * _GOLDEN
    return (columns * weights).sum()
