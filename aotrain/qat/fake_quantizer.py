"""Fake quantizers: modules, callable on their own, that replace a tensor by the values of its codes.

A fake quantizer holds a configuration and the `TensorScheme` that it gives. `enabled = False` makes it the identity;
`mix` below 1 gives `x + mix * (values - x)`, of which the gradient is that mixture too: 1 where an element has a code,
`1 - mix` where it saturates. Gradients of float formats pass straight, in the dtype that they come in. There are no
parameters and no buffers, so the keys of a state_dict are those of the layer, unless ranges are learned.

| class | scales |
|---|---|
| `IntxFakeQuantizer` | dynamic; of the first tensor (`is_dynamic=False`); or learned (`range_learning=True`) |
| the others | dynamic |
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from aotrain.formats import AffineFormat, AffineTensor
from aotrain.ops.fake_quantize import FakeQuantizer as Arithmetic
from aotrain.ops.fake_quantize import fake_quantize
from aotrain.qat.learned_range import SCALE_MIN, effective_range, fake_quantize_learned
from aotrain.qat.tensor_config import (
    FakeQuantizeConfigBase,
    Float8FakeQuantizeConfig,
    Int4WeightFakeQuantizeConfig,
    IntxFakeQuantizeConfig,
    SchemeFakeQuantizeConfig,
)
from aotrain.quantization.schemes import AffineScheme, Int4Float8Scheme, Q40Scheme, ScaledScheme, TensorScheme


class FakeQuantizerBase(torch.nn.Module):
    """Fake quantization of one tensor.

    Args:
        config: what to simulate.

    Attributes:
        config: the argument. Assigning to its fields later has no effect.
        scheme: what it gave.
        enabled: False: forward is the identity.
        mix: share of the quantized values, from 0 to 1.
    """

    def __init__(self, config: FakeQuantizeConfigBase) -> None:
        super().__init__()
        self.config = config
        self.scheme: TensorScheme = config.to_scheme()
        self.enabled = True
        self.mix = 1.0

    @staticmethod
    def from_config(config: FakeQuantizeConfigBase) -> "FakeQuantizerBase":
        """The fake quantizer of a configuration.

        Raises:
            ValueError: not a fake-quantize configuration.
        """
        if not isinstance(config, FakeQuantizeConfigBase):
            raise ValueError(f"Unknown config type: {config!r}; want a fake-quantize configuration.")
        for kind, cls in _CLASSES.items():
            if isinstance(config, kind):
                return cls(config)
        return FakeQuantizerBase(config)

    @property
    def is_learned(self) -> bool:
        """Whether scales are parameters, which `arithmetic` has no gradient for: call the module."""
        return False

    @property
    def is_dynamic(self) -> bool:
        """Whether scales are those of the tensor at hand."""
        return True

    def arithmetic(self, x: torch.Tensor) -> Arithmetic | None:
        """What would happen to x now, for operations that fuse it; None: nothing.

        Raises:
            ValueError: a DTensor.
        """
        _check_plain(x)
        if not self.enabled or self.mix == 0:
            return None
        arithmetic = self._arithmetic(x)
        return arithmetic if self.mix == 1 else _Mixed(arithmetic, self.mix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Values of x's codes, in its shape [..., K] and dtype; leading dimensions are rows of one matrix."""
        arithmetic = self.arithmetic(x)
        if arithmetic is None:
            return x
        if x.dim() == 2 or is_row_local(self.scheme):
            return fake_quantize(x, arithmetic)
        return fake_quantize(x.reshape(-1, x.shape[-1]), arithmetic).view(x.shape)

    def encode_arguments(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """Scales that `scheme.encode(x, ...)` must be given for the codes of forward; empty when they are x's own."""
        return {}

    def __repr__(self) -> str:
        return f"FakeQuantizer({self.config})"

    def _arithmetic(self, x: torch.Tensor) -> Arithmetic:
        return self.scheme


class Float8FakeQuantizer(FakeQuantizerBase):
    """Fake quantization to float8."""


class Int4WeightFakeQuantizer(FakeQuantizerBase):
    """Fake quantization of weights as int4 kernels have them."""


class IntxFakeQuantizer(FakeQuantizerBase):
    """Fake quantization to integers of 1 to 8 bits.

    Attributes:
        scale: None while scales are dynamic; else [..., K / group_size], a Parameter when it is learned.
        zero_point: likewise; None where it is zero. A Parameter when it is learned, in a floating dtype: that of the
            configuration's `zero_point_precision` if it is one, else float32.
    """

    config: IntxFakeQuantizeConfig  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(self, config: IntxFakeQuantizeConfig) -> None:
        super().__init__(config)
        self.scale: torch.Tensor | None = None
        self.zero_point: torch.Tensor | None = None
        self._initialized = False

    @property
    def is_learned(self) -> bool:
        return self.config.range_learning

    @property
    def is_dynamic(self) -> bool:
        return self.config.is_dynamic

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.is_learned and self.enabled):
            return super().forward(x)
        _check_plain(x)
        self._start_learning(x)
        assert self.scale is not None
        values = fake_quantize_learned(x, self.scale, self.zero_point, self._format)
        return values if self.mix == 1 else torch.lerp(x, values, self.mix)

    def encode_arguments(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
        if self.scale is None:
            return {}
        if not self.is_learned:
            return {"scale": self.scale, "zero_point": self.zero_point}
        scale, zero_point = effective_range(self._format, self.scale, self.zero_point)
        return {"scale": scale, "zero_point": zero_point}

    @property
    def _format(self) -> AffineFormat:
        return self.scheme.format  # pyrefly: ignore[missing-attribute]  an AffineScheme

    def _arithmetic(self, x: torch.Tensor) -> Arithmetic:
        if self.config.is_dynamic:
            return self.scheme
        if self.scale is None:
            self.scale, self.zero_point = self._format.parameters(x.detach())
        return _Fixed(self._format, self.scale, self.zero_point)

    def _start_learning(self, x: torch.Tensor) -> None:
        if self.scale is not None:
            return
        if not self._initialized:
            raise ValueError(
                "Scales and zero points must be initialized for range learning. Please call "
                "`aotrain.qat.initialize_fake_quantizers` before initializing the optimizer and beginning training."
            )
        scale, zero_point = self._format.parameters(x.detach())
        self._set_range(scale.clamp(min=SCALE_MIN), zero_point)

    def _set_range(self, scale: torch.Tensor, zero_point: torch.Tensor | None) -> None:
        self.scale = torch.nn.Parameter(scale)
        if zero_point is None or self.config.is_symmetric:
            self.zero_point = zero_point
            return
        precision = self.config.zero_point_precision
        self.zero_point = torch.nn.Parameter(zero_point.to(precision if precision.is_floating_point else torch.float32))

    def _load_from_state_dict(  # pyrefly: ignore[bad-override]
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        scale = state_dict.get(f"{prefix}scale")
        if self.is_learned and self.scale is None and scale is not None:  # a checkpoint is an initialization
            # Those of symmetric mappings are the same for any tensor, and not in the checkpoint.
            _, zero_point = replace(self._format, group_size=1).parameters(torch.zeros_like(scale))
            self._set_range(scale.clone(), zero_point)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in ("scale", "zero_point"):  # plain tensors move with the module
            tensor = self.__dict__.get(name)
            if isinstance(tensor, torch.Tensor):
                setattr(self, name, fn(tensor))
        return self


_CLASSES: dict[type, type[FakeQuantizerBase]] = {
    IntxFakeQuantizeConfig: IntxFakeQuantizer,
    Float8FakeQuantizeConfig: Float8FakeQuantizer,
    Int4WeightFakeQuantizeConfig: Int4WeightFakeQuantizer,
}
# The name of a time when there was one kind.
FakeQuantizer = IntxFakeQuantizer
_RANGE_BEFORE_SHARDING = (
    "its scales would be parameters that FSDP does not know, and whose gradients stay apart on every rank. Call "
    "initialize_fake_quantizers, or load a checkpoint with scales, before fully_shard."
)


def fake_quantizer_of(scheme: TensorScheme | None) -> FakeQuantizerBase | None:
    """The fake quantizer of a scheme, enabled; None for a tensor that has no scheme."""
    return None if scheme is None else FakeQuantizerBase(SchemeFakeQuantizeConfig(scheme))


def initialize_fake_quantizers(model: torch.nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """Make the scales of fake quantizers that learn their range, from the tensors of one forward pass.

    Call it after preparing the model and before making the optimizer, which must know the new parameters.

    Args:
        model: the prepared model.
        example_inputs: positional arguments of its forward.

    Raises:
        ValueError: the pass did not reach a fake quantizer that learns its range; the model is sharded.
    """
    if any(map(_is_dtensor, model.parameters())):
        raise ValueError(f"initialize_fake_quantizers got a sharded model; {_RANGE_BEFORE_SHARDING}")
    found = {name: m for name, m in model.named_modules() if isinstance(m, IntxFakeQuantizer) and m.is_learned}
    for quantizer in found.values():
        quantizer._initialized = True
    with torch.no_grad():
        model(*example_inputs)
    missed = [name for name, quantizer in found.items() if quantizer.scale is None]
    if missed:
        raise ValueError(
            f"initialize_fake_quantizers got inputs that do not reach {', '.join(missed)}; want inputs that use every "
            "layer, with fake quantization enabled."
        )


def is_row_local(scheme: TensorScheme) -> bool:
    """Whether the codes of a row, a line along the last dimension, surely depend on nothing but that row."""
    return block_of(scheme)[0] == 1


def block_of(scheme: TensorScheme) -> tuple[int, int]:
    """Rows and columns of a matrix whose codes surely depend on nothing but each other; -1: all of that dimension."""
    if isinstance(scheme, ScaledScheme):
        return scheme.scaling.block
    if isinstance(scheme, AffineScheme | Int4Float8Scheme):
        return 1, scheme.format.group_size or -1
    return (1, 32) if isinstance(scheme, Q40Scheme) else (-1, -1)


def refuse_late_range(
    weight: torch.Tensor, quantizer: torch.nn.Module | None, state_dict: dict[str, Any], prefix: str
) -> None:
    """Raise ValueError where loading a checkpoint would make a range's parameters of a layer that is sharded already.

    Args:
        weight: of the layer.
        quantizer: of its weight.
        state_dict: to be loaded.
        prefix: of the layer's keys in it.
    """
    is_new = isinstance(quantizer, IntxFakeQuantizer) and quantizer.is_learned and quantizer.scale is None
    if is_new and _is_dtensor(weight) and f"{prefix}weight_fake_quantizer.scale" in state_dict:
        raise ValueError(f"Loading {prefix}weight_fake_quantizer.scale into a sharded model: {_RANGE_BEFORE_SHARDING}")


def _check_plain(x: torch.Tensor) -> None:
    if _is_dtensor(x):
        raise ValueError(
            f"A fake quantizer got a DTensor of shape {tuple(x.shape)}. With FSDP2, prepare the model before "
            "fully_shard, which then gathers whole weights; with tensor parallelism, linear layers alone can be "
            "fake-quantized: exclude others from it, or from quantization."
        )


def _is_dtensor(x: torch.Tensor) -> bool:
    return hasattr(x, "device_mesh")


@dataclass(frozen=True)
class _Mixed(Arithmetic):
    """Values between those of x and those of its codes; the end of both is exact in x's dtype."""

    arithmetic: Arithmetic
    mix: float

    def values(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach()
        return torch.lerp(x.float(), self.arithmetic.values(x).float(), self.mix).to(x.dtype)

    def pass_gradient(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        passed = self.arithmetic.pass_gradient(grad, x)
        return passed if passed is grad else torch.lerp(grad, passed, self.mix)


@dataclass(frozen=True, eq=False)
class _Fixed(Arithmetic):
    """Integers with the scales of another tensor."""

    format: AffineFormat
    scale: torch.Tensor
    zero_point: torch.Tensor | None

    def values(self, x: torch.Tensor) -> torch.Tensor:
        q = self.format.quantize(x.detach(), self.scale, self.zero_point)
        return self.format.dequantize(AffineTensor(*q), x.dtype)

    def pass_gradient(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        inside = self.format.in_range(x.detach(), self.scale, self.zero_point)
        return torch.where(inside, grad, torch.zeros_like(grad))
