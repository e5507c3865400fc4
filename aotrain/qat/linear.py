"""Linear layers that train through quantization: `nn.Linear` with fake quantizers of input and weight.

    output[..., N] = fq(input)[..., K] @ fq(weight)[N, K].T + bias

Parameters are those of the layer that was prepared, the very objects, under the same names. Without learned ranges the
product is one operation that keeps input and weight for backward and nothing else (`ops.fake_quantize`).

`MXFakeQuantizedLinear` and `NVFP4FakeQuantizedLinear` are the same layer with configurations of these formats for both
operands. Their products, in both directions, are of the dequantized tensors, which is what native products round to.
"""

from typing import Any, Self

import torch

from aotrain.formats import ZeroPointDomain
from aotrain.nn.float8_linear import clone_as
from aotrain.ops.fake_quantize import fake_quantized_linear
from aotrain.qat.embedding import int4_group_config
from aotrain.qat.fake_quantizer import FakeQuantizerBase, is_row_local, refuse_late_range
from aotrain.qat.mx_config import MXFakeQuantizeConfig, NVFP4FakeQuantizeConfig
from aotrain.qat.tensor_config import UINT4, FakeQuantizeConfigBase, IntxFakeQuantizeConfig
from aotrain.quantization.granularity import PerGroup


class FakeQuantizedLinear(torch.nn.Linear):
    """Linear layer with fake quantization.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one; unlike `nn.Linear`, not by default.
        activation_config: of the input; None: left as it is.
        weight_config: of the weight; None: left as it is.
        *args: further positional arguments of `nn.Linear`: device, dtype.
        **kwargs: further keyword arguments of `nn.Linear`.

    Attributes:
        activation_fake_quantizer: module or None.
        weight_fake_quantizer: module or None.

    Raises:
        ValueError: a scheme that cannot take a layer of this size.
    """

    activation_fake_quantizer: FakeQuantizerBase | None
    weight_fake_quantizer: FakeQuantizerBase | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        activation_config: FakeQuantizeConfigBase | None = None,
        weight_config: FakeQuantizeConfigBase | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, *args, **kwargs)
        self._set_fake_quantizers(activation_config, weight_config)

    @classmethod
    def from_linear(
        cls,
        mod: torch.nn.Linear,
        activation_config: FakeQuantizeConfigBase | None = None,
        weight_config: FakeQuantizeConfigBase | None = None,
    ) -> Self:
        """A layer with the same Parameter objects, hooks, buffers and training flag as `mod`."""
        new = clone_as(mod, cls)
        new._set_fake_quantizers(activation_config, weight_config)
        return new

    def to_linear(self) -> torch.nn.Linear:
        """The plain layer with the same Parameter objects, in high precision."""
        new = clone_as(self, torch.nn.Linear)
        for name in ("activation_fake_quantizer", "weight_fake_quantizer"):
            for contents in (new._modules, new.__dict__):  # None is a plain attribute
                contents.pop(name, None)
        return new

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        if hasattr(self.weight, "device_mesh"):  # a DTensor
            from aotrain.qat.sharded_linear import sharded_linear

            return sharded_linear(self, input)
        if not self.can_fuse():
            activation = self.activation_fake_quantizer
            input = input if activation is None else activation(input)
            return torch.nn.functional.linear(input, self._fake_quantized_weight(), self.bias)
        return self.product(input, self.weight, self.bias)

    def can_fuse(self) -> bool:
        """Whether the fake quantizers do nothing but their arithmetic, so that `product` is all of forward."""
        return _can_fuse(self.activation_fake_quantizer) and _can_fuse(self.weight_fake_quantizer)

    def product(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer with other tensors in the place of its parameters, such as parts of them.

        Args:
            input: [..., K].
            weight: [N, K].
            bias: [N], or None.
        """
        activation, quantizer = self.activation_fake_quantizer, self.weight_fake_quantizer
        # A scale of all tokens is of all of them, whatever the leading dimensions.
        is_flat = activation is None or is_row_local(activation.scheme) or input.dim() <= 2
        x = input if is_flat else input.flatten(0, -2)
        x_arithmetic = None if activation is None else activation.arithmetic(x)
        w_arithmetic = None if quantizer is None else quantizer.arithmetic(weight)
        if x_arithmetic is None and w_arithmetic is None:
            return torch.nn.functional.linear(input, weight, bias)
        output = fake_quantized_linear(x, weight, bias, x_arithmetic, w_arithmetic)
        return output if is_flat else output.unflatten(0, input.shape[:-1])

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Turn the fake quantizers on or off."""
        for quantizer in (self.activation_fake_quantizer, self.weight_fake_quantizer):
            if quantizer is not None:
                quantizer.enabled = enabled

    def disable_fake_quant(self) -> None:
        """Turn the fake quantizers off."""
        self.enable_fake_quant(False)

    def _fake_quantized_weight(self) -> torch.Tensor:
        return self.weight if self.weight_fake_quantizer is None else self.weight_fake_quantizer(self.weight)

    def _load_from_state_dict(  # pyrefly: ignore[bad-override]
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        refuse_late_range(self.weight, self.weight_fake_quantizer, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _set_fake_quantizers(
        self, activation_config: FakeQuantizeConfigBase | None, weight_config: FakeQuantizeConfigBase | None
    ) -> None:
        for config in (activation_config, weight_config):
            _check_group_size(self.in_features, config)
        self.activation_fake_quantizer = _fake_quantizer(activation_config)
        self.weight_fake_quantizer = _fake_quantizer(weight_config)
        if self.weight_fake_quantizer is not None:
            problem = self.weight_fake_quantizer.scheme.problem((self.out_features, self.in_features))
            if problem is not None:
                raise ValueError(f"{type(self).__name__} got a weight that its scheme cannot take: {problem}.")


class _BlockFormatLinear(FakeQuantizedLinear):
    """A layer whose input and weight have one kind of configuration, both given."""

    config_type: type[FakeQuantizeConfigBase]

    def _set_fake_quantizers(
        self, activation_config: FakeQuantizeConfigBase | None, weight_config: FakeQuantizeConfigBase | None
    ) -> None:
        for name, config in (("activation_config", activation_config), ("weight_config", weight_config)):
            if not isinstance(config, self.config_type):
                raise ValueError(
                    f"{type(self).__name__} got {name}={config!r}; want {self.config_type.__name__} for both input and "
                    "weight."
                )
        super()._set_fake_quantizers(activation_config, weight_config)

    @property
    def activation_config(self) -> FakeQuantizeConfigBase:
        """Of the input."""
        assert self.activation_fake_quantizer is not None
        return self.activation_fake_quantizer.config

    @property
    def weight_config(self) -> FakeQuantizeConfigBase:
        """Of the weight."""
        assert self.weight_fake_quantizer is not None
        return self.weight_fake_quantizer.config


class MXFakeQuantizedLinear(_BlockFormatLinear):
    """`FakeQuantizedLinear` with `MXFakeQuantizeConfig`s."""

    config_type = MXFakeQuantizeConfig


class NVFP4FakeQuantizedLinear(_BlockFormatLinear):
    """`FakeQuantizedLinear` with `NVFP4FakeQuantizeConfig`s."""

    config_type = NVFP4FakeQuantizeConfig


class Int8DynActInt4WeightQATLinear(FakeQuantizedLinear):
    """int4 weights in groups and asymmetric int8 inputs per token: what `Int8DynActInt4WeightQATQuantizer` makes.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        device: of the parameters.
        groupsize: inputs that share a scale of the weight.
        precision: dtype of the parameters.
        scales_precision: dtype of the weight's scales.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | None = None,
        groupsize: int = 256,
        precision: torch.dtype = torch.float32,
        scales_precision: torch.dtype = torch.float32,
    ) -> None:
        configs = int8_token_config(), int4_group_config(groupsize, scales_precision, scales_precision)
        super().__init__(in_features, out_features, bias, *configs, device=device, dtype=precision)


class Int4WeightOnlyQATLinear(FakeQuantizedLinear):
    """Weights of 4 bits with zero points that are values, in groups: what `Int4WeightOnlyQATQuantizer` makes.

    Args:
        in_features: K.
        out_features: N.
        bias: False.
        device: of the weight.
        groupsize: inputs that share a scale.
        inner_k_tiles: of a kernel's layout; no effect.
        precision: dtype of the weight.
        scales_precision: torch.bfloat16.

    Raises:
        ValueError: a bias, or another scales_precision.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | None = None,
        groupsize: int = 256,
        inner_k_tiles: int = 8,
        precision: torch.dtype = torch.bfloat16,
        scales_precision: torch.dtype = torch.bfloat16,
    ) -> None:
        if bias or scales_precision != torch.bfloat16:
            raise ValueError(
                f"Int4WeightOnlyQATLinear got bias={bias} and scales_precision={scales_precision}; want no bias and "
                "torch.bfloat16: the kernel that it stands for has no other."
            )
        config = uint4_group_config(groupsize, scales_precision)
        super().__init__(in_features, out_features, False, None, config, device=device, dtype=precision)


def int8_token_config() -> IntxFakeQuantizeConfig:
    """Asymmetric int8 per token, in float32."""
    return IntxFakeQuantizeConfig(
        torch.int8,
        "per_token",
        is_symmetric=False,
        scale_precision=torch.float32,
        zero_point_precision=torch.float32,
        eps=torch.finfo(torch.float32).eps,
    )


def uint4_group_config(group_size: int, precision: torch.dtype) -> IntxFakeQuantizeConfig:
    """4 bits in groups, with zero points that are values."""
    return IntxFakeQuantizeConfig(
        UINT4,
        group_size=group_size,
        is_symmetric=False,
        scale_precision=precision,
        zero_point_precision=precision,
        zero_point_domain=ZeroPointDomain.FLOAT,
    )


def enable_linear_fake_quant(mod: torch.nn.Module, enabled: bool = True) -> None:
    """Turn the fake quantizers of a `FakeQuantizedLinear` on or off; other modules are left alone.

    For `model.apply`.
    """
    if isinstance(mod, FakeQuantizedLinear):
        mod.enable_fake_quant(enabled)


def disable_linear_fake_quant(mod: torch.nn.Module) -> None:
    """`enable_linear_fake_quant(mod, enabled=False)`."""
    enable_linear_fake_quant(mod, enabled=False)


def enable_8da4w_fake_quant(mod: torch.nn.Module) -> None:
    """Turn an `Int8DynActInt4WeightQATLinear` on; other modules are left alone. For `model.apply`, as are the next."""
    _enable(mod, Int8DynActInt4WeightQATLinear, True)


def disable_8da4w_fake_quant(mod: torch.nn.Module) -> None:
    """Turn an `Int8DynActInt4WeightQATLinear` off."""
    _enable(mod, Int8DynActInt4WeightQATLinear, False)


def enable_4w_fake_quant(mod: torch.nn.Module) -> None:
    """Turn an `Int4WeightOnlyQATLinear` on."""
    _enable(mod, Int4WeightOnlyQATLinear, True)


def disable_4w_fake_quant(mod: torch.nn.Module) -> None:
    """Turn an `Int4WeightOnlyQATLinear` off."""
    _enable(mod, Int4WeightOnlyQATLinear, False)


def _enable(mod: torch.nn.Module, cls: type[FakeQuantizedLinear], enabled: bool) -> None:
    if isinstance(mod, cls):
        mod.enable_fake_quant(enabled)


def _fake_quantizer(config: FakeQuantizeConfigBase | None) -> FakeQuantizerBase | None:
    return None if config is None else FakeQuantizerBase.from_config(config)


def _can_fuse(quantizer: torch.nn.Module | None) -> bool:
    """Whether the module does nothing but its arithmetic: consumers put hooks on it, or another module in its place."""
    if quantizer is None:
        return True
    return (
        isinstance(quantizer, FakeQuantizerBase)
        and not (quantizer.is_learned and quantizer.enabled)
        and not (quantizer._forward_hooks or quantizer._forward_pre_hooks)
    )


def _check_group_size(in_features: int, config: FakeQuantizeConfigBase | None) -> None:
    if not (isinstance(config, IntxFakeQuantizeConfig) and isinstance(config.granularity, PerGroup)):
        return
    if in_features % config.group_size:
        raise ValueError(f"in_features ({in_features}) % group_size ({config.group_size}) must be == 0")
