"""Fake-quantize configurations: what a fake quantizer simulates, under the names that users of this field write.

A configuration gives one `TensorScheme`, and has no arithmetic of its own: the numbers that training sees are those
that conversion stores. Where fields that others accept make no sense together (a symmetric unsigned type without zero
points clips every negative value; a float zero point of a signed type shifts every code), the constructor says so.

| configuration | of |
|---|---|
| `IntxFakeQuantizeConfig` | weights and activations in 1 to 8 bits |
| `Int4WeightFakeQuantizeConfig` | weights of int4 kernels, by what they multiply: bfloat16 or float8 |
| `Float8FakeQuantizeConfig` | weights and activations in float8 |
| `MXFakeQuantizeConfig`, `NVFP4FakeQuantizeConfig` | `qat.mx_config` |
| `SchemeFakeQuantizeConfig` | anything that has a `TensorScheme` |
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch

from aotrain.formats import AffineFormat, MappingType, ZeroPointDomain
from aotrain.quantization.configs import Int4WeightOnlyConfig
from aotrain.quantization.float_configs import (
    FLOAT8_DTYPES,
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
)
from aotrain.quantization.granularity import Granularity, PerAxis, PerGroup, PerRow, PerTensor, PerToken
from aotrain.quantization.scheme_of import scheme_of
from aotrain.quantization.schemes import AffineScheme, Int4Float8Scheme, ScaledScheme, TensorScheme

_INT_BOUNDS = {getattr(torch, f"int{bits}"): (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in range(1, 9)}
_UINT_BOUNDS = {getattr(torch, f"uint{bits}"): (0, 2**bits - 1) for bits in range(1, 9)}
# Codes of every integer dtype of at most 8 bits: (smallest, largest).
INTEGER_BOUNDS = {torch.int8: _INT_BOUNDS[torch.int8], torch.uint8: _UINT_BOUNDS[torch.uint8]} | {
    **_INT_BOUNDS,
    **_UINT_BOUNDS,
}
_PER_ROW = PerRow()
# Type checkers do not know these dtypes of torch.
INT4, UINT4 = (getattr(torch, name) for name in ("int4", "uint4"))
_NAMED_GRANULARITIES = ("per_token", "per_channel", "per_group")


class FakeQuantizeConfigBase(ABC):
    """Base of the fake-quantize configurations."""

    @abstractmethod
    def to_scheme(self) -> TensorScheme:
        """What happens to the tensor."""


@dataclass(frozen=True)
class SchemeFakeQuantizeConfig(FakeQuantizeConfigBase):
    """Fake quantization by a scheme, such as those of `quantization.SCHEMES`.

    Attributes:
        scheme: of one tensor.
    """

    scheme: TensorScheme

    def to_scheme(self) -> TensorScheme:
        return self.scheme


@dataclass(init=False)
class IntxFakeQuantizeConfig(FakeQuantizeConfigBase):
    """Integers of 1 to 8 bits.

    Assigning `group_size` or `is_symmetric` rewrites `granularity` or `mapping_type`.

    Args:
        dtype: torch.int1 to torch.int8, torch.uint1 to torch.uint8.
        granularity: `PerToken()`, `PerAxis(0)`, `PerGroup(n)`, or "per_token", "per_channel", "per_group" (with
            `group_size`). None with a `group_size` is per group.
        mapping_type: SYMMETRIC (default) or ASYMMETRIC.
        scale_precision: dtype of scales and of zero points that are values; None: that of the tensor.
        zero_point_precision: dtype that zero points are stored in; has no influence on the numbers.
        zero_point_domain: INT: a zero point is a code. FLOAT: it is a value (asymmetric unsigned types only). NONE:
            there is none (symmetric signed types only).
        is_dynamic: False: scales are those of the first tensor that was seen.
        range_learning: scales, and zero points where the mapping is asymmetric, are trained. Of weights, in domain INT
            or NONE; see `qat.learned_range`.
        eps: lower bound of a scale; None: the smallest normal number of the tensor's dtype, or 1e-6 in domain FLOAT.
        group_size: elements that share a scale, instead of `granularity`.
        is_symmetric: instead of `mapping_type`.

    Raises:
        ValueError: an unknown dtype, granularity or mapping, two ways to say the same thing, or fields that contradict
            each other.
    """

    dtype: torch.dtype
    granularity: Granularity
    mapping_type: MappingType
    scale_precision: torch.dtype | None
    zero_point_precision: torch.dtype
    zero_point_domain: ZeroPointDomain
    is_dynamic: bool = True
    range_learning: bool = False
    eps: float | None = None

    def __init__(
        self,
        dtype: torch.dtype,
        granularity: Granularity | str | None = None,
        mapping_type: MappingType | None = None,
        scale_precision: torch.dtype | None = torch.float32,
        zero_point_precision: torch.dtype = torch.int32,
        zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
        is_dynamic: bool = True,
        range_learning: bool = False,
        eps: float | None = None,
        *,
        group_size: int | None = None,
        is_symmetric: bool | None = None,
    ) -> None:
        if zero_point_domain is None:
            raise ValueError("Please use ZeroPointDomain.NONE instead of None")
        # Enumerations of others name the sub-byte types too: TorchAODType.INT4 is torch.int4.
        dtype = getattr(torch, str(getattr(dtype, "name", "")).lower(), dtype)
        if dtype not in INTEGER_BOUNDS:
            raise ValueError(f"Unsupported dtype '{dtype}', choose from {list(INTEGER_BOUNDS)}")
        if is_dynamic and range_learning:
            raise ValueError("`is_dynamic` is not compatible with `range_learning`")
        self.dtype = dtype
        self.granularity = _granularity(granularity, group_size)
        self.mapping_type = _mapping_type(mapping_type, is_symmetric)
        self.scale_precision = scale_precision
        self.zero_point_precision = zero_point_precision
        self.zero_point_domain = zero_point_domain
        self.is_dynamic = is_dynamic
        self.range_learning = range_learning
        self.eps = eps
        self.to_scheme()

    @property
    def group_size(self) -> int:
        """Elements that share a scale.

        Raises:
            ValueError: the granularity has no groups.
        """
        if not isinstance(self.granularity, PerGroup):
            raise ValueError(f"`group_size` is undefined for {self.granularity} granularity")
        return self.granularity.group_size

    @property
    def is_symmetric(self) -> bool:
        """Whether the mapping is symmetric."""
        return self.mapping_type is MappingType.SYMMETRIC

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "group_size":
            name, value = "granularity", PerGroup(value)
        elif name == "is_symmetric":
            name, value = "mapping_type", _mapping_type(None, value)
        super().__setattr__(name, value)

    def to_scheme(self) -> AffineScheme:
        """The integers in groups of the last dimension; a channel or a token is one group."""
        self._check()
        lo, hi = INTEGER_BOUNDS[self.dtype]
        is_value = self.zero_point_domain is ZeroPointDomain.FLOAT
        return AffineScheme(
            AffineFormat(
                lo,
                hi,
                group_size=self.granularity.group_size if isinstance(self.granularity, PerGroup) else None,
                mapping=self.mapping_type,
                domain=self.zero_point_domain,
                scale_dtype=self.scale_precision,
                eps=1e-6 if is_value and self.eps is None else self.eps,
            )
        )

    def _check(self) -> None:
        """Fields may have been assigned since: so checked before every use."""
        signed, domain = INTEGER_BOUNDS[self.dtype][0] < 0, self.zero_point_domain
        if domain is ZeroPointDomain.FLOAT and (self.is_symmetric or signed):
            raise ValueError(
                f"IntxFakeQuantizeConfig got zero points that are values for {self.mapping_type.name} {self.dtype}; "
                "want an ASYMMETRIC unsigned type, for which they are defined, or ZeroPointDomain.INT."
            )
        if domain is ZeroPointDomain.NONE and not (self.is_symmetric and signed):
            raise ValueError(
                f"IntxFakeQuantizeConfig got {self.mapping_type.name} {self.dtype} without zero points, which clips "
                "one side of zero; want a SYMMETRIC signed type, or ZeroPointDomain.INT."
            )
        if not self.range_learning:
            return
        if isinstance(self.granularity, PerToken):
            raise ValueError(
                "IntxFakeQuantizeConfig got range_learning per token; tokens of one batch are not those of the next: "
                "want PerAxis(0) or PerGroup(n), of weights."
            )
        if domain is ZeroPointDomain.FLOAT:
            raise ValueError(
                "IntxFakeQuantizeConfig got range_learning with zero points that are values; want ZeroPointDomain.INT."
            )


# The name of a time when there was one kind. The same class, so that either name passes for the other.
FakeQuantizeConfig = IntxFakeQuantizeConfig


@dataclass
class Int4WeightFakeQuantizeConfig(FakeQuantizeConfigBase):
    """int4 weights as the kernels of `Int4WeightOnlyConfig` or `Float8DynamicActivationInt4WeightConfig` have them.

    Attributes:
        group_size: inputs that share a scale.
        activation_dtype: what the weights are multiplied with. torch.bfloat16: asymmetric codes with zero points that
            are values, in float32. torch.float8_e4m3fn: symmetric codes with a scale of amax / 8.

    Raises:
        ValueError: another activation_dtype.
    """

    group_size: int = 128
    activation_dtype: torch.dtype = torch.float8_e4m3fn

    def __post_init__(self) -> None:
        if self.activation_dtype not in (torch.float8_e4m3fn, torch.bfloat16):
            raise ValueError(
                f"Only {torch.float8_e4m3fn} or torch.bfloat16 activation are supported, got {self.activation_dtype}"
            )

    def to_scheme(self) -> TensorScheme:
        """That of the base configuration."""
        if self.activation_dtype == torch.bfloat16:
            return scheme_of(Int4WeightOnlyConfig(self.group_size)).weight
        scheme = scheme_of(Float8DynamicActivationInt4WeightConfig()).weight
        assert isinstance(scheme, Int4Float8Scheme)
        return replace(scheme, group_size=self.group_size)


@dataclass
class Float8FakeQuantizeConfig(FakeQuantizeConfigBase):
    """float8 with a float32 scale per row (per token, per output channel) or per tensor.

    Attributes:
        dtype: a float8 dtype.
        granularity: `PerRow()` or `PerTensor()`.
        hp_value_lb: lower bound of the largest magnitude that a scale is made from.
        hp_value_ub: upper bound of it; what lies above saturates, and has no gradient.

    Raises:
        ValueError: another dtype or granularity.
    """

    dtype: torch.dtype = torch.float8_e4m3fn
    granularity: Granularity = _PER_ROW
    hp_value_lb: float | None = None
    hp_value_ub: float | None = None

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT8_DTYPES:
            raise ValueError(f"{self.dtype} is not a float8 dtype")
        if isinstance(self.granularity, type):
            raise ValueError(
                "Please specify the granularity object instead of the class, e.g. PerRow() instead of PerRow"
            )
        if self.granularity not in (PerRow(), PerTensor()):
            raise ValueError(f"Expected PerRow or PerTensor granularity, got {self.granularity}")
        self.to_scheme()

    def to_scheme(self) -> TensorScheme:
        """That of the base configuration with these fields."""
        base = Float8DynamicActivationFloat8WeightConfig(
            self.dtype,
            self.dtype,
            self.granularity,
            activation_value_lb=self.hp_value_lb,
            activation_value_ub=self.hp_value_ub,
        )
        scheme = scheme_of(base).weight
        assert isinstance(scheme, ScaledScheme)
        return replace(scheme, amax_min=self.hp_value_lb, amax_max=self.hp_value_ub)


def _granularity(granularity: Granularity | str | None, group_size: int | None) -> Granularity:
    if group_size is not None:
        if granularity not in ("per_group", None):
            raise ValueError(f"`group_size` conflicts with granularity '{granularity}'")
        return PerGroup(group_size)
    match granularity:
        case None:
            raise ValueError("At least one of `granularity` or `group_size` must be set")
        case "per_token":
            return PerToken()
        case "per_channel":
            return PerAxis(0)
        case "per_group":
            raise ValueError("Granularity was 'per_group' but no `group_size` was set")
        case str():
            raise ValueError(f"Unexpected granularity: '{granularity}', must be one of {list(_NAMED_GRANULARITIES)}")
        case PerAxis(axis) if axis != 0:
            raise ValueError("Only axis=0 is supported for PerAxis granularity")
        case PerToken() | PerAxis() | PerGroup():
            return granularity
        case Granularity():
            raise ValueError(f"Granularity '{granularity}' is not supported")
    raise ValueError(f"Granularity '{granularity}' has unexpected type {type(granularity)}")


def _mapping_type(mapping_type: MappingType | None, is_symmetric: bool | None) -> MappingType:
    if mapping_type is None:
        return MappingType.ASYMMETRIC if is_symmetric is False else MappingType.SYMMETRIC
    if is_symmetric is not None:
        raise ValueError("Cannot set both `mapping_type` and `is_symmetric`")
    if mapping_type not in (MappingType.SYMMETRIC, MappingType.ASYMMETRIC):
        raise ValueError(f"MappingType '{mapping_type}' is not supported")
    return mapping_type
