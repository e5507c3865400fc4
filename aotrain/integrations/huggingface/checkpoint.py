"""Continue a Trainer run with one of our optimizers that began with another.

A Trainer checkpoint holds optimizer.pt, whose two groups (decayed or not) have no names, and scheduler.pt with one
entry per group. Ours has more groups, by precision, so both are rewritten; weights and everything else are copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aotrain.integrations.huggingface.optim import OptimizerFactory
from aotrain.optim import convert_state

if TYPE_CHECKING:
    from transformers import Trainer

# What a scheduler keeps for each parameter group; the Trainer's schedulers treat all groups alike.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas")


def convert_trainer_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], trainer: Trainer
) -> None:
    """Make a checkpoint that `trainer.train(resume_from_checkpoint=target)` continues with its own optimizer.

    Args:
        source: checkpoint folder of a run of the same model with the Trainer's AdamW, bitsandbytes' or torchao's
            Adam(W), or one of ours with other options; not modified. Import torchao.optim before reading one of its.
        target: folder to create.
        trainer: with `optimizer_cls_and_kwargs` from this package.

    Raises:
        FileExistsError: target exists.
        FileNotFoundError: source has no optimizer.pt, as a checkpoint of a sharded run.
        ValueError: the trainer has no optimizer of ours, or the state is of other parameters or of unknown layout.
    """
    source, target = Path(source), Path(target)
    factory, settings = trainer.optimizer_cls_and_kwargs or (None, {})
    if factory is not OptimizerFactory:
        raise ValueError(
            f"convert_trainer_checkpoint got a trainer with optimizer_cls_and_kwargs={trainer.optimizer_cls_and_kwargs}"
            "; want Trainer(..., optimizer_cls_and_kwargs=optimizer_cls_and_kwargs('adamw_8bit', args))."
        )
    saved = torch.load(source / "optimizer.pt", map_location="cpu", weights_only=True)
    schedule = torch.load(source / "scheduler.pt", map_location="cpu", weights_only=True)
    model = trainer.model
    assert model is not None, "a Trainer that is built has a model"
    if not all(group.get("param_names") for group in saved["param_groups"] if group["params"]):
        saved["param_groups"] = _named(saved["param_groups"], model, set(trainer.get_decay_parameter_names(model)))
    converted = convert_state(saved, factory()(model, **settings))
    schedule = _for_groups(schedule, len(converted["param_groups"]))
    shutil.copytree(source, target)
    torch.save(converted, target / "optimizer.pt")
    torch.save(schedule, target / "scheduler.pt")


def _named(groups: list[dict[str, Any]], model: torch.nn.Module, decayed: set[str]) -> list[dict[str, Any]]:
    """The Trainer's two groups with the names that it had when it made them."""
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    members = [[name for name in names if name in decayed], [name for name in names if name not in decayed]]
    got, want = [len(group["params"]) for group in groups], [len(part) for part in members]
    if got != want:
        raise ValueError(
            f"optimizer.pt has groups of {got} parameters, want {want}, as the Trainer makes them of this model "
            "(decayed, not decayed); it belongs to another model or another set of trainable parameters."
        )
    return [{**group, "param_names": part} for group, part in zip(groups, members, strict=True)]


def _for_groups(schedule: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The state of a scheduler with that many parameter groups."""
    repeated = {key: schedule[key] for key in _PER_GROUP if key in schedule}
    for key, values in repeated.items():
        if any(value != values[0] for value in values):
            raise ValueError(f"scheduler.pt has different {key} for its groups, {values}; want one for all.")
    return {**schedule, **{key: list(values[:1]) * count for key, values in repeated.items()}}
