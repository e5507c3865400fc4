"""Integers with a scale and a zero point per block: the number format of int2 to int8 weights and activations.

With `lo` and `hi` the smallest and largest code, `mn <= 0 <= mx` the bounds of a block's values (0 included), and each
operation rounded to the dtype that it is done in, which is that of the input:

    symmetric                  scale = max(-mn, mx) / ((hi - lo) / 2)     zero_point = (hi + lo + 1) / 2, toward 0
    symmetric, never clipping  scale = max(mn / lo, mx / hi)              zero_point = (hi + lo + 1) / 2, toward 0
    asymmetric                 scale = (mx - mn) / (hi - lo)              zero_point = lo - round(mn / scale), in lo..hi
    code = clamp(round(x * (1 / scale)) + zero_point, lo, hi)             x ~= (code - zero_point) * scale

That is domain INT of the zero point. In domain FLOAT, it is a value: `mn` and `mx` are the true bounds, and

    scale = (mx - mn) / (hi - lo)     zero_point = mn + scale * mid       mid = (hi + lo + 1) / 2
    code = clamp(round((x - (zero_point - scale * mid)) / scale), lo, hi) x ~= (code - mid) * scale + zero_point

A symmetric int4 scale is therefore amax / 7.5: the most negative code stands for -8 / 7.5 amax, values above 7 / 7.5 of
amax saturate. Quantizing a dequantized tensor again with scales of its own gives *other* codes (only the mapping that
never clips is idempotent): keep the scales that were used.

Scales are at least `eps`, and never below the smallest normal number of the dtype that they are stored in (the smallest
of all beside zero points that are values), so a block of zeros gives zeros. A block with a NaN or an infinity
dequantizes to NaN everywhere, as in every other format here. So does one whose scale or zero point is too large for its
dtype, such as a difference of 70000 in float16.

Source: the integer formats of torchao's `quant_primitives` and of compressed-tensors; docs/numerics.md, section 13.
"""

import enum
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class MappingType(enum.Enum):
    """How the values of a block are laid onto the codes; the formulas are in this module's docstring."""

    SYMMETRIC = 1
    SYMMETRIC_NO_CLIPPING_ERR = 2
    ASYMMETRIC = 3


class ZeroPointDomain(enum.Enum):
    """What a zero point is: a code, a value, or absent (zero)."""

    INT = 1
    FLOAT = 2
    NONE = 3


