"""torchtitan's experts with grouped GEMMs in low precision.

All of torchtitan's experts (``GroupedExperts`` of DeepSeek-V3 and Qwen3, GPT-OSS's with biases, the fused SwiGLU ones)
multiply through one method, ``_grouped_mm(A [R, K], B_t [E, K, N], offs [E])``, on plain local tensors: this rank's
experts under expert parallelism, a part of each under tensor parallelism. The low-precision version of a class differs
in that method only, so parameters, initialization, sharding, dispatch and checkpoints are those of the original.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.config.override import derive
from torchtitan.models.common.moe import GroupedExperts

from aotrain.ops import grouped_recipe, scaled_grouped_mm


def experts_config(config: GroupedExperts.Config, *, recipe: str, emulate: bool = False) -> GroupedExperts.Config:
    """The low-precision version of an experts config; all its fields are carried over.

    Raises:
        ValueError: unknown recipe, or experts that do not multiply through torchtitan's ``_grouped_mm``.
    """
    grouped_recipe(recipe)
    parent = experts_class(config)
    if not multiplies_plainly(config):
        raise ValueError(f"cannot replace {parent.__qualname__}: it multiplies in a way of its own; leave it out")
    return derive(config, low_precision_experts(parent).Config, recipe=recipe, emulate=emulate)


def experts_class(config: GroupedExperts.Config) -> type[GroupedExperts]:
    """The class that the config builds."""
    owner: Any = type(config)._owner
    return owner


def multiplies_plainly(config: GroupedExperts.Config) -> bool:
    """Whether the experts' products are torchtitan's own: not converted, by us or by another converter."""
    return experts_class(config)._grouped_mm is GroupedExperts._grouped_mm


@functools.cache
def low_precision_experts(parent: type[GroupedExperts]) -> Any:
    """The class ``LowPrecision<parent>``; its Config has two fields more, ``recipe`` and ``emulate``."""
    base: Any = parent

    class LowPrecisionExperts(base):
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            recipe: str = "float8_rowwise"
            """A name in ``aotrain.recipes.RECIPES``, or nvfp4."""

            emulate: bool = False
            """Round to the recipe's values but multiply in high precision."""

        def __init__(self, config: Any) -> None:
            base.__init__(self, config)
            self.recipe = grouped_recipe(config.recipe)
            self.emulate = config.emulate

        def _grouped_mm(self, *, A: torch.Tensor, B_t: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
            return scaled_grouped_mm(A, B_t, offs, self.recipe, emulate=self.emulate)

    LowPrecisionExperts.__name__ = LowPrecisionExperts.__qualname__ = f"LowPrecision{parent.__name__}"
    return LowPrecisionExperts
