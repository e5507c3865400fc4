"""Perplexity of held-out rows, and the table of what quantization costs and training recovers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.data import DataLoader
from trl import SFTTrainer

# Below this loss of perplexity by quantization a part recovered is noise.
_SMALLEST_GAP = 0.02


@torch.no_grad()
def mean_nll(model: torch.nn.Module, trainer: SFTTrainer) -> float:
    """Mean negative log-likelihood per predicted token, in nats, of the rows that a trainer was given to evaluate on.

    Tokens count that the training loss counts. Every rank goes through all rows, which keeps FSDP's collectives in
    step and needs no communication.

    Args:
        model: the trainer's, as it is wrapped, or another with the same tokenizer.
        trainer: its tokenized eval_dataset, collator and batch size are used.
    """
    batches = DataLoader(
        trainer.eval_dataset,  # pyrefly: ignore[bad-argument-type]
        batch_size=trainer.args.per_device_eval_batch_size,
        collate_fn=trainer.data_collator,
    )
    device, was_training = trainer.args.device, model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        labels = batch.pop("labels")[:, 1:]
        with trainer.compute_loss_context_manager():
            logits = model(**batch, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        total, count = total + losses.item(), count + int((labels != -100).sum())
    model.train(was_training)
    return total / max(count, 1)


def summarize(nll: dict[str, float | None]) -> dict[str, Any]:
    """What summary.json says of the measured values.

    Args:
        nll: row of the table -> nats per token, None where it could not be measured. The rows control, control_rounded
            and qat give the part of quantization's damage that training has recovered.
    """
    perplexity = {name: None if value is None else math.exp(value) for name, value in nll.items()}
    control, rounded, trained = (nll.get(name) for name in ("control", "control_rounded", "qat"))
    recovered, why = None, "needs evaluate.control: true"
    if control is not None and rounded is not None and trained is not None:
        gap = math.exp(rounded - control) - 1
        why = f"rounding costs {100 * gap:+.2f} % of perplexity, less than 2 %: nothing to recover that is not noise"
        if gap >= _SMALLEST_GAP:
            recovered, why = (rounded - trained) / (rounded - control), None
    return {"nll": nll, "perplexity": perplexity, "recovered": recovered, "recovered_note": why}


_LABELS = {
    "start": "before training, dense",
    "start_rounded": "before training, rounded to the scheme (PTQ)",
    "trained": "trained, dense",
    "control": "control: same steps without quantization",
    "control_rounded": "control, rounded to the scheme (PTQ)",
    "qat": "trained through quantization (QAT)",
    "exported": "exported and reloaded",
}


def table(summary: dict[str, Any], scheme: str | None) -> str:
    """The measured rows as text, one line each."""
    lines = [f"held-out perplexity{f', {scheme}' if scheme else ''}"]
    for name, nll in summary["nll"].items():
        shown = "not measured" if nll is None else f"{summary['perplexity'][name]:10.4f}   nll {nll:.5f}"
        lines.append(f"  {_LABELS[name]:46} {shown}")
    if summary["recovered"] is not None:
        lines.append(f"  recovered of the damage (nll): {100 * summary['recovered']:.1f} %")
    elif scheme is not None:
        lines.append(f"  recovered: {summary['recovered_note']}")
    return "\n".join(lines)
