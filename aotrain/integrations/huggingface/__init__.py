"""Fine-tuning with transformers' Trainer and TRL's SFTTrainer: our optimizers by name, and from others' checkpoints."""

from aotrain.integrations.huggingface.checkpoint import convert_trainer_checkpoint
from aotrain.integrations.huggingface.optim import optimizer_cls_and_kwargs
from aotrain.integrations.huggingface.trainer_kwargs import trainer_kwargs

__all__ = ["convert_trainer_checkpoint", "optimizer_cls_and_kwargs", "trainer_kwargs"]
