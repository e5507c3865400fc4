"""Inputs that find bugs: every code of a format, every bfloat16 value, and matrices of awkward rows."""

import torch

from aotrain.formats import ElementFormat


def all_codes(element: ElementFormat) -> torch.Tensor:
    """Every bit pattern of a format of at most 8 bits, [2^bits] in its dtype."""
    return torch.arange(2**element.bits, dtype=torch.uint8).view(element.dtype)


def all_bfloat16_values() -> torch.Tensor:
    """Every bit pattern of bfloat16, [65536]: zeros, subnormals, infinities and NaNs included."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def adversarial_matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """A finite matrix whose rows differ in scale by many orders of magnitude, with all-zero, constant, one-hot, tiny
    (subnormal) and huge rows among normal ones; [rows, columns].
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    scale = torch.exp2(torch.randint(-24, 24, (rows, 1), generator=generator).float())
    x = x * scale
    kinds = torch.arange(rows) % 7
    x[kinds == 1] = 0.0
    x[kinds == 2] = 3.0
    one_hot = (kinds == 3).nonzero().flatten()
    if columns:
        x[one_hot] = 0.0
        x[one_hot, one_hot % columns] = -1.5
    x[kinds == 4] = x[kinds == 4].sign() * 1e-39
    x[kinds == 5] = x[kinds == 5].sign() * 3e38 if dtype != torch.float16 else x[kinds == 5].sign() * 6e4
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)
