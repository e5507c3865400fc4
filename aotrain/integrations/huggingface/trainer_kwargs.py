"""What a recipe adds to a Trainer that somebody else builds.

recipe = load_recipe("recipe.yaml")
prepare_qat(model, recipe.quantize.scheme)  # before the Trainer, which optimizes the parameters it finds
trainer = SFTTrainer(model, args=args, train_dataset=rows, **trainer_kwargs(recipe))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from aotrain.integrations.huggingface.optim import OptimizerFactory, optimizer_settings

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Recipe


def trainer_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of `transformers.Trainer`, `trl.SFTTrainer` and the like for a recipe.

    The Trainer does not pass its TrainingArguments to an optimizer of ours, so learning rate, betas, epsilon and weight
    decay are copied from the recipe. Give TrainingArguments the same learning rate and weight decay: it logs the one,
    and decays by the other when the optimizer is torch's.

    Returns:
        optimizer_cls_and_kwargs, and callbacks: `QATCallback` if the recipe quantizes.

    Raises:
        ValueError: unknown options in `trainer.optim_args`.
    """
    from aotrain.integrations.finetune.names import TORCH_ADAMW
    from aotrain.integrations.huggingface.callbacks import QATCallback

    optimizer = recipe.optimizer
    if optimizer.name == TORCH_ADAMW:
        chosen: tuple[Any, dict[str, Any]] = (
            torch.optim.AdamW,
            {"lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.eps},
        )
    else:
        options = [recipe.trainer.get("optim_args") or "", "offload=true" if optimizer.offload else ""]
        settings = optimizer_settings(
            optimizer.name,
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            optim_args=",".join(filter(None, options)),
        )
        chosen = (OptimizerFactory, settings)
    callbacks = []
    if recipe.quantize is not None:
        callbacks.append(QATCallback(recipe.quantize.start_step, recipe.quantize.anneal_steps))
    return {"optimizer_cls_and_kwargs": chosen, "callbacks": callbacks}
