"""FqnToConfig: one configuration per layer, by the layer's dotted name.

What counts for a layer, in this order:

1. the name of its weight, `model.layers.0.q_proj.weight`; None leaves the layer alone
2. the name of the layer, `model.layers.0.q_proj`
3. the first pattern `re:...` that matches all of the weight's name
4. the first pattern `re:...` that matches all of the layer's name
5. `_default`, for linear layers only

A name or a pattern that no layer has is an error. Layers are linear layers and embeddings; their biases, and other
modules, are never quantized.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from aotrain.nn.report import Report, ReportRow, attach_report
from aotrain.quantization.configs import AOBaseConfig
from aotrain.quantization.quantize import ModuleFilter, accepts_everything, apply_config, register_quantize_handler

_DEFAULT = "_default"
_REGEX = "re:"


@dataclass
class FqnToConfig(AOBaseConfig):
    """Configurations of single layers; `quantize_(model, FqnToConfig({...}))`.

    Attributes:
        fqn_to_config: dotted names and patterns, with a configuration or None (left alone).
        module_fqn_to_config: the same object, under its older name.
        version: 1.

    Raises:
        ValueError: both are given and differ, or a pattern is no regular expression.
    """

    fqn_to_config: Mapping[str, AOBaseConfig | None] = field(default_factory=OrderedDict)
    module_fqn_to_config: Mapping[str, AOBaseConfig | None] = field(default_factory=OrderedDict)
    version: int = 1

    def __post_init__(self) -> None:
        if self.fqn_to_config and self.module_fqn_to_config and self.fqn_to_config != self.module_fqn_to_config:
            raise ValueError(
                "FqnToConfig: `fqn_to_config` and `module_fqn_to_config` are both specified and are not equal! Give "
                "one of them."
            )
        self.fqn_to_config = self.module_fqn_to_config = self.fqn_to_config or self.module_fqn_to_config
        for key in self.fqn_to_config:
            _compiled(key)

    def __str__(self) -> str:
        return "\n".join(["FqnToConfig({", *(f"  {key!r}: {each}," for key, each in self.fqn_to_config.items()), "})"])


ModuleFqnToConfig = AOPerModuleConfig = FqnToConfig


def fqn_matches_fqn_config(fqn: str, config: FqnToConfig) -> bool:
    """Whether a name, of a layer or of a parameter, is a key or matches a pattern; `_default` does not count."""
    if fqn in config.fqn_to_config:
        if fqn.startswith(_REGEX):
            raise ValueError(f"fqn_matches_fqn_config got the pattern {fqn!r}; want the name of a module or parameter.")
        return True
    return _pattern_for(fqn, config) is not None


def _compiled(key: str) -> re.Pattern[str] | None:
    if not key.startswith(_REGEX):
        return None
    try:
        return re.compile(key.removeprefix(_REGEX))
    except re.error as error:
        raise ValueError(f"FqnToConfig got {key!r}; want a regular expression after 're:': {error}.") from error


def _pattern_for(fqn: str, config: FqnToConfig) -> str | None:
    for key in config.fqn_to_config:
        pattern = _compiled(key)
        if pattern is not None and pattern.fullmatch(fqn):
            return key
    return None


def _key_for(module: torch.nn.Module, fqn: str, config: FqnToConfig) -> str | None:
    """The key that decides for a layer."""
    weight = f"{fqn}.weight" if fqn else "weight"
    for name in (weight, fqn):
        if name in config.fqn_to_config:
            return name
    for name in (weight, fqn):
        key = _pattern_for(name, config)
        if key is not None:
            return key
    return _DEFAULT if _DEFAULT in config.fqn_to_config and isinstance(module, torch.nn.Linear) else None


@register_quantize_handler(FqnToConfig)
def _each_its_own(model: torch.nn.Module, config: FqnToConfig, filter_fn: ModuleFilter) -> None:
    if filter_fn is not accepts_everything:
        raise ValueError(
            "quantize_: Custom filter_fn and FqnToConfig were both specified. Only one may be: a FqnToConfig names the "
            "layers itself, pass filter_fn=None."
        )
    layers: dict[str, set[str]] = {}
    for fqn, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            key = _key_for(module, fqn, config)
            if key is not None:
                layers.setdefault(key, set()).add(fqn)
    _check_all_matched(model, config)
    before = {fqn: type(model.get_submodule(fqn)) for fqn in set().union(*layers.values())}
    for key, named in layers.items():
        each = config.fqn_to_config[key]
        if each is not None:
            apply_config(model, each, lambda _, fqn, named=named: fqn in named)
    attach_report(
        model, Report("FqnToConfig", tuple(_row(model, key, fqn, before) for key in layers for fqn in layers[key]))
    )


def _row(model: torch.nn.Module, key: str, fqn: str, before: dict[str, type]) -> ReportRow:
    converted = type(model.get_submodule(fqn)) is not before[fqn]
    return ReportRow(fqn, "converted" if converted else "skipped", f"by {key!r}")


def _check_all_matched(model: torch.nn.Module, config: FqnToConfig) -> None:
    """Every key must name something: a layer or its weight, or, to be left alone, any module or parameter."""
    everything = [fqn for fqn, _ in model.named_modules()] + [fqn for fqn, _ in model.named_parameters()]
    layers = [fqn for fqn, each in model.named_modules() if isinstance(each, torch.nn.Linear | torch.nn.Embedding)]
    layers += [f"{fqn}.weight" if fqn else "weight" for fqn in layers]
    for key, each in config.fqn_to_config.items():
        pattern, names = _compiled(key), everything if each is None else layers
        matched = key in names if pattern is None else any(pattern.fullmatch(name) for name in names)
        if not matched and key != _DEFAULT:
            raise ValueError(
                f"quantize_ got a FqnToConfig with {key!r}, which names no linear layer and no embedding of the model; "
                "want the dotted name of one, as in model.named_modules(), or of its weight."
            )
    if all(each is None for each in config.fqn_to_config.values()):
        raise ValueError("quantize_ got a FqnToConfig that converts no layer; want at least one configuration.")
