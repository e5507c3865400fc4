"""MoE conversion: the grouped GEMMs of a model's experts in low precision, in place, and back.

Converted are modules with 3-D parameters of their own, [E, N, K] or [E, K, N], that multiply groups of rows by them
with `torch._grouped_mm`: torchtitan's and transformers' experts, and whatever works like them. Routers, gates,
attention and the output layer are `nn.Linear`s and stay as they are; `convert_to_float8_training` converts those that
its filter names, before or after, with the same result.
"""

import logging
from typing import Protocol, runtime_checkable

import torch

from aotrain.nn.experts import ExpertScaling, expert_scaling, expert_weights, scale_experts
from aotrain.nn.filters import ModuleFilter
from aotrain.nn.report import Report, ReportRow, attach_report
from aotrain.ops import Nvfp4Method, grouped_recipe
from aotrain.ops.fake_quantized_grouped_mm import FakeQuantizedMethod
from aotrain.recipes import LinearRecipe

logger = logging.getLogger(__name__)


@runtime_checkable
class RecipeConfig(Protocol):
    """A configuration object that means a recipe; an attribute `emulate` is respected."""

    def to_recipe(self) -> LinearRecipe | Nvfp4Method:
        """The recipe it means."""
        ...


def convert_moe_training(
    module: torch.nn.Module,
    recipe: str | LinearRecipe | RecipeConfig = "float8_rowwise",
    *,
    module_filter_fn: ModuleFilter | None = None,
    emulate: bool = False,
) -> torch.nn.Module:
    """Convert a model's experts to low-precision training, in place.

    Parameters stay the same objects of the same names and dtype, so checkpoints, optimizers, FSDP2 and expert
    parallelism see the original model; convert before or after any of them. A converted module that trains without
    calling a grouped GEMM on its weights raises RuntimeError in forward. What happened to each module is logged, and
    kept for `aotrain.nn.conversion_report`; `aotrain.nn.unconvert` undoes it.

    Args:
        module: the model, on any device, meta included.
        recipe: a name in `aotrain.recipes.RECIPES` or "nvfp4", a `LinearRecipe`, or a configuration object with
            `to_recipe()`, such as `Float8LinearConfig` and `NVFP4TrainingConfig`. The same formats as of a linear
            layer, for every expert by itself; mxfp4 is not for groups of rows.
        module_filter_fn: `(module, dotted name) -> bool`, which of the modules with 3-D parameters to convert; default
            all, but those of torch.nn (convolutions) and those whose first dimension is always 1 (position embeddings).
        emulate: compute in bfloat16 arithmetic with the recipe's numerics, on hardware without it. CPU always emulates.

    Returns:
        The same module.

    Raises:
        ValueError: unknown recipe; or no module was converted and none had been before: the model has no module with
            3-D parameters, or the filter rejected every one.
        TypeError: `recipe` is none of the three.
    """
    name, scaling = _scaling_of(recipe, emulate)
    rows = []
    for fqn, candidate in module.named_modules():
        if not may_be_experts(candidate):
            continue
        problem = experts_problem(candidate, fqn, module_filter_fn)
        if problem is not None:
            rows.append(ReportRow(fqn, "skipped", problem))
            continue
        scale_experts(candidate, ExpertScaling(recipe=scaling.recipe, emulate=scaling.emulate, fqn=fqn))
        rows.append(ReportRow(fqn, "converted", f"{name}, {_shapes(candidate)}"))
    report = Report("MoE training", tuple(rows), what="experts modules")
    if not report.converted:
        raise ValueError(_nothing_converted(module, report))
    attach_report(module, report)
    logger.info("%s", report.summary())
    return module


def _scaling_of(recipe: str | LinearRecipe | RecipeConfig, emulate: bool) -> tuple[str, ExpertScaling]:
    """How to name it, and what it is."""
    if isinstance(recipe, str):
        return recipe, ExpertScaling(recipe=grouped_recipe(recipe), emulate=emulate)
    if isinstance(recipe, LinearRecipe):
        return f"output=({recipe.output})", ExpertScaling(recipe=recipe, emulate=emulate)
    if isinstance(recipe, RecipeConfig):
        emulate = emulate or bool(getattr(recipe, "emulate", False))
        return type(recipe).__name__, ExpertScaling(recipe=recipe.to_recipe(), emulate=emulate)
    raise TypeError(
        f"convert_moe_training got recipe={recipe!r}; want the name of a recipe, a LinearRecipe, or a configuration "
        "object with to_recipe()."
    )


def may_be_experts(module: torch.nn.Module) -> bool:
    """Whether a module has 3-D parameters of its own."""
    if isinstance(module, torch.nn.ParameterList | torch.nn.ParameterDict):
        return False
    return any(weight.dim() == 3 and weight.is_floating_point() for weight in expert_weights(module).values())


def experts_problem(module: torch.nn.Module, fqn: str, module_filter_fn: ModuleFilter | None) -> str | None:
    """Why a module with 3-D parameters is not converted; None when it is.

    Args:
        module: which `may_be_experts`.
        fqn: its dotted name.
        module_filter_fn: see `convert_moe_training`.
    """
    if type(module).__module__.startswith("torch.nn."):
        return f"{type(module).__name__} has no grouped GEMM"
    if module_filter_fn is not None:
        if not module_filter_fn(module, fqn):
            return "rejected by the filter"
    elif expert_scaling(module) is None and all(w.shape[0] == 1 for w in _three_dimensional(module).values()):
        return "a single group; name it with module_filter_fn if it is an expert"
    scaling = expert_scaling(module)
    if scaling is not None and isinstance(scaling.recipe, FakeQuantizedMethod):
        return "prepared for QAT; unprepare_moe_qat goes back"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance; convert before that (before accelerate prepares the model)"
    return None


def _three_dimensional(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in expert_weights(module).items() if weight.dim() == 3}


def _shapes(module: torch.nn.Module) -> str:
    return ", ".join(f"{name} {tuple(weight.shape)}" for name, weight in _three_dimensional(module).items())


def _nothing_converted(module: torch.nn.Module, report: Report) -> str:
    if report.rows:
        return (
            f"convert_moe_training converted none of the {len(report.rows)} modules with 3-D parameters:\n{report}\n"
            "Check module_filter_fn: it is called as (module, dotted name) and must return True for at least one."
        )
    kinds = sorted({type(each).__name__ for each in module.modules()})
    shown = ", ".join(kinds[:12]) + (", ..." if len(kinds) > 12 else "")
    return (
        "convert_moe_training found no module with 3-D parameters [E, N, K] of its own among "
        f"{shown}. Experts that are nn.Linear layers of their own are converted by convert_to_float8_training; experts "
        "with one 2-D parameter each have to be stacked into one 3-D parameter."
    )
