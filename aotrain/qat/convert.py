"""convert_qat: fake-quantized layers become quantized ones, with the very codes and scales of their last forward pass.

A scale that is made as tensors come is a function of the weight, so it is made again; one that was learned, or kept
from the first step, is taken from the fake quantizer. Layers that share a weight share its codes, or nothing is done.
"""

import logging
from collections.abc import Mapping

import torch

from aotrain.nn.report import Report, ReportRow, attach_report
from aotrain.qat.fake_quantizer import FakeQuantizerBase, is_row_local
from aotrain.qat.linear import FakeQuantizedLinear
from aotrain.qat.swap import FakeQuantized, check_not_sharded, swap
from aotrain.qat.ties import find_ties
from aotrain.quantization.modules import QuantizedEmbedding, QuantizedLinear, QuantizedModule
from aotrain.quantization.schemes import SCHEMES, FlatScheme, Scheme, TensorScheme

logger = logging.getLogger(__name__)

_CONVERTED_WITH_TIE = "_aotrain_converted_with_tie"


def convert_qat(model: torch.nn.Module) -> Report:
    """Quantize every fake-quantized layer by the scheme it was trained with, in place.

    The converted model gives what the prepared one gave, bit for bit, until `quantization.products.fast_products`
    lets its layers call products of codes, which round otherwise.

    Args:
        model: prepared, not sharded.

    Returns:
        What happened to each layer; also logged, and kept for `aotrain.conversion_report`.

    Raises:
        ValueError: nothing is prepared, or is so no longer; a weight that is shared with a layer that is not prepared,
            or prepared otherwise; scales of activations that were kept from the first step; a sharded model.
    """
    layers = {fqn: module for fqn, module in model.named_modules() if isinstance(module, FakeQuantized)}
    if not layers:
        raise ValueError(nothing_prepared(model, "convert_qat"))
    converted = quantized(model, layers)
    swap(model, converted)
    rows = tuple(
        ReportRow(fqn, "converted", converted[module].scheme.name or str(converted[module].scheme.weight))
        for fqn, module in layers.items()
    )
    report = Report("QAT conversion", rows)
    attach_report(model, report)
    logger.info("%s", report.summary())
    return report


def quantized(
    model: torch.nn.Module, layers: Mapping[str, FakeQuantized], scheme: Scheme | None = None
) -> dict[torch.nn.Module, QuantizedModule]:
    """The quantized forms of fake-quantized layers; nothing is replaced.

    Args:
        model: that holds the layers, and those that share weights with them.
        layers: by dotted name.
        scheme: to use instead of the layers' own; embeddings take that of its weights.
    """
    check_not_sharded(model)
    ties = find_ties(model)
    result: dict[torch.nn.Module, QuantizedModule] = {}
    shared: dict[int, QuantizedModule] = {}
    for fqn, module in layers.items():
        if module in ties:
            _check_tie(fqn, module, ties[module].others(module), layers)
        if module.weight_fake_quantizer is None:
            raise ValueError(f"Converting got {fqn!r} without a weight_config; want QATConfig(step='convert').")
        new = _quantized(fqn, module, scheme)
        first = shared.setdefault(id(module.weight), new)
        if first is not new:
            new._buffers.update(first._buffers)
        if getattr(module, _CONVERTED_WITH_TIE, False):
            setattr(new, _CONVERTED_WITH_TIE, True)
        new.__dict__.update({name: hooks for name, hooks in vars(module).items() if "_hooks" in name})
        result[module] = new
    return result


def with_tied(model: torch.nn.Module, layers: Mapping[str, FakeQuantized]) -> dict[str, FakeQuantized]:
    """The layers, and the fake-quantized ones that share a weight with one of them."""
    ties = find_ties(model)
    others = [ties[module].others(module) for module in layers.values() if module in ties]
    tied = {fqn: m for each in others for fqn, m in each.items() if isinstance(m, FakeQuantized) and fqn not in layers}
    for module in tied.values():
        setattr(module, _CONVERTED_WITH_TIE, True)
    return {**layers, **tied}


def forget_tied(model: torch.nn.Module) -> bool:
    """Whether layers were converted by `with_tied`, for the first time that this is asked."""
    tied = [module for module in model.modules() if module.__dict__.pop(_CONVERTED_WITH_TIE, False)]
    return bool(tied)


def layer_scheme(module: FakeQuantized) -> Scheme:
    """What a layer was trained with."""
    assert module.weight_fake_quantizer is not None
    activation = module.activation_fake_quantizer if isinstance(module, FakeQuantizedLinear) else None
    inner = None if activation is None else activation.scheme
    outer = inner if inner is None or is_row_local(inner) else FlatScheme(inner)
    return _named(module.weight_fake_quantizer.scheme, outer)


def nothing_prepared(model: torch.nn.Module, who: str) -> str:
    """Message for a model without fake-quantized layers."""
    if any(isinstance(module, QuantizedModule) for module in model.modules()):
        return f"{who} got a model that is converted already; a second conversion would have nothing to quantize."
    return f"{who} got a model without fake-quantized layers; prepare and train it first."


def _named(weight: TensorScheme, activation: TensorScheme | None) -> Scheme:
    matches = (scheme for scheme in SCHEMES.values() if (scheme.weight, scheme.activation) == (weight, activation))
    return next(matches, Scheme("", weight, activation))


def _quantized(fqn: str, module: FakeQuantized, scheme: Scheme | None) -> QuantizedModule:
    quantizer = module.weight_fake_quantizer
    assert quantizer is not None
    own = layer_scheme(module)
    given = quantizer.encode_arguments(module.weight)
    if quantizer.is_learned and not given:
        raise ValueError(f"Converting got {fqn!r} with a range to learn that was never initialized; train it first.")
    if not isinstance(module, FakeQuantizedLinear):
        weight_only = own if scheme is None else Scheme("", scheme.weight)
        return QuantizedEmbedding.from_embedding(module.to_embedding(), weight_only, **given)
    _check_activation(fqn, module.activation_fake_quantizer)
    return QuantizedLinear.from_linear(module.to_linear(), own if scheme is None else scheme, **given)


def _check_activation(fqn: str, quantizer: FakeQuantizerBase | None) -> None:
    if quantizer is not None and not quantizer.is_dynamic:
        raise ValueError(
            f"Converting got {fqn!r}, whose input was quantized with scales kept from the first step; quantized layers "
            "make them as inputs come: want is_dynamic=True for activations."
        )


def _check_tie(
    fqn: str, module: FakeQuantized, others: Mapping[str, torch.nn.Module], layers: Mapping[str, FakeQuantized]
) -> None:
    for name in others:
        if name not in layers:
            raise ValueError(
                f"Converting got {fqn!r}, whose weight is that of {name!r}, which is not quantized with it; quantize "
                "both (prepare_qat(..., embeddings=True)), or neither, or give them weights of their own."
            )
        mine, theirs = module.weight_fake_quantizer, layers[name].weight_fake_quantizer
        if mine is None or theirs is None or mine.scheme != theirs.scheme or mine.is_learned or theirs.is_learned:
            raise ValueError(
                f"Converting got {fqn!r} and {name!r}, which share one weight but not its quantization: "
                f"{mine} and {theirs}; want one configuration, with scales that are not learned."
            )
