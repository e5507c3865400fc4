"""torchtitan's trainer with a schedule of fake quantization and a measure of held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.loss import IGNORE_INDEX

from aotrain.integrations.torchtitan.finetune_data import TokenRows, collate
from aotrain.integrations.torchtitan.trainer import RunTrainer
from aotrain.qat import QATSchedule

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class FinetuneTrainer(RunTrainer):
    """Sets the fake quantizers before every step."""

    @dataclass(kw_only=True, slots=True)
    class Config(RunTrainer.Config):
        quantized: bool = False
        """Whether the model has fake quantizers."""

        start_step: int = 0
        """Steps without fake quantization first."""

        anneal_steps: int = 0
        """Steps over which it is then turned on."""

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute]

    @property
    def model(self) -> torch.nn.Module:
        """The model, which is one part: there is no pipeline."""
        (model,) = self.model_parts
        return model

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """One optimizer step, quantized as the schedule says for the number of steps done before."""
        if self.config.quantized:
            schedule = QATSchedule(start_step=self.config.start_step, anneal_steps=self.config.anneal_steps)
            schedule.apply(self.model, self.step - 1)
        super().train_step(data_iterator)

    def mean_nll(self, rows: TokenRows, batch_size: int, *, quantized: bool = True) -> float:
        """Mean negative log-likelihood per label, in nats, with the fake quantizers fully on or off.

        Every rank goes through all rows, which keeps FSDP's collectives in step.
        """
        model: Any = self.model
        if self.config.quantized:
            QATSchedule(start_step=0 if quantized else 1).apply(model, 0)
        seen, skips = self.ntokens_seen, model._skip_lm_head
        model.eval()
        model._skip_lm_head = False
        try:
            return mean_nll(self._logits, rows, batch_size, self.device)
        finally:
            model.train()
            model._skip_lm_head, self.ntokens_seen = skips, seen

    def _logits(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        tokens, _, others = self.post_dataloading_process(inputs, labels)
        with self.train_context():
            return self.model(tokens, **others)


@torch.no_grad()
def mean_nll(
    logits: Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor],
    rows: TokenRows,
    batch_size: int,
    device: torch.device,
) -> float:
    """Mean negative log-likelihood per label, in nats.

    Args:
        logits: of a batch as ``collate`` makes it, [B, L, vocabulary].
        rows: one document each.
        batch_size: of the forward passes.
        device: where the batch is wanted.
    """
    total, count = 0.0, 0
    for first in range(0, len(rows), batch_size):
        inputs, labels = collate(rows[first : first + batch_size])
        labels = labels.to(device)
        found = logits({name: value.to(device) for name, value in inputs.items()}, labels)
        losses = torch.nn.functional.cross_entropy(
            found.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        total, count = total + losses.item(), count + int((labels != IGNORE_INDEX).sum())
    return total / max(count, 1)
