"""Base configurations of floating-point weights: float8, MX and NVFP4. See `quantization.configs`.

All of them run everywhere. On hardware without the products, the numbers are those of the codes, multiplied in the
dtype of the input; `kernel_preference`, `mm_config` and `use_triton_kernel` are accepted, and change no number.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from aotrain.nn import KernelPreference, ScaleCalculationMode
from aotrain.quantization.configs import AOBaseConfig, check_version
from aotrain.quantization.enums import Float8PackingFormat
from aotrain.quantization.granularity import Granularity, PerBlock, PerGroup, PerRow, PerTensor

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_TILES = (PerBlock((1, 128)), PerBlock((128, 128)))


class Float8MMConfig(NamedTuple):
    """How float8 products run elsewhere; stored in checkpoints, without effect here.

    Attributes:
        emulate: multiply in high precision.
        use_fast_accum: accumulate in fewer bits.
        pad_inner_dim: pad what the hardware cannot take.
    """

    emulate: bool = False
    use_fast_accum: bool = False
    pad_inner_dim: bool = False


@dataclass
class Float8WeightOnlyConfig(AOBaseConfig):
    """float8 weights; activations as they are.

    Attributes:
        weight_dtype: a float8 dtype.
        set_inductor_config: no effect.
        version: 2.
        granularity: `PerRow()` (None), `PerTensor()` or `PerGroup`.

    Raises:
        ValueError: another dtype, granularity or version.
    """

    weight_dtype: torch.dtype = torch.float8_e4m3fn
    set_inductor_config: bool = True
    version: int = 2
    granularity: Granularity | None = None

    def __post_init__(self) -> None:
        check_version(self, 2)
        _check_float8(self, self.weight_dtype)
        if self.granularity is None:
            self.granularity = PerRow()
        if not isinstance(self.granularity, PerGroup) and self.granularity not in (PerRow(), PerRow(1), PerTensor()):
            raise ValueError(
                f"Float8WeightOnlyConfig got granularity={self.granularity!r}; want PerRow(), PerTensor() or "
                "PerGroup(n)."
            )


@dataclass
class Float8DynamicActivationFloat8WeightConfig(AOBaseConfig):
    """float8 weights, and float8 activations with scales that are made as they come.

    Attributes:
        activation_dtype: a float8 dtype.
        weight_dtype: a float8 dtype.
        granularity: `PerTensor()` (None) or `PerRow()`, of both, or `(PerBlock((1, 128)), PerBlock((128, 128)))`. Kept
            as a list: of activations, of weights.
        packing_format: PLAIN.
        mm_config: None: fast accumulation, except with blocks.
        activation_value_lb: smallest value that the largest magnitude of an activation counts for.
        activation_value_ub: largest such value; larger elements saturate.
        kernel_preference: no effect.
        set_inductor_config: no effect.
        version: 2.
        alg_id: of sparse products; no effect.

    Raises:
        ValueError: another dtype, granularity or version, or bounds that are not in order.
    """

    activation_dtype: torch.dtype = torch.float8_e4m3fn
    weight_dtype: torch.dtype = torch.float8_e4m3fn
    granularity: Granularity | list[Granularity] | tuple[Granularity, Granularity] | None = None
    packing_format: Float8PackingFormat = Float8PackingFormat.PLAIN
    mm_config: Float8MMConfig | None = None
    activation_value_lb: float | None = None
    activation_value_ub: float | None = None
    kernel_preference: KernelPreference = KernelPreference.AUTO
    set_inductor_config: bool = True
    version: int = 2
    alg_id: int = 0

    def __post_init__(self) -> None:
        check_version(self, 2)
        _check_float8(self, self.activation_dtype)
        _check_float8(self, self.weight_dtype)
        pair = _pair(self.granularity)
        if pair not in ((PerTensor(), PerTensor()), (PerRow(), PerRow()), _TILES):
            raise ValueError(
                f"Float8DynamicActivationFloat8WeightConfig got granularity={self.granularity!r}; want PerTensor(), "
                "PerRow(), or (PerBlock((1, 128)), PerBlock((128, 128)))."
            )
        low, high = self.activation_value_lb, self.activation_value_ub
        if (low is not None and low < 0) or (high is not None and high <= (low or 0)):
            raise ValueError(
                f"Float8DynamicActivationFloat8WeightConfig got activation_value_lb={low} and activation_value_ub="
                f"{high}; want 0 <= lb < ub."
            )
        self.granularity = list(pair)
        if self.mm_config is None:
            self.mm_config = Float8MMConfig(use_fast_accum=pair != _TILES)


@dataclass
class Float8DynamicActivationInt4WeightConfig(AOBaseConfig):
    """Symmetric int4 weights in groups of 128, and e4m3 activations with a scale per token.

    Attributes:
        int4_packing_format: "preshuffled" or "plain"; the same numbers.

    Raises:
        ValueError: another format.
    """

    int4_packing_format: str = "preshuffled"

    def __post_init__(self) -> None:
        if self.int4_packing_format not in ("preshuffled", "plain"):
            raise ValueError(
                f"Float8DynamicActivationInt4WeightConfig got int4_packing_format={self.int4_packing_format!r}; want "
                "'preshuffled' or 'plain'."
            )


@dataclass
class MXDynamicActivationMXWeightConfig(AOBaseConfig):
    """Weights and activations in an MX format: blocks of 32 with a power-of-two scale.

    Attributes:
        block_size: 32.
        activation_dtype: float8_e4m3fn, float8_e5m2, or float4_e2m1fn_x2.
        weight_dtype: the same.
        kernel_preference: no effect.
        scaling_mode: how the largest magnitude of a block becomes its scale.

    Raises:
        ValueError: two dtypes, or another one, or another block size.
    """

    block_size: int = 32
    activation_dtype: torch.dtype = torch.float8_e4m3fn
    weight_dtype: torch.dtype = torch.float8_e4m3fn
    kernel_preference: KernelPreference = KernelPreference.AUTO
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL

    def __post_init__(self) -> None:
        dtypes = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2)
        if self.activation_dtype != self.weight_dtype or self.weight_dtype not in dtypes or self.block_size != 32:
            raise ValueError(
                f"MXDynamicActivationMXWeightConfig got {self.activation_dtype} activations and {self.weight_dtype} "
                f"weights in blocks of {self.block_size}; want one of {', '.join(map(str, dtypes))} for both, and 32."
            )


@dataclass
class NVFP4DynamicActivationNVFP4WeightConfig(AOBaseConfig):
    """Weights and activations in NVFP4: e2m1 codes in blocks of 16 with e4m3 scales.

    Attributes:
        use_triton_kernel: no effect.
        use_dynamic_per_tensor_scale: a second scale, of the whole tensor, made as activations come. Set to False by
            `step`.
        step: None; "prepare" and "convert" are those of a calibration of static scales.

    Raises:
        ValueError: an unknown step.
    """

    use_triton_kernel: bool = True
    use_dynamic_per_tensor_scale: bool = True
    step: str | None = None

    def __post_init__(self) -> None:
        if self.step is None:
            return
        self.step = str(getattr(self.step, "value", self.step)).lower()
        if self.step not in ("prepare", "convert"):
            raise ValueError(
                f"NVFP4DynamicActivationNVFP4WeightConfig got step={self.step!r}; want None, 'prepare' or 'convert'."
            )
        self.use_dynamic_per_tensor_scale = False


@dataclass
class NVFP4WeightOnlyConfig(AOBaseConfig):
    """Weights in NVFP4; activations as they are.

    Attributes:
        use_dynamic_per_tensor_scale: a second scale, of the whole tensor.
    """

    use_dynamic_per_tensor_scale: bool = True


def _pair(granularity: Granularity | list[Granularity] | tuple[Granularity, ...] | None) -> tuple[Granularity, ...]:
    if granularity is None:
        return PerTensor(), PerTensor()
    return (granularity, granularity) if isinstance(granularity, Granularity) else tuple(granularity)


def _check_float8(config: AOBaseConfig, dtype: torch.dtype) -> None:
    if dtype not in FLOAT8_DTYPES:
        raise ValueError(
            f"{type(config).__name__} got {dtype}; want a float8 dtype: {', '.join(map(str, FLOAT8_DTYPES))}."
        )
