"""QATConfig: quantization-aware training through `quantize_`, in two steps.

    quantize_(model, QATConfig(base_config, step="prepare"))
    ... train ...
    quantize_(model, QATConfig(base_config, step="convert"))

A base configuration says what the model becomes; `activation_config` and `weight_config` say what is simulated, without
one. Without a filter, linear layers are meant; embeddings take `filter_fn=lambda m, _: isinstance(m, nn.Embedding)`,
in both steps. `convert` without a base configuration puts plain layers with the trained weights back.
"""

import warnings
from enum import Enum

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from aotrain.qat.convert import forget_tied, layer_scheme, nothing_prepared, quantized, with_tied
from aotrain.qat.fake_quantize_config import infer_fake_quantize_configs, same_numbers
from aotrain.qat.fake_quantizer import initialize_fake_quantizers
from aotrain.qat.swap import FakeQuantized, fake_quantized, plain, swap
from aotrain.qat.tensor_config import FakeQuantizeConfig, FakeQuantizeConfigBase
from aotrain.quantization.configs import AOBaseConfig
from aotrain.quantization.quantize import ModuleFilter, accepts_everything, register_quantize_handler
from aotrain.quantization.scheme_of import scheme_of
from aotrain.quantization.schemes import Scheme

__all__ = ["FakeQuantizeConfig", "QATConfig", "QATStep", "initialize_fake_quantizers"]


class QATStep(str, Enum):  # noqa: UP042  a StrEnum prints otherwise than the one users know
    """Which half of quantization-aware training a configuration is of."""

    PREPARE = "prepare"
    CONVERT = "convert"


class QATConfig(AOBaseConfig):
    """Fake-quantize the layers of a model, or quantize those that were.

    Args:
        base_config: what the model becomes; see `quantization.configs` and `quantization.float_configs`.
        activation_config: of the inputs of linear layers, instead of a base configuration.
        weight_config: of weights, instead of a base configuration.
        step: "prepare" or "convert", or a `QATStep`.

    Attributes:
        base_config, activation_config, weight_config: the arguments.
        step: lower case.

    Raises:
        ValueError: an unknown step, or configurations that do not go with it or each other.
    """

    def __init__(
        self,
        base_config: AOBaseConfig | None = None,
        activation_config: FakeQuantizeConfigBase | None = None,
        weight_config: FakeQuantizeConfigBase | None = None,
        *,
        step: QATStep | str = "prepare",
    ) -> None:
        self.base_config = base_config
        self.activation_config = activation_config
        self.weight_config = weight_config
        self.step = str(getattr(step, "value", step)).lower()
        self._check()

    def __repr__(self) -> str:
        fields = {name: value for name, value in vars(self).items() if value is not None}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"

    def _check(self) -> None:
        base, activation, weight = self.base_config, self.activation_config, self.weight_config
        steps = [step.value for step in QATStep]
        if self.step not in steps:
            raise ValueError(f"`step` must be one of {steps}, got {self.step!r}")
        if base is not None and activation is not None:
            raise ValueError("Cannot specify both `base_config` and `activation_config`")
        if base is not None and weight is not None:
            raise ValueError("Cannot specify both `base_config` and `weight_config`")
        if self.step == QATStep.PREPARE and base is None and activation is None and weight is None:
            raise ValueError("Must specify `base_config`, `activation_config`, or `weight_config` in the prepare step")
        if self.step == QATStep.CONVERT and (activation is not None or weight is not None):
            raise ValueError("Cannot specify `weight_config` or `activation_config` in the convert step")
        if isinstance(base, FakeQuantizeConfigBase):
            raise ValueError(
                f"{type(base).__name__} was passed as `base_config`. Did you mean to do the following instead? "
                f"QATConfig(activation_config={type(base).__name__}(...), weight_config=...)"
            )


