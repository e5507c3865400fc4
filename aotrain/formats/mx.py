"""MX operands of a matrix product: 1 x 32 blocks with E8M0 scales, with what training adds to a plain cast.

Source of the format: OCP Microscaling Formats (MX) Specification 1.0. What a `Scaling` may ask for besides:

- `hadamard`: the random Hadamard transform of `aotrain.formats.hadamard` along the columns. Both operands of a product
  have it, with the same signs, and it cancels. Its blocks are at most the scale's, so that a scale belongs to whole
  transformed blocks; a ragged last block comes back whole, filled from zeros.
- `rounding="stochastic"`: element (r, c) of the (transformed) operand, rows counted through a batch, is rounded with
  the bits `philox_bits16(key, r * P + c)`, P its columns rounded up to whole blocks.

The key is `data_key(hadamard, x)` of the operand before the transform: it follows from the operand's own bits, not from
the state of a generator. So there is nothing to save, nothing to advance and nothing to keep in step: a repeated
backward, a resumed job, a compiled graph and a GPU draw the same bits, ranks that hold the same gradient round it
equally, and ranks that hold other gradients draw other bits. A matrix and its transposition have the same sum of bits;
where one of them is transformed, as in recipe mxfp4, the size of the transform makes their keys differ, and the noise
in the two products of backward is independent.
"""

import math
from dataclasses import replace

import torch

from aotrain.formats.cast import ScaledTensor, quantize
from aotrain.formats.hadamard import hadamard_signs, hadamard_transform
from aotrain.formats.random import data_key, philox_bits16
from aotrain.formats.scaling import BLOCKWISE_1X32, Scaling

# Seed of the signs of every transform: equal everywhere, so that operands cast at different times go together.
SIGNS_SEED = 0


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
        noise = _noise(data_key(scaling.hadamard, x_hp), x)
    q = quantize(x, replace(scaling, hadamard=0), noise=noise)
    return q._replace(scaling=scaling)


def _noise(key: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    columns, block = x.shape[-1], BLOCKWISE_1X32[1]
    shape = *x.shape[:-1], -(-columns // block) * block
    return philox_bits16(key, torch.arange(math.prod(shape), device=x.device)).view(shape)[..., :columns]


def check_mx(scaling: Scaling) -> None:
    """Raise ValueError for anything but an MX scaling whose transform lies within a block."""
    if not is_mx(scaling) or scaling.hadamard > scaling.block[1]:
        raise ValueError(f"got {scaling}; want blocks of 1x32 with E8M0 scales, and a transform of at most 32.")


def signs_of(scaling: Scaling, device: torch.device) -> torch.Tensor:
    """The signs of the scaling's Hadamard transform."""
    return hadamard_signs(SIGNS_SEED, scaling.hadamard, device)
