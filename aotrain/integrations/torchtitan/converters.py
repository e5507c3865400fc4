"""Low precision by conversion of the model's config tree, before any module exists.

``Float8Converter.Config`` goes into ``model_registry(..., converters=[...])`` of any torchtitan model, before LoRA. The
replacements themselves are ``linear.float8_linear_config`` and ``experts.experts_config``, which the overrides of the
same purpose use as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchtitan.components.quantization import QuantizationConverter
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, TokenChoiceTopKRouter
from torchtitan.protocols.module import Module

from aotrain.integrations.torchtitan.experts import experts_class, experts_config, multiplies_plainly
from aotrain.integrations.torchtitan.linear import check_recipe, float8_linear_config
from aotrain.nn import Report, ReportRow
from aotrain.nn.skips import matches_skip
from aotrain.ops import grouped_recipe

log = logging.getLogger("aotrain.pretrain")


class Float8Converter(QuantizationConverter):
    """Replaces every plain ``Linear.Config`` and every experts config of a model, except those that ``skip`` names.

    Gates of routers are never converted: a wrong choice of expert costs more than their product takes.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(QuantizationConverter.Config):
        recipe: str | None = "float8_rowwise"
        """Of linear layers: a name in ``aotrain.recipes.RECIPES``, or nvfp4; None leaves them alone."""

        experts: str | None = None
        """Of the experts of MoE layers, likewise."""

        skip: list[str] = field(default_factory=lambda: ["lm_head"])
        """Layers to leave alone: globs over the dotted name, or any part of it."""

        emulate: bool = False
        """Round to float8 values but multiply in high precision."""

        fsdp_float8_all_gather: bool = False
        """Let FSDP2 gather the weights of linear layers as codes, one byte per element."""

    def __init__(self, config: Config, **unused: Any) -> None:
        if config.recipe is None and config.experts is None:
            raise ValueError("recipe and experts are both None: there is nothing to convert; name one of them")
        if config.recipe is not None:
            check_recipe(config.recipe)
        if config.experts is not None:
            grouped_recipe(config.experts)
        self.config = config
        # Of the last conversion.
        self.report: Report | None = None

    def convert(self, model_config: Module.Config) -> Module.Config:
        """Convert in place and return the same tree.

        Raises:
            ValueError: no layer of a kind that has a recipe was converted, or an entry of ``skip`` matched no layer.
        """
        linears, experts = (list(model_config.traverse(kind)) for kind in (Linear.Config, GroupedExperts.Config))
        self._require_used_skips(
            [fqn for fqn, *_ in (*linears, *experts)], "linear or experts" if experts else "linear"
        )
        rows = []
        for kind, recipe, nodes, replace in (
            ("recipe", self.config.recipe, linears, self._linear),
            ("experts", self.config.experts, experts, self._experts),
        ):
            if recipe is not None:
                found = Report(f"{kind} {recipe}", tuple(self._swap(recipe, nodes, replace)))
                _require_effect(found)
                log.info("%s", found.summary())
                rows += found.rows
        self.report = Report(self.config.recipe or f"experts {self.config.experts}", tuple(rows))
        log.debug("%s", self.report)
        return model_config

    def _swap(
        self, recipe: str, nodes: Sequence[tuple[Any, ...]], replace: Callable[[Any, Any], Module.Config | str]
    ) -> Iterator[ReportRow]:
        for fqn, config, parent, attr in nodes:
            hit = next((pattern for pattern in self.config.skip if matches_skip(fqn, pattern)), None)
            new = replace(config, parent) if hit is None else f"matches skip {hit!r}"
            if isinstance(new, str):
                yield ReportRow(fqn, "skipped", new)
            else:
                _put(parent, attr, new)
                yield ReportRow(fqn, "converted", recipe)

    def _linear(self, linear: Linear.Config, parent: Any) -> Module.Config | str:
        """The new config, or why there is none."""
        if isinstance(parent, TokenChoiceTopKRouter.Config):
            return "the gate of a router"
        if type(linear) is not Linear.Config:
            return f"{type(linear).__qualname__} computes something of its own"
        assert self.config.recipe is not None
        return float8_linear_config(
            linear,
            recipe=self.config.recipe,
            emulate=self.config.emulate,
            fsdp_float8_all_gather=self.config.fsdp_float8_all_gather,
        )

    def _experts(self, experts: GroupedExperts.Config, parent: Any) -> Module.Config | str:
        """The new config, or why there is none."""
        if not multiplies_plainly(experts):
            return f"{experts_class(experts).__qualname__} multiplies in a way of its own"
        assert self.config.experts is not None
        return experts_config(experts, recipe=self.config.experts, emulate=self.config.emulate)

    def _require_used_skips(self, names: Sequence[str], kinds: str) -> None:
        unused = [each for each in self.config.skip if not any(matches_skip(name, each) for name in names)]
        if unused:
            shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            patterns = ", ".join(map(repr, sorted(unused)))
            raise ValueError(f"skip: {patterns} matches no {kinds} layer; the model has {shown or 'none'}")


def _put(parent: Any, attr: Any, new: Module.Config) -> None:
    """Set a node of the tree; what ``traverse`` yields is an object and a field, or a list and an index."""
    if isinstance(attr, int):
        parent[attr] = new
    else:
        setattr(parent, attr, new)


def _require_effect(report: Report) -> None:
    if not report.rows:
        raise ValueError(f"{report.title}: the model has no such layers; set it to null")
    if not report.converted:
        raise ValueError(f"{report.title}: no layer was converted. {report.summary()}; remove some skip")
