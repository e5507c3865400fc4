"""Fake-quantize configurations of MX formats and NVFP4, of weights and activations alike."""

from dataclasses import dataclass

import torch

from aotrain.nn import KernelPreference, ScaleCalculationMode
from aotrain.qat.tensor_config import FakeQuantizeConfigBase
from aotrain.quantization.float_configs import (
    MXDynamicActivationMXWeightConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
)
from aotrain.quantization.scheme_of import scheme_of
from aotrain.quantization.schemes import TensorScheme


@dataclass
class MXFakeQuantizeConfig(FakeQuantizeConfigBase):
    """Blocks of 32 along a row with a power-of-two scale.

    Attributes:
        dtype: torch.float4_e2m1fn_x2, torch.float8_e4m3fn or torch.float8_e5m2.
        block_size: 32.
        scaling_mode: how the largest magnitude of a block becomes its scale.
        kernel_preference: no effect: products are of the dequantized tensors everywhere.

    Raises:
        ValueError: another dtype or block size.
    """

    dtype: torch.dtype = torch.float4_e2m1fn_x2
    block_size: int = 32
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL
    kernel_preference: KernelPreference = KernelPreference.EMULATED

    def __post_init__(self) -> None:
        self._base()

    def to_scheme(self) -> TensorScheme:
        """That of the weights of the base configuration with these fields."""
        return scheme_of(self._base()).weight

    def _base(self) -> MXDynamicActivationMXWeightConfig:
        return MXDynamicActivationMXWeightConfig(
            block_size=self.block_size,
            activation_dtype=self.dtype,
            weight_dtype=self.dtype,
            scaling_mode=self.scaling_mode,
        )


@dataclass
class NVFP4FakeQuantizeConfig(FakeQuantizeConfigBase):
    """e2m1 codes in blocks of 16 along a row with e4m3 scales.

    Attributes:
        use_per_tensor_scale: a second scale, of the whole tensor.
        use_swizzled_scales: a layout of scales; no effect.
        use_triton_kernel: no effect.
    """

    use_per_tensor_scale: bool = True
    use_swizzled_scales: bool = False
    use_triton_kernel: bool = False

    def to_scheme(self) -> TensorScheme:
        """That of the weights of the base configuration with these fields."""
        base = NVFP4DynamicActivationNVFP4WeightConfig(use_dynamic_per_tensor_scale=self.use_per_tensor_scale)
        return scheme_of(base).weight
