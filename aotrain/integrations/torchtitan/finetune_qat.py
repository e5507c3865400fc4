"""Quantization-aware layers in a torchtitan model, by conversion of its config tree.

``FakeQuantizedLinear`` is ``aotrain.qat.FakeQuantizedLinear`` as a torchtitan module: it is initialized, sharded,
checkpointed and recomputed like any ``Linear``, and its parameters have the same names. Under FSDP2 forward has the
whole weight in the dtype of the products, so scales are those of that dtype: it is the dtype that is saved and served.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from torchtitan.config.override import derive
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.module import Module

import aotrain.qat
from aotrain.nn import Report, ReportRow
from aotrain.qat.fused_scales import FusedNvfp4Scheme
from aotrain.quantization import get_scheme
from aotrain.quantization.fused_groups import fused_groups
from aotrain.quantization.schemes import Nvfp4Scheme, ScaledScheme

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Quantize
    from aotrain.integrations.torchtitan.finetune_layout import Layout


class FakeQuantizedLinear(aotrain.qat.FakeQuantizedLinear, Linear):
    """torchtitan's ``Linear`` with fake quantizers of input and weight."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        scheme: str = "int4-g32"
        """A name in ``aotrain.quantization.SCHEMES``."""

        scale_dtype: str = "bfloat16"
        """Of the scales of integer weights: what the exported checkpoint has."""

    def __init__(self, config: Config) -> None:
        # Not aotrain.qat.FakeQuantizedLinear.__init__: its next in line is Linear.__init__, which takes a config.
        Linear.__init__(self, config)
        scheme = get_scheme(config.scheme, scale_dtype=getattr(torch, config.scale_dtype))
        self._set_fake_quantizers(
            *(
                None if tensor is None else aotrain.qat.SchemeFakeQuantizeConfig(tensor)
                for tensor in (scheme.activation, scheme.weight)
            )
        )
        for quantizer in (self.activation_fake_quantizer, self.weight_fake_quantizer):
            if quantizer is not None:
                quantizer.__class__ = _as_titan_module(type(quantizer))  # pyrefly: ignore[bad-argument-type]


@functools.cache
def _as_titan_module(cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class, which torchtitan takes for one of its modules: it refuses a model with any other in it."""
    return type(cls.__name__, (cls, Module), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def quantize_layers(model_config: Any, settings: Quantize, layout: Layout, dtype: torch.dtype) -> Report:
    """Replace the linear layers of a config tree, in place.

    Args:
        model_config: of a model without fused layers.
        settings: of the recipe; `exclude` are patterns of the checkpoint's names.
        layout: names of the checkpoint.
        dtype: that the products run in, and that is served.

    Returns:
        What happened to each layer, by its name in the checkpoint.
    """
    rows = []
    for fqn, linear, parent, attr in list(model_config.traverse(Linear.Config)):
        names = layout.hf_layers(fqn)
        why = "excluded" if _excluded(names, settings) else layer_problem(settings.scheme, fqn, linear, layout)
        if why is None:
            new = derive(linear, FakeQuantizedLinear.Config, scheme=settings.scheme, scale_dtype=_name(dtype))
            setattr(parent, attr, new)
            rows += [ReportRow(name, "converted", f"{linear.in_features} -> {linear.out_features}") for name in names]
        else:
            rows += [ReportRow(name, "skipped", why) for name in names]
    return Report(f"QAT {settings.scheme}", tuple(rows))


def misfits(model_config: Any, settings: Quantize, layout: Layout) -> Iterator[tuple[str, str]]:
    """(key of `quantize`, message) of layers that are to be quantized and cannot be, by name, shape and reason."""
    for fqn, linear, *_ in model_config.traverse(Linear.Config):
        names = layout.hf_layers(fqn)
        excluded = _excluded(names, settings)
        if 0 < len(excluded) < len(names):
            kept = ", ".join(name for name in names if name not in excluded)
            yield "exclude", f"{excluded[0]} without {kept}: torchtitan makes k and v alike; exclude both or none"
        elif not excluded and (why := layer_problem(settings.scheme, fqn, linear, layout)):
            shape = f"[{linear.out_features}, {linear.in_features}]"
            yield from (("scheme", f"{name} {shape}: {why}; or list it in quantize.exclude") for name in names)


def layer_problem(scheme_name: str, fqn: str, linear: Linear.Config, layout: Layout) -> str | None:
    """Why a scheme cannot take a layer; None when it can."""
    scheme = get_scheme(scheme_name)
    problem = scheme.problem(linear.out_features, linear.in_features)
    if problem is None and isinstance(scheme.weight, ScaledScheme) and layout.swaps_rows(f"{fqn}.weight"):
        block = scheme.weight.scaling.block[0]
        if 1 < block < linear.out_features and block % layout.head_dim:
            problem = (
                f"torchtitan swaps rows within heads of {layout.head_dim}, which moves them between the scales of "
                f"{block} rows; want engine: trl"
            )
    return problem


def share_global_scales(model: torch.nn.Module, layout: Layout) -> None:
    """Give NVFP4 weights the global scale of q, k and v, or gate and up together, as servers join them; in place.

    FSDP2 has whole blocks together, so whenever one of them computes, all are there.
    """
    layers = {
        layout.hf_layers(fqn)[0]: module
        for fqn, module in model.named_modules()
        if isinstance(module, FakeQuantizedLinear)
    }
    for group in fused_groups(layers):
        members = tuple(layers[name] for name in group)
        for member in members:
            assert member.weight_fake_quantizer is not None
            if isinstance(member.weight_fake_quantizer.scheme, Nvfp4Scheme):
                member.weight_fake_quantizer.scheme = FusedNvfp4Scheme(members)


def _excluded(names: Sequence[str], settings: Quantize) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in settings.exclude)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