class AffineTensor(NamedTuple):
    """Codes with their scales.

    Invariants: `codes` is int8, or uint8 where codes reach beyond 127, in the shape of the quantized tensor; `scale`
    and `zero_point` have one element per block, [..., blocks per row]; `zero_point` is None if it is zero everywhere.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AffineFormat:
    """Codes `quant_min..quant_max` in groups along the last dimension.

    Attributes:
        quant_min: smallest code.
        quant_max: largest code.
        group_size: elements of a block; None for a whole row (per channel of a weight, per token of an activation).
        mapping: how values are laid onto codes.
        domain: what the zero point is. FLOAT and NONE have the meaning of torchao's primitives.
        scale_dtype: dtype in which scales, and zero points that are values, are stored and used; None: the input's.
        compute_dtype: dtype of the arithmetic; None: the input's.
        eps: lower bound of a scale where it exceeds the smallest normal numbers of the dtype of the arithmetic and of
            `scale_dtype`, which bound every scale.

    Raises:
        ValueError: no codes, a group of no elements, a dtype that is none of float32, bfloat16 and float16, an eps that
            is not positive, or an asymmetric mapping without zero points.
    """

    quant_min: int
    quant_max: int
    group_size: int | None = None
    mapping: MappingType = MappingType.SYMMETRIC
    domain: ZeroPointDomain = ZeroPointDomain.INT
    scale_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        if not -128 <= self.quant_min < self.quant_max <= 255 or self.quant_max - self.quant_min > 255:
            raise ValueError(
                f"AffineFormat got codes {self.quant_min}..{self.quant_max}; want a range of at most 8 bits."
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"AffineFormat got group_size={self.group_size}; want at least 1, or None for whole rows.")
        for name, dtype in (("scale_dtype", self.scale_dtype), ("compute_dtype", self.compute_dtype)):
            if dtype not in (None, *_DTYPES):
                raise ValueError(f"AffineFormat got {name}={dtype}; want float32, bfloat16, float16 or None.")
        if self.eps is not None and not 0 < self.eps < math.inf:
            raise ValueError(f"AffineFormat got eps={self.eps}; want a positive number, or None.")
        if self.domain is ZeroPointDomain.NONE and self.mapping is MappingType.ASYMMETRIC:
            raise ValueError("AffineFormat got an asymmetric mapping without zero points; want domain INT or FLOAT.")

    @property
    def code_dtype(self) -> torch.dtype:
        """int8, or uint8 where codes reach beyond 127."""
        return torch.uint8 if self.quant_max > 127 else torch.int8

    @property
    def has_zero_point(self) -> bool:
        """Whether a zero point must be kept: False where it is zero for every block."""
        if self.domain is ZeroPointDomain.FLOAT:
            return True
        return self.domain is ZeroPointDomain.INT and (self.mapping is MappingType.ASYMMETRIC or self.center != 0)

    @property
    def center(self) -> int:
        """Zero point of the symmetric mappings."""
        return int((self.quant_max + self.quant_min + 1) / 2)

    def parameters(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point of every block of a tensor.

        Args:
            x: [..., K] float32, bfloat16 or float16; K a multiple of the group size.

        Returns:
            `scale` [..., K / group_size] in `scale_dtype`, and `zero_point` of the same shape, int32 or, in domain
            FLOAT, in `scale_dtype`; None where it is zero everywhere.

        Raises:
            ValueError: another dtype, or a K that the group size does not divide.
        """
        blocks = self._blocks(x)
        smallest, largest = blocks.amin(dim=-1), blocks.amax(dim=-1)
        scale, zero_point = self._from_bounds(smallest, largest)
        dtype = self.scale_dtype or x.dtype
        info = torch.finfo(dtype)
        if self.domain is ZeroPointDomain.FLOAT:
            # The zero point is a multiple of the scale, which must therefore stay what it was: any but 0.
            scale, zero_point = scale.to(dtype).clamp(min=info.smallest_normal * info.eps), zero_point.to(dtype)
        else:
            scale = scale.to(dtype).clamp(min=info.smallest_normal)
        # A NaN of an operation is not the same NaN on every processor, and a comparison must not lose it.
        broken = ~(smallest.isfinite() & largest.isfinite() & scale.isfinite() & zero_point.isfinite())
        scale = scale.masked_fill(broken, math.nan)
        if not self.has_zero_point:
            return scale, None
        if self.domain is ZeroPointDomain.FLOAT:
            return scale, zero_point.masked_fill(broken, math.nan)
        return scale, zero_point.masked_fill(broken, 0).to(torch.int32)

    def _from_bounds(self, smallest: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lo, hi = self.quant_min, self.quant_max
        if self.domain is ZeroPointDomain.FLOAT:
            scale = self._at_least_eps(_divide(largest - smallest, hi - lo))
            return scale, smallest + scale * ((hi + lo + 1) / 2)
        zero = torch.zeros_like(smallest)
        # where() and not clamp(): the sign of a zero must not depend on the processor.
        smallest, largest = torch.where(smallest < 0, smallest, zero), torch.where(largest > 0, largest, zero)
        if self.mapping is MappingType.ASYMMETRIC:
            scale = self._at_least_eps(_divide(largest - smallest, hi - lo))
            return scale, (lo - torch.round(smallest / scale)).clamp(lo, hi)
        if self.mapping is MappingType.SYMMETRIC:
            scale = _divide(torch.maximum(-smallest, largest), (hi - lo) / 2)
        else:
            # A side without codes of its own, as above 0 for int1, has no say.
            sides = [_divide(smallest, lo)] * (lo < 0) + [_divide(largest, hi)] * (hi > 0)
            scale = torch.maximum(sides[0], sides[-1])
        return self._at_least_eps(scale), torch.full_like(smallest, self.center)

    def smallest_scale(self, dtype: torch.dtype) -> float:
        """Lower bound of scales before they are stored, where the arithmetic is in this dtype."""
        return torch.tensor(max(self.eps or 0.0, torch.finfo(dtype).smallest_normal), dtype=dtype, device="cpu").item()

    def _at_least_eps(self, scale: torch.Tensor) -> torch.Tensor:
        return scale.clamp(min=self.smallest_scale(scale.dtype))

    def quantize(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, zero_point: torch.Tensor | None = None
    ) -> AffineTensor:
        """Codes of a tensor, with scales of its own or given ones.

        Args:
            x: [..., K] float32, bfloat16 or float16; K a multiple of the group size.
            scale: [..., K / group_size]; default `parameters(x)`.
            zero_point: likewise; None with a given scale means zero.

        Raises:
            ValueError: another dtype, a K that the group size does not divide, or scales of another shape.
        """
        if scale is None:
            scale, zero_point = self.parameters(x)
        # A NaN has no code: the scale carries it.
        codes = torch.nan_to_num(self.steps(x, scale, zero_point), nan=0.0)
        codes = codes.clamp(self.quant_min, self.quant_max).to(self.code_dtype)
        return AffineTensor(codes.reshape(x.shape), scale, zero_point)

    def steps(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
        """Codes before they saturate, [..., blocks, elements of a block], whole numbers in a floating dtype."""
        blocks = self._blocks(x)
        if scale.shape != blocks.shape[:-1] or (zero_point is not None and zero_point.shape != scale.shape):
            given = "None" if zero_point is None else tuple(zero_point.shape)
            raise ValueError(
                f"AffineFormat got x of shape {tuple(x.shape)} with a scale of shape {tuple(scale.shape)} and a zero "
                f"point of {given}; want {tuple(blocks.shape[:-1])}."
            )
        # A scale that is stored in a narrower dtype is still inverted in the wider one.
        scale = scale.to(torch.promote_types(blocks.dtype, scale.dtype)).unsqueeze(-1)
        if self.domain is ZeroPointDomain.FLOAT:
            if zero_point is None:
                raise ValueError(
                    "AffineFormat got a scale without a zero point; want both: in domain FLOAT it is a value."
                )
            middle = scale * ((self.quant_max + self.quant_min + 1) / 2)
            return torch.round((blocks - (zero_point.unsqueeze(-1) - middle)) / scale)
        rounded = torch.round(blocks * (torch.ones_like(scale) / scale))
        return rounded if zero_point is None else rounded + zero_point.unsqueeze(-1)

    def dequantize(self, q: AffineTensor, dtype: torch.dtype) -> torch.Tensor:
        """Values of codes, in a dtype; in domain INT, code minus zero point is exact in all of them."""
        size = q.codes.shape[-1] if self.group_size is None else self.group_size
        compute = self.compute_dtype or dtype
        codes = q.codes.unflatten(-1, (-1, size)).to(compute)
        scale = q.scale.unsqueeze(-1)
        if self.domain is ZeroPointDomain.FLOAT:
            assert q.zero_point is not None
            values = (codes - (self.quant_max + self.quant_min + 1) / 2) * scale + q.zero_point.unsqueeze(-1)
        else:
            values = (codes if q.zero_point is None else codes - q.zero_point.unsqueeze(-1).to(compute)) * scale
        # A conversion of NaN gives another NaN in vectors than one by one.
        return values.to(dtype).masked_fill(scale.isnan(), math.nan).reshape(q.codes.shape)

    def in_range(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
        """Which elements have a code without saturating, bool in the shape of x: where gradients pass straight."""
        steps = self.steps(x, scale, zero_point)
        return ((steps >= self.quant_min) & (steps <= self.quant_max)).reshape(x.shape)

    def _blocks(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in _DTYPES:
            raise ValueError(f"AffineFormat got x of dtype {x.dtype}; want float32, bfloat16 or float16.")
        columns = x.shape[-1] if x.dim() else 1
        size = columns if self.group_size is None else self.group_size
        if x.dim() == 0 or size == 0 or columns % size:
            raise ValueError(
                f"AffineFormat got x of shape {tuple(x.shape)} in groups of {size}; want a last dimension that is a "
                "multiple of the group size: choose a smaller group, or leave this tensor out."
            )
        return x.to(self.compute_dtype or x.dtype).unflatten(-1, (columns // size, size))


def _divide(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """Rounded quotient: torch multiplies by a rounded reciprocal on a GPU when the divisor is a Python number."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def integer_format(
    bits: int,
    *,
    group_size: int | None = None,
    mapping: MappingType = MappingType.SYMMETRIC,
    scale_dtype: torch.dtype | None = None,
    signed: bool = True,
    eps: float | None = None,
) -> AffineFormat:
    """Two's complement (or, unsigned, plain) integers of 1 to 8 bits with the whole range of codes."""
    if not 1 <= bits <= 8:
        raise ValueError(f"integer_format got bits={bits}; want 1 to 8.")
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return AffineFormat(lo, hi, group_size=group_size, mapping=mapping, scale_dtype=scale_dtype, eps=eps)
