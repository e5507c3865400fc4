"""Low-precision experts by name, in transformers' registry of experts implementations.

    register_experts()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="aotrain_float8_rowwise")
    model.set_experts_implementation("grouped_mm")  # and back

The same computation as `convert_moe_training(model, recipe)` on a model with the implementation "grouped_mm", which
is transformers' default: its own routing, sorting, gating and biases, with every expert's products in the recipe's
formats.
"""

import functools
from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from aotrain.nn.grouped_mm_mode import GroupedMMInterception, find_grouped_mms
from aotrain.recipes import RECIPES, LinearRecipe

_PREFIX = "aotrain_"


def register_experts() -> list[str]:
    """Register `aotrain_RECIPE` for every recipe; safe to call again.

    Returns:
        The names, for `experts_implementation=`.
    """
    find_grouped_mms()
    for name, recipe in RECIPES.items():
        ExpertsInterface.register(_PREFIX + name, functools.partial(_experts_forward, recipe=recipe))
    return [_PREFIX + name for name in RECIPES]


def _experts_forward(experts: torch.nn.Module, *args: Any, recipe: LinearRecipe, **kwargs: Any) -> torch.Tensor:
    with GroupedMMInterception(experts.parameters(recurse=False), recipe, inputs=(*args, *kwargs.values())):
        return grouped_mm_experts_forward(experts, *args, **kwargs)