class IntXQuantizationAwareTrainingConfig(QATConfig):
    """Deprecated spelling of `QATConfig(activation_config=..., weight_config=...)`."""

    def __init__(
        self,
        activation_config: FakeQuantizeConfigBase | None = None,
        weight_config: FakeQuantizeConfigBase | None = None,
    ) -> None:
        _deprecated(self, "QATConfig(activation_config=..., weight_config=...)")
        super().__init__(activation_config=activation_config, weight_config=weight_config)


class FromIntXQuantizationAwareTrainingConfig(QATConfig):
    """Deprecated spelling of `QATConfig(step="convert")`."""

    def __init__(self) -> None:
        _deprecated(self, 'QATConfig(step="convert")')
        super().__init__(step="convert")


class intx_quantization_aware_training(IntXQuantizationAwareTrainingConfig):
    """Deprecated spelling of `QATConfig(activation_config=..., weight_config=...)`."""


class from_intx_quantization_aware_training(FromIntXQuantizationAwareTrainingConfig):
    """Deprecated spelling of `QATConfig(step="convert")`."""


def _deprecated(config: QATConfig, instead: str) -> None:
    warnings.warn(f"{type(config).__name__} is deprecated; want {instead}.", FutureWarning, stacklevel=3)


@register_quantize_handler(QATConfig)
@register_quantize_handler(IntXQuantizationAwareTrainingConfig)
@register_quantize_handler(FromIntXQuantizationAwareTrainingConfig)
@register_quantize_handler(intx_quantization_aware_training)
@register_quantize_handler(from_intx_quantization_aware_training)
def _apply(model: torch.nn.Module, config: QATConfig, filter_fn: ModuleFilter) -> None:
    (_prepare if config.step == QATStep.PREPARE else _convert)(model, config, filter_fn)


def is_linear(module: torch.nn.Module, fqn: str) -> bool:
    """What is prepared, and converted, without a filter."""
    return isinstance(module, torch.nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _prepare(model: torch.nn.Module, config: QATConfig, filter_fn: ModuleFilter) -> None:
    configs = config.activation_config, config.weight_config
    if config.base_config is not None:
        configs = infer_fake_quantize_configs(config.base_config)
    replacements: dict[torch.nn.Module, torch.nn.Module] = {}
    accepts = is_linear if filter_fn is accepts_everything else filter_fn
    for fqn, module in model.named_modules():
        if accepts(module, fqn):
            try:
                replacements[module] = fake_quantized(module, *configs)
            except ValueError as error:
                raise ValueError(f"QATConfig got {fqn or 'the model itself'!r}: {error}") from error
    if not replacements:
        raise ValueError(
            "QATConfig found no layer to prepare: the model has none, or the filter rejected every one. Embeddings "
            "need filter_fn=lambda m, fqn: isinstance(m, torch.nn.Embedding)."
        )
    swap(model, replacements)


def _convert(model: torch.nn.Module, config: QATConfig, filter_fn: ModuleFilter) -> None:
    accepts = is_linear if filter_fn is accepts_everything else filter_fn
    layers = {fqn: m for fqn, m in model.named_modules() if isinstance(m, FakeQuantized) and accepts(m, fqn)}
    if not layers:
        # A filter for embeddings after one for linear layers: those that are tied have been converted with them.
        if config.base_config is not None and forget_tied(model):
            return
        raise ValueError(nothing_prepared(model, "QATConfig"))
    if config.base_config is None:
        swap(model, {module: plain(module) for module in layers.values()})
        return
    scheme = scheme_of(config.base_config)
    _warn_of_other_numbers(layers, scheme)
    swap(model, quantized(model, with_tied(model, layers), scheme))


def _warn_of_other_numbers(layers: dict[str, FakeQuantized], scheme: Scheme) -> None:
    for fqn, module in layers.items():
        trained = layer_scheme(module)
        want = scheme if isinstance(module, torch.nn.Linear) else Scheme("", scheme.weight)
        if not same_numbers(trained, want):
            warnings.warn(
                f"QATConfig converts {fqn!r} by {want}, but it was trained by {trained}: training has not seen these "
                "numbers. Use one base configuration in both steps.",
                stacklevel=5,
            )
            return
