"""A Llama of 0.1 M parameters with random weights, and texts for it: nothing is downloaded."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from aotrain.integrations.huggingface import optimizer_cls_and_kwargs

VOCABULARY = 128


def tiny_llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def token_rows(count: int = 32, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Rows that count upwards from a random token: learnable."""
    starts = torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(0))
    rows = (starts[:, None] + torch.arange(length)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, **options) -> TrainingArguments:
    settings = {
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    return TrainingArguments(output_dir=str(folder), **settings | options)


def trainer(name: str | None, args: TrainingArguments, **options) -> Trainer:
    """A Trainer of a new tiny model with one of our optimizers."""
    chosen = optimizer_cls_and_kwargs(name, args, **options)
    return Trainer(tiny_llama(), args, train_dataset=token_rows(), optimizer_cls_and_kwargs=chosen)


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
