"""Model conversion: swap `nn.Linear` layers for low-precision ones in place, and back."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from aotrain.nn.experts import expert_scaling, restore_experts
from aotrain.nn.filters import ModuleFilter
from aotrain.nn.float8_config import Float8LinearConfig
from aotrain.nn.float8_linear import Float8Linear, LayerConfig, clone_as
from aotrain.nn.fsdp_wrap import unwrap_weights, wrap_weights
from aotrain.nn.mx_config import MXFP8TrainingOpConfig, MXLinearConfig
from aotrain.nn.mx_linear import MXFP8Linear, MXLinear, linear_config
from aotrain.nn.nvfp4_linear import NVFP4Linear, NVFP4TrainingConfig
from aotrain.nn.report import Report, ReportRow, attach_report
from aotrain.recipes import LinearRecipe

logger = logging.getLogger(__name__)

_LOW_PRECISION = (Float8Linear, NVFP4Linear)
ConfigT = TypeVar("ConfigT", bound=LayerConfig | NVFP4TrainingConfig)


def convert_to_float8_training(
    module: torch.nn.Module,
    *,
    module_filter_fn: ModuleFilter | None = None,
    config: Float8LinearConfig | LinearRecipe | None = None,
) -> torch.nn.Module:
    """Convert a model's linear layers to float8 training, in place.

    Parameters keep their identity, names and dtype; convert before or after creating the optimizer. Only with
    enable_fsdp_float8_all_gather are weights replaced, by parameters of the same memory: convert before `fully_shard`,
    and create the optimizer after it, as FSDP2 demands anyway. Layers of any shape are converted: sizes the hardware
    cannot take are padded. A layer reachable under several names is converted once and stays shared. Subclasses of
    `nn.Linear` with a forward of their own are left alone. What happened to each layer is logged, and kept for
    `aotrain.nn.conversion_report`.

    Args:
        module: the model, on any device, meta included.
        module_filter_fn: `(linear, dotted name) -> bool`, which layers to convert; default all. Typical:
            `lambda mod, fqn: fqn != "lm_head"`.
        config: default `Float8LinearConfig()`, the tensorwise recipe; see `Float8LinearConfig.from_recipe_name`.

    Returns:
        The same module; a new one only when `module` itself is a linear layer.

    Raises:
        ValueError: no layer was converted and none had been before: the model has no `nn.Linear`, or the filter
            rejected every one.
    """
    config = Float8LinearConfig() if config is None else config
    return convert_linears(module, Float8Linear._sharing, config, module_filter_fn, title="float8 training")


def convert_to_mx_training(
    module: torch.nn.Module,
    recipe: MXLinearConfig | MXFP8TrainingOpConfig | NVFP4TrainingConfig | str = "mxfp8",
    *,
    module_filter_fn: ModuleFilter | None = None,
) -> torch.nn.Module:
    """Convert a model's linear layers to MX or NVFP4 training, in place.

    What holds for `convert_to_float8_training` holds here. Both may convert layers of one model, in any order; a layer
    that both are asked to convert is what the last one made it.

    In 4 bits the last layers stay in high precision, as in the paper of NVFP4:

        convert_to_mx_training(model, "nvfp4", module_filter_fn=keep_tail_layers(model))

    Args:
        module: the model, on any device, meta included.
        recipe: "mxfp8", "mxfp8_gw_hp", "mxfp4" or "nvfp4", or a configuration.
        module_filter_fn: `(linear, dotted name) -> bool`, which layers to convert; default all.

    Returns:
        The same module; a new one only when `module` itself is a linear layer.

    Raises:
        ValueError: an unknown recipe or one that is neither MX nor NVFP4, or no layer was converted and none had been
            before.
    """
    if recipe == "nvfp4":
        recipe = NVFP4TrainingConfig()
    if isinstance(recipe, NVFP4TrainingConfig):
        return convert_linears(module, NVFP4Linear.from_float, recipe, module_filter_fn, title="NVFP4 training")
    return convert_linears(module, MXLinear._sharing, linear_config(recipe), module_filter_fn, title="MX training")


def convert_linears(
    module: torch.nn.Module,
    build: Callable[[torch.nn.Linear, ConfigT], torch.nn.Linear],
    config: ConfigT,
    module_filter_fn: ModuleFilter | None,
    *,
    title: str,
) -> torch.nn.Module:
    """Swap linear layers for what `build` makes of them; what the conversions have in common.

    `title` names the conversion in the report.
    """
    rows: list[ReportRow] = []

    def convert(linear: torch.nn.Linear, fqn: str) -> torch.nn.Linear:
        decision = _decide(linear, fqn, module_filter_fn, config)
        rows.append(ReportRow(fqn, decision.kind, decision.reason))
        return build(_without_low_precision(linear), config) if decision.swap else linear

    module = _swap_linears(module, convert)
    wrap_weights(module)
    report = Report(title, tuple(rows))
    if not report.converted:
        raise ValueError(_nothing_converted(report))
    attach_report(module, report)
    logger.info("%s", report.summary())
    return module


def unconvert(module: torch.nn.Module) -> torch.nn.Module:
    """Undo `convert_to_float8_training`, `convert_to_mx_training` and `convert_moe_training` in place, same parameters.

    Returns:
        The same module; a new one only when `module` itself is such a layer.

    Raises:
        ValueError: the model has neither such a layer nor converted experts.
    """
    count = 0

    def restore(linear: torch.nn.Linear, fqn: str) -> torch.nn.Linear:
        nonlocal count
        if type(linear) not in (Float8Linear, MXLinear, MXFP8Linear, NVFP4Linear):
            return linear
        count += 1
        return _without_low_precision(linear)

    for experts in list(module.modules()):
        if expert_scaling(experts) is not None:
            restore_experts(experts)
            count += 1
    module = _swap_linears(module, restore)
    if count == 0:
        raise ValueError(
            "unconvert found no Float8Linear, MXLinear or NVFP4Linear and no converted experts in the model; was it "
            "converted?"
        )
    unwrap_weights(module)
    return module


def _without_low_precision(linear: torch.nn.Linear) -> torch.nn.Linear:
    """An `nn.Linear` with the parameters of a layer that a conversion made; any other layer as it is."""
    if not isinstance(linear, _LOW_PRECISION):
        return linear
    plain = clone_as(linear, torch.nn.Linear)
    for cls in _LOW_PRECISION:
        for attribute in cls.__annotations__:
            plain.__dict__.pop(attribute, None)
    return plain


@dataclass(frozen=True, slots=True)
class _Decision:
    kind: Literal["converted", "skipped"]
    reason: str
    swap: bool = False


def _decide(
    linear: torch.nn.Linear,
    fqn: str,
    module_filter_fn: ModuleFilter | None,
    config: LayerConfig | NVFP4TrainingConfig,
) -> _Decision:
    if isinstance(linear, _LOW_PRECISION) and linear.config == config:
        return _Decision("converted", "already converted with this configuration")
    if type(linear).forward not in (torch.nn.Linear.forward, *(cls.forward for cls in _LOW_PRECISION)):
        return _Decision("skipped", f"{type(linear).__name__} has a forward of its own")
    if module_filter_fn is not None and not module_filter_fn(linear, fqn):
        return _Decision("skipped", "rejected by the filter")
    return _Decision("converted", f"{linear.in_features} -> {linear.out_features}", swap=True)


def _swap_linears(module: torch.nn.Module, build: Callable[[torch.nn.Linear, str], torch.nn.Linear]) -> torch.nn.Module:
    """Replace each linear layer by `build(layer, dotted name)`, everywhere it is referenced, visiting it once."""
    if isinstance(module, torch.nn.Linear):
        return build(module, "")
    replacements: dict[torch.nn.Linear, torch.nn.Linear] = {}
    for parent_fqn, parent in list(module.named_modules()):
        for name, child in list(parent._modules.items()):
            if not isinstance(child, torch.nn.Linear):
                continue
            if child not in replacements:
                replacements[child] = build(child, f"{parent_fqn}.{name}" if parent_fqn else name)
            if replacements[child] is not child:
                setattr(parent, name, replacements[child])
    return module


def _nothing_converted(report: Report) -> str:
    if not report.rows:
        return f"{report.title}: found no nn.Linear in the model; there is nothing to convert."
    return (
        f"{report.title}: converted none of the model's {len(report.rows)} linear layers:\n{report}\n"
        "Check module_filter_fn: it is called as (module, dotted name) and must return True for at least one layer."
    )
