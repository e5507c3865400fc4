"""Fine-tuning with transformers' Trainer and TRL's SFTTrainer: our optimizers by name."""

from aotrain.integrations.huggingface.optim import optimizer_cls_and_kwargs

__all__ = ["optimizer_cls_and_kwargs"]
