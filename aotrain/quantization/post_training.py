"""quantize_ with base configurations: linear layers and embeddings become layers with quantized weights, in place.

A layer becomes a `QuantizedLinear` or `QuantizedEmbedding` as the same object: its class and its contents change, its
hooks and every reference to it stay. So a layer that is used in several places is quantized once, and the model given
may itself be a layer. Layers whose shape a scheme cannot take are left alone and said so; `conversion_report(model)`
has one row per layer.
"""

import logging

import torch

from aotrain.nn import Float8Linear, MXLinear, NVFP4Linear
from aotrain.nn.report import Report, ReportRow, attach_report
from aotrain.quantization.configs import (
    AOBaseConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
)
from aotrain.quantization.float_configs import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    Float8WeightOnlyConfig,
    MXDynamicActivationMXWeightConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
)
from aotrain.quantization.modules import QuantizedEmbedding, QuantizedLinear, QuantizedModule
from aotrain.quantization.quantize import ModuleFilter, accepts_everything, inside_of, register_quantize_handler
from aotrain.quantization.scheme_of import scheme_of
from aotrain.quantization.schemes import Scheme

logger = logging.getLogger(__name__)

BASE_CONFIGS = (
    Int4WeightOnlyConfig,
    IntxWeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Float8WeightOnlyConfig,
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    MXDynamicActivationMXWeightConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
)
_TRAINED = (Float8Linear, MXLinear, NVFP4Linear)


def quantize_layers(
    model: torch.nn.Module, scheme: Scheme, filter_fn: ModuleFilter | None = None, *, title: str = "quantize_"
) -> Report:
    """Quantize the linear layers and embeddings of a model that a filter accepts, in place.

    Args:
        model: the model, or one layer.
        scheme: how to quantize.
        filter_fn: `(module, dotted name) -> bool`; linear layers that it accepts and those inside of modules that it
            accepts, and embeddings that it accepts. Default all linear layers and no embedding.
        title: of the report.

    Returns:
        A row per layer; also kept for `conversion_report(model)`.

    Raises:
        ValueError: no layer was quantized: with the reason of each.
    """
    accepts = accepts_everything if filter_fn is None else inside_of(model, filter_fn)
    rows: list[ReportRow] = []
    for fqn, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Embedding | QuantizedEmbedding) and filter_fn is None:
            continue
        if not isinstance(module, torch.nn.Linear | torch.nn.Embedding | QuantizedModule) or not accepts(module, fqn):
            continue
        reason = _problem(module, scheme)
        if reason is None:
            _replace(module, scheme)
        rows.append(ReportRow(fqn, "converted" if reason is None else "skipped", reason or scheme.name or title))
    report = Report(title, tuple(rows))
    if not report.converted:
        found = f"{report}" if rows else "The filter accepts no linear layer and no embedding."
        raise ValueError(
            f"quantize_ got a model of which {title} converts no layer; want at least one. {found}\n"
            "filter_fn is called as (module, dotted name); embeddings need one."
        )
    attach_report(model, report)
    logger.log(logging.WARNING if report.skipped else logging.INFO, "%s", report.summary())
    return report


def _problem(module: torch.nn.Module, scheme: Scheme) -> str | None:
    """Why a layer is left alone; None when it can be quantized."""
    if isinstance(module, QuantizedModule):
        return "already quantized: quantize the original model"
    if isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its weight is read by torch.nn.MultiheadAttention"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed, by a parametrization or a wrapper: make it a parameter first"
    if type(weight) is not torch.nn.Parameter:
        return f"its weight is a {type(weight).__name__}: quantize before the model is sharded or wrapped"
    if isinstance(module, torch.nn.Embedding):
        if scheme.activation is not None:
            return "an embedding has no activations to quantize"
        if module.max_norm is not None:
            return "max_norm changes its rows when they are read"
        forward, known = type(module).forward, (torch.nn.Embedding.forward,)
    else:
        forward, known = type(module).forward, (torch.nn.Linear.forward, *(cls.forward for cls in _TRAINED))
    if forward not in known:
        return f"{type(module).__name__} has a forward of its own"
    return scheme.problem(*weight.shape)


def _replace(module: torch.nn.Module, scheme: Scheme) -> None:
    """Make a layer a quantized one, as the same object with the same hooks."""
    quantized: QuantizedModule
    if isinstance(module, torch.nn.Embedding):
        quantized = QuantizedEmbedding.from_embedding(module, scheme)
    else:
        assert isinstance(module, torch.nn.Linear)
        quantized = QuantizedLinear.from_linear(module, scheme)
    layer: torch.nn.Module = module
    contents = vars(layer)
    hooks = {name: value for name, value in contents.items() if "_hooks" in name}
    layer.__class__ = type(quantized)
    contents.clear()
    contents.update(vars(quantized))
    contents.update(hooks)


def _quantize(model: torch.nn.Module, config: AOBaseConfig, filter_fn: ModuleFilter) -> None:
    given = None if filter_fn is accepts_everything else filter_fn
    quantize_layers(model, scheme_of(config), given, title=type(config).__name__)


for _config_type in BASE_CONFIGS:
    register_quantize_handler(_config_type)(_quantize)
