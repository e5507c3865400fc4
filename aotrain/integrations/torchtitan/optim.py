"""Our optimizers under torchtitan's optimizer container.

The container builds one optimizer per name in its config. Names it does not know are resolved here; everything else
(parameter groups by regex, checkpoint layout, learning-rate schedules) stays torchtitan's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from aotrain.integrations.optimizers import ALIASES, OPTIMIZERS, optimizer_class
from aotrain.integrations.torchtitan import job as jobs

# Names of a job file -> names of the container; the others of the table take other hyper-parameters than AdamW.
TITAN_NAMES = {"adamw": "AdamW", **{name: cls for name, cls in OPTIMIZERS.items() if name.startswith("adamw_")}}

# The token embedding of all of torchtitan's models.
EMBEDDING = r"(^|\.)tok_embeddings\."


class LowBitOptimizers(OptimizersContainer):
    """``OptimizersContainer`` that also knows our low-bit AdamW classes by name."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name in OPTIMIZERS.values():
            return optimizer_class(name)
        return OptimizersContainer._resolve_optimizer_factory(name)


def optimizer_config(settings: jobs.Optimizer) -> LowBitOptimizers.Config:
    """The container config of a job's optimizer section: a group per precision, the last with all other parameters."""
    kwargs: dict[str, object] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    name = TITAN_NAMES[settings.name]
    bits: dict[str, int | str] = {}
    factory_kwargs: dict[str, dict[str, object]] = {}
    if settings.name != "adamw":
        factory_kwargs[name] = {"bf16_stochastic_round": settings.bf16_stochastic_round}
        bits = dict(settings.bits)
        if settings.embedding_bits != "own":
            bits.setdefault(EMBEDDING, settings.embedding_bits)
    groups = [
        ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs={**kwargs, "bits": value})
        for pattern, value in bits.items()
    ]
    groups.append(ParamGroupConfig(pattern=r".*", optimizer_name=name, optimizer_kwargs=kwargs))
    return LowBitOptimizers.Config(param_groups=groups, optimizer_factory_kwargs_by_name=factory_kwargs)


def with_low_bit(config: OptimizersContainer.Config, name: str) -> LowBitOptimizers.Config:
    """A stock optimizer config with its Adam and AdamW groups replaced by optimizer ``name`` (as in a job file).

    The token embedding keeps float32 state, as in a job file.

    Raises:
        ValueError: unknown name, or no group to replace.
    """
    name = ALIASES.get(name, name)
    if name not in TITAN_NAMES:
        raise ValueError(f"unknown optimizer {name!r}; want one of {', '.join(TITAN_NAMES)}")
    groups = []
    for group in config.param_groups:
        is_adam = group.optimizer_name in ("Adam", "AdamW")
        groups.append(replace(group, optimizer_name=TITAN_NAMES[name]) if is_adam else group)
    if groups == list(config.param_groups) and name != "adamw":
        names = ", ".join(group.optimizer_name for group in config.param_groups)
        raise ValueError(f"no Adam or AdamW parameter group to replace by {name}; the config has {names or 'none'}")
    if name != "adamw":
        groups = _with_exact_embedding(groups)
    return LowBitOptimizers.Config(
        param_groups=groups,
        implementation=config.implementation,
        optimizer_factory_kwargs_by_name=config.optimizer_factory_kwargs_by_name,
    )


def _with_exact_embedding(groups: list[ParamGroupConfig]) -> list[ParamGroupConfig]:
    """The groups with 32 bits for the token embedding, if one of ours takes it."""
    for index, group in enumerate(groups):
        if re.search(group.pattern, "tok_embeddings.weight"):
            if group.optimizer_name not in OPTIMIZERS.values():
                break
            kwargs = {"bits": 32, **group.optimizer_kwargs}
            embedding = replace(group, pattern=EMBEDDING, optimizer_kwargs=kwargs)
            return [*groups[:index], embedding, *groups[index:]]
    return groups
