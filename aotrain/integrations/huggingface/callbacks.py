"""Trainer callbacks: when fake quantization acts, and whether FSDP really shards."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aotrain.integrations.config_file import JobError


class QATCallback(TrainerCallback):
    """Turns the fake quantizers of a prepared model on, at the step of a schedule.

    Prepare the model before the Trainer is built: a callback comes too late to swap modules, because the optimizer and
    FSDP hold the parameters by then.
    """

    def __init__(self, start_step: int = 0, anneal_steps: int = 0) -> None:
        """
        Args:
            start_step: optimizer steps without fake quantization.
            anneal_steps: optimizer steps over which it is then turned on gradually.
        """
        from aotrain.qat import QATSchedule

        self.schedule = QATSchedule(start_step=start_step, anneal_steps=anneal_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the fake quantizers for the step that begins; a resumed run goes on where it was."""
        self.schedule.apply(kwargs["model"], state.global_step)


class ShardingCheck(TrainerCallback):
    """Stops a run before its first step when FSDP was asked for and something else wraps the model.

    Accelerate takes FSDP only on accelerators and through its launcher or the `fsdp` argument; everywhere else the
    same request silently becomes DistributedDataParallel.
    """

    def __init__(self, trainer: Trainer, *, wants_fsdp: bool) -> None:
        self.trainer = trainer
        self.wants_fsdp = wants_fsdp

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the wrapped model with the request."""
        wrapped = self.trainer.model_wrapped
        if self.wants_fsdp and not is_sharded(wrapped):
            raise JobError(
                f"FSDP was asked for, but accelerate wrapped the model as {type(wrapped).__name__} on "
                f"{args.device}: want GPUs and torchrun with trainer.fsdp: full_shard, or accelerate launch with an "
                "FSDP config; or remove the request"
            )


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP, of the first or second kind, manages a model or a part of it."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
