"""A recipe's optimizer and learning-rate schedule in torchtitan's containers.

Parameter groups are those of the other engine: norms are not decayed, and the token embedding has float32 state. The
schedules are transformers' formulas, because torchtitan's start and end elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

from aotrain.integrations.config_file import JobError
from aotrain.integrations.finetune.names import TORCH_ADAMW
from aotrain.integrations.optim_args import parse_optim_args
from aotrain.integrations.optimizers import OPTIMIZERS
from aotrain.integrations.torchtitan.optim import EMBEDDING, LowBitOptimizers

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Optimizer
    from aotrain.integrations.torchtitan.finetune_keys import TrainerKeys

# Of all norms of torchtitan's models.
_NORM = r"(^|[._])norm\."
# Options of the class itself; the others belong to a parameter group.
_OF_ALL = ("bf16_stochastic_round", "seed", "maximize", "amsgrad")


def optimizer_config(settings: Optimizer, optim_args: str | None) -> LowBitOptimizers.Config:
    """The container's config.

    Raises:
        JobError: options that the optimizer does not have.
    """
    group: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if not settings.name.startswith("lion"):
        group["eps"] = settings.eps
    if settings.name == TORCH_ADAMW:
        return LowBitOptimizers.Config(param_groups=_groups("AdamW", group, {}))
    try:
        options = parse_optim_args(optim_args, settings.name)
    except ValueError as error:
        raise JobError(f"trainer.{error}") from error
    if options.pop("offload", False):
        raise JobError("trainer.optim_args: offload does not go with FSDP2, by which torchtitan always shards")
    embedding = {"bits": bits} if (bits := options.pop("embedding_bits", 32)) is not None else {}
    name = OPTIMIZERS[settings.name]
    factory = {key: options.pop(key) for key in _OF_ALL if key in options}
    return LowBitOptimizers.Config(
        param_groups=_groups(name, group | options, embedding), optimizer_factory_kwargs_by_name={name: factory}
    )


def _groups(name: str, group: dict[str, Any], embedding: dict[str, Any]) -> list[ParamGroupConfig]:
    """First match wins."""
    by_pattern = {_NORM: {**group, "weight_decay": 0.0}, EMBEDDING: group | embedding, r".*": group}
    return [
        ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs=kwargs)
        for pattern, kwargs in by_pattern.items()
    ]


def lr_factor(step: int, *, kind: str, warmup: int, total: int) -> float:
    """Learning rate at a step, counted from 0, as a part of the peak: transformers' schedules of these names."""
    if step < warmup and kind != "constant":
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return max(0.0, 1.0 - progress)
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return 1.0


class Schedules(LRSchedulersContainer):
    """torchtitan's container with one of transformers' schedules."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        kind: str = "linear"
        """Name of the schedule."""

        def build(self, *, optimizers: OptimizersContainer, training_steps: int) -> LRSchedulersContainer:
            """The container of one scheduler per optimizer."""
            factor: Callable[[int], float] = partial(
                lr_factor, kind=self.kind, warmup=self.warmup_steps, total=training_steps
            )
            return LRSchedulersContainer(optimizers, factor)


def schedule_config(keys: TrainerKeys, steps: int) -> Schedules.Config:
    """The schedule of a run of that many steps."""
    return Schedules.Config(kind=keys.lr_scheduler_type, warmup_steps=keys.warmup(steps))
