"""Random Hadamard transform: spreads outliers over a block before a 4-bit cast, and cancels in a matrix product.

Along the last dimension, in blocks of n = `size`, with random signs s and Sylvester's Hadamard matrix H
(H_1 = [1], H_2m = [[H_m, H_m], [H_m, -H_m]]):

    y = (x * s) @ H / sqrt(n)          x = (y @ H / sqrt(n)) * s

T = diag(s) @ H / sqrt(n) is orthogonal, so that (a @ T) @ (b @ T).T == a @ b.T when both operands of a product are
transformed along the contracted dimension with the same signs.

The bits are specified: float32 butterflies (u, v) -> (u + v, u - v) with distances 1, 2, 4, ..., n / 2 in this order,
then one product with fp32(1 / sqrt(n)), a power of two for n = 4, 16, 64. bfloat16 values of a block of 16 whose
exponents differ by at most 12 are transformed exactly: each of the four stages adds one bit to their 8, of 24.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149, on random Hadamard transforms (n = 16,
signs shared by all blocks).
"""

import math

import torch

from aotrain.formats.random import philox_u32

HADAMARD_SIZE = 16


def hadamard_signs(seed: int, size: int = HADAMARD_SIZE, device: torch.device | str = "cpu") -> torch.Tensor:
    """Random signs, float32 [size] of 1 and -1: sign i is the low bit of the first word of Philox counter i."""
    bit = philox_u32(seed, torch.arange(size, device=device))[:, 0] & 1
    return (1 - 2 * bit).float()


def hadamard_transform(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """(x * signs) @ H / sqrt(n) in every block of n = len(signs) along the last dimension, in float32.

    A ragged last block is filled with zeros and comes back whole: [..., ceil(columns / n) * n].

    Args:
        x: [..., columns], float32, bfloat16 or float16.
        signs: float32 [n] of 1 and -1, n a power of two.
    """
    size = _check_size(signs)
    num_blocks = -(-x.shape[-1] // size)
    padded = torch.nn.functional.pad(x.float(), (0, num_blocks * size - x.shape[-1]))
    return _butterflies(padded.unflatten(-1, (num_blocks, size)) * signs).flatten(-2)


def inverse_hadamard_transform(y: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """The x of `hadamard_transform(x, signs)`, its columns padded to a multiple of len(signs), in float32."""
    size = _check_size(signs)
    if y.shape[-1] % size:
        raise ValueError(f"inverse_hadamard_transform got {y.shape[-1]} columns; want a multiple of {size}.")
    return (_butterflies(y.float().unflatten(-1, (y.shape[-1] // size, size))) * signs).flatten(-2)


def _check_size(signs: torch.Tensor) -> int:
    size = signs.numel()
    if signs.dim() != 1 or size < 1 or size & (size - 1):
        raise ValueError(f"Hadamard signs got shape {tuple(signs.shape)}; want a vector of 2^k signs.")
    return size


def _butterflies(blocks: torch.Tensor) -> torch.Tensor:
    """blocks @ H / sqrt(n) for float32 [..., n]."""
    size = blocks.shape[-1]
    distance = 1
    while distance < size:
        u, v = blocks.unflatten(-1, (size // (2 * distance), 2, distance)).unbind(-2)
        blocks = torch.stack([u + v, u - v], dim=-2).flatten(-3)
        distance *= 2
    return blocks * (1.0 / math.sqrt(size))
