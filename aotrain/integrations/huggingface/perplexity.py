"""Mean negative log-likelihood of held-out rows, as a TRL trainer batches them."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader
from trl import SFTTrainer


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
