"""Base configurations of integer weights, with the fields, order and defaults that users and checkpoints know.

A base configuration says what the quantized model is. `quantize_(model, config)` makes it, `QATConfig(config)` trains
towards it, `config_to_dict` writes it as the JSON that checkpoints on the Hugging Face hub hold. What it means for the
numbers is one object, `scheme_of(config)`; configurations have no arithmetic of their own. Those of floating-point
formats are in `quantization.float_configs`.

`set_inductor_config` is accepted and has no effect: converting a model changes no setting of the process. Packing
formats are layouts of somebody's kernels (`quantization.enums`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from aotrain.formats import MappingType
from aotrain.quantization.enums import (
    Int4ChooseQParamsAlgorithm,
    Int4PackingFormat,
    IntxChooseQParamsAlgorithm,
    IntxPackingFormat,
)
from aotrain.quantization.granularity import Granularity, PerAxis, PerGroup, PerRow, PerTensor

_PER_CHANNEL, _PER_ROW, _GROUPS_OF_32 = PerAxis(0), PerRow(), PerGroup(32)
INT_DTYPES = tuple(getattr(torch, f"int{bits}") for bits in range(1, 9))


class AOBaseConfig:
    """Base of what `quantize_` takes. Subclasses are dataclasses.

    Attributes:
        version: of the fields and their meaning; stored with the configuration.
    """

    version: int = 1


@dataclass
class Int4WeightOnlyConfig(AOBaseConfig):
    """Asymmetric int4 weights in groups, with zero points that are values; activations as they are.

    Attributes:
        group_size: inputs that share a scale. Layers whose in_features it does not divide are left alone.
        set_inductor_config: no effect.
        int4_packing_format: PLAIN and PRESHUFFLED compute in float32, TILE_PACKED_TO_4D in the dtype of the weight.
        int4_choose_qparams_algorithm: TINYGEMM.
        int4_tile_packed_ntile: 8 or 16; no effect.
        version: 2.

    Raises:
        ValueError: another version or ntile, or HQQ with a packing format that has none.
    """

    group_size: int = 128
    set_inductor_config: bool = True
    int4_packing_format: Int4PackingFormat = Int4PackingFormat.PLAIN
    int4_choose_qparams_algorithm: Int4ChooseQParamsAlgorithm = Int4ChooseQParamsAlgorithm.TINYGEMM
    int4_tile_packed_ntile: int = 8
    version: int = 2

    def __post_init__(self) -> None:
        check_version(self, 2)
        _check_group_size(self, self.group_size)
        self.int4_packing_format = Int4PackingFormat(self.int4_packing_format)
        self.int4_choose_qparams_algorithm = Int4ChooseQParamsAlgorithm(self.int4_choose_qparams_algorithm)
        if self.int4_tile_packed_ntile not in (8, 16):
            raise ValueError(
                f"Int4WeightOnlyConfig got int4_tile_packed_ntile={self.int4_tile_packed_ntile}; want 8 or 16."
            )
        hqq = self.int4_choose_qparams_algorithm is Int4ChooseQParamsAlgorithm.HQQ
        if hqq and self.int4_packing_format is not Int4PackingFormat.TILE_PACKED_TO_4D:
            raise ValueError(
                f"Int4WeightOnlyConfig got HQQ with {self.int4_packing_format.name}; want TINYGEMM, or HQQ with "
                "TILE_PACKED_TO_4D."
            )


@dataclass
class IntxWeightOnlyConfig(AOBaseConfig):
    """int1 to int8 weights; activations as they are. For linear layers and embeddings.

    Attributes:
        weight_dtype: torch.int1 to torch.int8.
        granularity: `PerAxis(0)` or `PerGroup`.
        mapping_type: how values are laid onto codes.
        scale_dtype: dtype of the scales; None: that of the weight.
        intx_packing_format: UNPACKED_TO_INT8.
        intx_choose_qparams_algorithm: AFFINE.
        version: 2.

    Raises:
        ValueError: another dtype, granularity or version.
    """

    weight_dtype: torch.dtype = torch.int8
    granularity: Granularity = _PER_CHANNEL
    mapping_type: MappingType = MappingType.SYMMETRIC
    scale_dtype: torch.dtype | None = None
    intx_packing_format: IntxPackingFormat = IntxPackingFormat.UNPACKED_TO_INT8
    intx_choose_qparams_algorithm: IntxChooseQParamsAlgorithm = IntxChooseQParamsAlgorithm.AFFINE
    version: int = 2

    def __post_init__(self) -> None:
        check_version(self, 2)
        _check_intx(self, self.weight_dtype, self.granularity)


@dataclass
class Int8DynamicActivationIntxWeightConfig(AOBaseConfig):
    """int1 to int8 weights, and int8 activations with scales per token that are made as they come.

    Attributes:
        weight_dtype: torch.int1 to torch.int8.
        weight_granularity: `PerAxis(0)` or `PerGroup`.
        weight_mapping_type: how weights are laid onto codes.
        weight_scale_dtype: dtype of the weights' scales; None: that of the weight.
        act_mapping_type: ASYMMETRIC or SYMMETRIC.
        intx_packing_format: UNPACKED_TO_INT8.
        intx_choose_qparams_algorithm: AFFINE.
        version: 2.

    Raises:
        ValueError: another dtype, granularity, mapping of activations or version.
    """

    weight_dtype: torch.dtype = torch.int8
    weight_granularity: Granularity = _GROUPS_OF_32
    weight_mapping_type: MappingType = MappingType.SYMMETRIC
    weight_scale_dtype: torch.dtype | None = None
    act_mapping_type: MappingType = MappingType.ASYMMETRIC
    intx_packing_format: IntxPackingFormat = IntxPackingFormat.UNPACKED_TO_INT8
    intx_choose_qparams_algorithm: IntxChooseQParamsAlgorithm = IntxChooseQParamsAlgorithm.AFFINE
    version: int = 2

    def __post_init__(self) -> None:
        check_version(self, 2)
        _check_intx(self, self.weight_dtype, self.weight_granularity)
        _check_activation_mapping(self, self.act_mapping_type)


@dataclass
class Int8DynamicActivationInt4WeightConfig(AOBaseConfig):
    """int4 weights in groups and int8 activations per token ("8da4w"), as older code spells it.

    The same numbers as `Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(group_size))`.

    Attributes:
        group_size: inputs that share a scale.
        layout: None.
        mapping_type: how weights are laid onto codes.
        act_mapping_type: ASYMMETRIC or SYMMETRIC.
        set_inductor_config: no effect.

    Raises:
        ValueError: a layout, or another mapping of activations.
    """

    group_size: int = 32
    layout: Any = None
    mapping_type: MappingType = MappingType.SYMMETRIC
    act_mapping_type: MappingType = MappingType.ASYMMETRIC
    set_inductor_config: bool = True

    def __post_init__(self) -> None:
        _check_group_size(self, self.group_size)
        if self.layout is not None:
            raise ValueError(f"{type(self).__name__} got layout={self.layout!r}; there is one layout: leave it out.")
        _check_activation_mapping(self, self.act_mapping_type)


@dataclass
class Int8WeightOnlyConfig(AOBaseConfig):
    """Symmetric int8 weights; activations as they are.

    Attributes:
        group_size: None; `granularity` has taken its place.
        granularity: `PerRow()` (per output channel), `PerTensor()` or `PerGroup`.
        set_inductor_config: no effect.
        version: 2.

    Raises:
        ValueError: a group_size, or another granularity or version.
    """

    group_size: int | None = None
    granularity: Granularity = _PER_ROW
    set_inductor_config: bool = True
    version: int = 2

    def __post_init__(self) -> None:
        check_version(self, 2)
        if self.group_size is not None:
            raise ValueError(
                f"Int8WeightOnlyConfig got group_size={self.group_size}; want granularity=PerGroup({self.group_size})."
            )
        if self.granularity not in (PerRow(), PerRow(1), PerTensor()) and not isinstance(self.granularity, PerGroup):
            raise ValueError(
                f"Int8WeightOnlyConfig got granularity={self.granularity!r}; want PerRow(), PerTensor() or PerGroup(n)."
            )


@dataclass
class Int8DynamicActivationInt8WeightConfig(AOBaseConfig):
    """Symmetric int8 weights, and int8 activations with scales that are made as they come.

    Attributes:
        act_mapping_type: SYMMETRIC or ASYMMETRIC.
        weight_only_decode: False.
        granularity: `PerRow()` or `PerTensor()`, of both, or a pair (of activations, of weights).
        set_inductor_config: no effect.
        version: 2.
        reduce_range: codes of 7 bits, for old CPUs whose int8 products saturate.

    Raises:
        ValueError: another granularity, mapping or version, or weight_only_decode.
    """

    act_mapping_type: MappingType = MappingType.SYMMETRIC
    weight_only_decode: bool = False
    granularity: Granularity | tuple[Granularity, Granularity] | list[Granularity] | None = _PER_ROW
    set_inductor_config: bool = True
    version: int = 2
    reduce_range: bool = False

    # What a weight or an activation may have.
    _GRANULARITIES: ClassVar = (PerRow(), PerTensor())

    def __post_init__(self) -> None:
        check_version(self, 2)
        _check_activation_mapping(self, self.act_mapping_type)
        if self.weight_only_decode:
            raise ValueError(
                "Int8DynamicActivationInt8WeightConfig got weight_only_decode=True, which has no meaning any more; "
                "leave it out, or use Int8WeightOnlyConfig."
            )
        activation, weight = self.granularities
        if activation not in self._GRANULARITIES or weight not in (*self._GRANULARITIES, PerRow(1)):
            raise ValueError(
                f"Int8DynamicActivationInt8WeightConfig got granularity={self.granularity!r}; want PerRow(), "
                "PerTensor(), or a pair of them."
            )

    @property
    def granularities(self) -> tuple[Granularity, Granularity]:
        """Those of activations and of weights."""
        if self.granularity is None:
            return PerRow(), PerRow()
        if isinstance(self.granularity, Granularity):
            return self.granularity, self.granularity
        activation, weight = self.granularity
        return activation, weight


def check_version(config: AOBaseConfig, version: int) -> None:
    if config.version != version:
        raise ValueError(
            f"{type(config).__name__} got version={config.version}; want {version}: older fields had another meaning, "
            "write the configuration anew."
        )


def _check_group_size(config: AOBaseConfig, group_size: int) -> None:
    if group_size < 1:
        raise ValueError(f"{type(config).__name__} got group_size={group_size}; want at least 1.")


def _check_intx(config: AOBaseConfig, dtype: torch.dtype, granularity: Granularity) -> None:
    if dtype not in INT_DTYPES:
        raise ValueError(f"{type(config).__name__} got weight_dtype={dtype}; want torch.int1 to torch.int8.")
    if granularity != PerAxis(0) and not isinstance(granularity, PerGroup):
        raise ValueError(f"{type(config).__name__} got {granularity!r}; want PerAxis(0) or PerGroup(n).")
    if isinstance(granularity, PerGroup):
        _check_group_size(config, granularity.group_size)


def _check_activation_mapping(config: AOBaseConfig, mapping: MappingType) -> None:
    if mapping not in (MappingType.SYMMETRIC, MappingType.ASYMMETRIC):
        raise ValueError(f"{type(config).__name__} got act_mapping_type={mapping}; want SYMMETRIC or ASYMMETRIC.")
