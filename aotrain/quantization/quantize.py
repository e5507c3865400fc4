"""quantize_(model, config): convert in place, by a handler that belongs to the configuration's type.

This file knows the configurations of training: `MXFP8TrainingOpConfig`, `MXLinearConfig`, `NVFP4TrainingConfig`,
`Float8TrainingOpConfig` and `Float8LinearConfig`. Others register a handler of their own: those of weights that are
quantized for good in `quantization.post_training`, one configuration per layer in `quantization.fqn_config`.
"""

from collections.abc import Callable
from typing import Any

import torch

from aotrain.nn import (
    Float8LinearConfig,
    Float8TrainingOpConfig,
    MXFP8TrainingOpConfig,
    MXLinearConfig,
    NVFP4TrainingConfig,
    convert_moe_training,
    convert_to_float8_training,
    convert_to_mx_training,
)
from aotrain.nn.moe import may_be_experts

ModuleFilter = Callable[[torch.nn.Module, str], bool]
# Convert the modules of a model that a filter accepts, in place.
Handler = Callable[[torch.nn.Module, Any, ModuleFilter], None]

_HANDLERS: dict[type, Handler] = {}


def register_quantize_handler(config_type: type) -> Callable[[Handler], Handler]:
    """Decorator: the function that `quantize_` calls for configurations of exactly this type.

    It is called as `(model, config, filter)`, where the filter takes a module and its dotted name, "" for the model. It
    is `accepts_everything` when the user gave none.
    """

    def register(handler: Handler) -> Handler:
        _HANDLERS[config_type] = handler
        return handler

    return register


def quantize_(
    model: torch.nn.Module,
    config: Any,
    filter_fn: ModuleFilter | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Apply a configuration to a model, in place.

    With a configuration of training, linear layers are swapped for ones with the same parameters and names: those that
    the filter accepts, and those inside of modules that it accepts. So are experts that the filter accepts, with a
    configuration that is for both; without a filter they are not.

    With a base configuration, such as `Int4WeightOnlyConfig`, these layers become `QuantizedLinear`, and embeddings
    that the filter accepts `QuantizedEmbedding`: the same objects, so the model may itself be a layer. A `FqnToConfig`
    names the layers itself.

    Args:
        model: the model.
        config: of a type that has a handler.
        filter_fn: `(module, dotted name) -> bool`, which modules to convert; default all linear layers.
        device: where to move the model first; default nowhere.

    Raises:
        TypeError: there is no handler for this configuration.
        ValueError: nothing was converted, or the model itself is a linear layer, which cannot be swapped in place.
    """
    _handler_of(config)
    if device is not None:
        model.to(device)
    apply_config(model, config, accepts_everything if filter_fn is None else filter_fn)


def apply_config(model: torch.nn.Module, config: Any, filter_fn: ModuleFilter) -> None:
    """Call the handler of a configuration; `quantize_` without its defaults."""
    _handler_of(config)(model, config, filter_fn)


def _handler_of(config: Any) -> Handler:
    handler = _HANDLERS.get(type(config))
    if handler is None:
        valid = ", ".join(sorted(known.__name__ for known in _HANDLERS))
        raise TypeError(f"quantize_ got a {type(config).__name__}; want a configuration: {valid}.")
    return handler


def accepts_everything(module: torch.nn.Module, fqn: str) -> bool:
    """The filter of a user who gave none."""
    return True


@register_quantize_handler(MXFP8TrainingOpConfig)
@register_quantize_handler(Float8TrainingOpConfig)
def _linear_layers_and_experts(
    model: torch.nn.Module, config: MXFP8TrainingOpConfig | Float8TrainingOpConfig, filter_fn: ModuleFilter
) -> None:
    accepts = inside_of(model, filter_fn)
    found = [module for fqn, module in model.named_modules() if accepts(module, fqn)]
    has_experts = filter_fn is not accepts_everything and any(map(may_be_experts, found))
    same = config.to_linear_config()
    if has_experts:
        convert_moe_training(model, same, module_filter_fn=accepts)
    if not has_experts or any(isinstance(module, torch.nn.Linear) for module in found):
        _HANDLERS[type(same)](model, same, filter_fn)


@register_quantize_handler(MXLinearConfig)
@register_quantize_handler(NVFP4TrainingConfig)
def _mx_training(model: torch.nn.Module, config: MXLinearConfig | NVFP4TrainingConfig, filter_fn: ModuleFilter) -> None:
    convert_to_mx_training(_not_a_linear(model), config, module_filter_fn=inside_of(model, filter_fn))


@register_quantize_handler(Float8LinearConfig)
def _float8_training(model: torch.nn.Module, config: Float8LinearConfig, filter_fn: ModuleFilter) -> None:
    convert_to_float8_training(_not_a_linear(model), config=config, module_filter_fn=inside_of(model, filter_fn))


def _not_a_linear(model: torch.nn.Module) -> torch.nn.Module:
    if isinstance(model, torch.nn.Linear):
        raise ValueError(
            "quantize_ got a linear layer itself, which cannot be swapped in place; want a model that holds it. "
            "convert_to_float8_training and convert_to_mx_training return the new layer."
        )
    return model


def inside_of(model: torch.nn.Module, filter_fn: ModuleFilter) -> ModuleFilter:
    """A filter that also accepts what is inside of a module that `filter_fn` accepts."""
    accepted = {fqn for fqn, module in model.named_modules() if filter_fn(module, fqn)}

    def accepts(module: torch.nn.Module, fqn: str) -> bool:
        parts = fqn.split(".")
        return any(".".join(parts[:length]) in accepted for length in range(len(parts) + 1))

    return accepts
