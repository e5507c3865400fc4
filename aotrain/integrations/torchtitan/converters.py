"""Low precision by conversion of the model's config tree, before any module exists.

``Float8Converter.Config`` goes into ``model_registry(..., converters=[...])`` of any torchtitan model, before LoRA. The
replacement itself is ``linear.float8_linear_config``, which the override of the same purpose uses as well.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torchtitan.components.quantization import QuantizationConverter
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.module import Module

from aotrain.integrations.torchtitan.linear import float8_linear_config
from aotrain.nn import Report, ReportRow
from aotrain.nn.skips import matches_skip
from aotrain.recipes import get_recipe

log = logging.getLogger("aotrain.pretrain")


class Float8Converter(QuantizationConverter):
    """Replaces every plain ``Linear.Config`` of a model config, except those that ``skip`` names."""

    @dataclass(kw_only=True, slots=True)
    class Config(QuantizationConverter.Config):
        recipe: str = "float8_rowwise"
        """A name in ``aotrain.recipes.RECIPES``."""

        skip: list[str] = field(default_factory=lambda: ["lm_head"])
        """Layers to leave alone: globs over the dotted name, or any part of it."""

        emulate: bool = False
        """Round to float8 values but multiply in high precision."""

        fsdp_float8_all_gather: bool = False
        """Let FSDP2 gather codes, one byte per element."""

    def __init__(self, config: Config, **unused: Any) -> None:
        get_recipe(config.recipe)
        self.config = config
        # Of the last conversion.
        self.report: Report | None = None

    def convert(self, model_config: Module.Config) -> Module.Config:
        """Convert in place and return the same tree.

        Raises:
            ValueError: nothing was converted, or an entry of ``skip`` matched no layer.
        """
        rows = []
        unused = set(self.config.skip)
        for fqn, linear, parent, attr in list(model_config.traverse(Linear.Config)):
            hits = [pattern for pattern in self.config.skip if matches_skip(fqn, pattern)]
            unused.difference_update(hits)
            if hits:
                rows.append(ReportRow(fqn, "skipped", f"matches skip {hits[0]!r}"))
            elif type(linear) is not Linear.Config:
                rows.append(ReportRow(fqn, "skipped", f"{type(linear).__qualname__} computes something of its own"))
            else:
                new = float8_linear_config(
                    linear,
                    recipe=self.config.recipe,
                    emulate=self.config.emulate,
                    fsdp_float8_all_gather=self.config.fsdp_float8_all_gather,
                )
                _put(parent, attr, new)
                rows.append(ReportRow(fqn, "converted", self.config.recipe))
        self.report = Report(self.config.recipe, tuple(rows))
        _require_effect(self.report, sorted(unused), rows)
        log.info("%s", self.report.summary())
        log.debug("%s", self.report)
        return model_config


def _put(parent: Any, attr: Any, new: Linear.Config) -> None:
    """Set a node of the tree; what ``traverse`` yields is an object and a field, or a list and an index."""
    if isinstance(attr, int):
        parent[attr] = new
    else:
        setattr(parent, attr, new)


def _require_effect(report: Report, unused: Sequence[str], rows: Sequence[ReportRow]) -> None:
    names = ", ".join(row.fqn for row in rows[:6]) + (", ..." if len(rows) > 6 else "")
    if unused:
        raise ValueError(
            f"skip: {', '.join(map(repr, unused))} matches no linear layer; the model has {names or 'none'}"
        )
    if not report.converted:
        raise ValueError(f"recipe {report.title}: no layer was converted. {report.summary()}; remove some skip")
