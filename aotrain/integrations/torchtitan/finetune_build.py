"""From a recipe to torchtitan's trainer, with the weights in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import torch
from torchtitan.config import CommConfig, CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.config.configs import DebugConfig
from torchtitan.distributed.activation_checkpoint import FullAC

from aotrain.integrations.torchtitan import compat
from aotrain.integrations.torchtitan.build import loss_config
from aotrain.integrations.torchtitan.checkpoint import CheckedCheckpoints
from aotrain.integrations.torchtitan.finetune_data import RowLoader, TokenRows, total_steps
from aotrain.integrations.torchtitan.finetune_keys import TrainerKeys
from aotrain.integrations.torchtitan.finetune_layout import Layout, model_spec
from aotrain.integrations.torchtitan.finetune_model import Sources, build_spec, products_dtype
from aotrain.integrations.torchtitan.finetune_optim import optimizer_config, schedule_config
from aotrain.integrations.torchtitan.finetune_trainer import FinetuneTrainer
from aotrain.integrations.torchtitan.finetune_weights import load_weights
from aotrain.integrations.torchtitan.fsdp import with_plain_sum
from aotrain.integrations.torchtitan.metrics import RunMetrics
from aotrain.integrations.torchtitan.run_dir import CHECKPOINTS
from aotrain.integrations.torchtitan.weight_init import name_parameter_inits

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Recipe

# torchtitan keeps this many checkpoints for 0: all.
_KEEP_ALL = 0


def build_trainer(recipe: Recipe, keys: TrainerKeys, sources: Sources, device: str, rows: TokenRows) -> FinetuneTrainer:
    """The trainer of a checked recipe, its process group started and its weights loaded.

    Raises:
        JobError: nothing to convert, options of the optimizer, or a checkpoint that does not fit.
    """
    trainer = trainer_config(recipe, keys, sources, device, rows).build()
    if sources.folder is not None:
        load_weights(trainer.model, layout_of(sources), sources.folder)
    return trainer


def layout_of(sources: Sources) -> Layout:
    """Names and rows of the model's checkpoint."""
    return Layout(sources.config, model_spec(sources.config, "sdpa"))


def trainer_config(
    recipe: Recipe, keys: TrainerKeys, sources: Sources, device: str, rows: TokenRows
) -> FinetuneTrainer.Config:
    """The trainer's config; builds nothing."""
    attention = "flex" if device != "cpu" and compat.flex_attention_works() else "sdpa"
    spec, report = build_spec(recipe, sources, keys, attention)
    if report is not None and os.environ.get("RANK", "0") == "0":
        print(report)
    if device == "cpu":
        spec.parallelize_fn = with_plain_sum(spec.parallelize_fn)
        name_parameter_inits(spec.model, keys.seed)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    steps = total_steps(keys, len(rows), ranks)
    quantize = recipe.quantize
    return FinetuneTrainer.Config(
        model_spec=spec,
        quantized=quantize is not None,
        start_step=quantize.start_step if quantize else 0,
        anneal_steps=quantize.anneal_steps if quantize else 0,
        hf_assets_path=str(sources.tokenizer),
        dump_folder=str(recipe.output_dir),
        loss=loss_config(spec),
        optimizer=optimizer_config(recipe.optimizer, keys.optim_args),
        lr_scheduler=schedule_config(keys, steps),
        training=TrainingConfig(
            local_batch_size=keys.per_device_train_batch_size,
            global_batch_size=keys.per_device_train_batch_size * keys.gradient_accumulation_steps * ranks,
            seq_len=keys.max_length,
            max_norm=keys.max_grad_norm or float("inf"),
            steps=steps,
            dtype=_name(sources.dtype),
            mixed_precision_param=_name(products_dtype(sources, keys)),
            # Batches are as long as their longest row.
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(spmd_backend=compat.spmd_backend()),
        dataloader=RowLoader.Config(rows=rows, seed=keys.seed),
        metrics=RunMetrics.Config(
            log_freq=keys.logging_steps,
            enable_tensorboard=keys.report_to == "tensorboard",
            disable_color_printing=True,
            total_steps=steps,
            low_precision=recipe.quantize is not None or recipe.float8 is not None,
        ),
        checkpoint=CheckedCheckpoints.Config(
            enable=keys.save_strategy == "steps",
            folder=CHECKPOINTS,
            interval=keys.save_steps,
            keep_latest_k=keys.save_total_limit or _KEEP_ALL,
            last_save_model_only=False,
            initial_load_model_only=False,
        ),
        activation_checkpoint=FullAC.Config() if keys.recompute else None,
        compile=CompileConfig(enable=keys.torch_compile),
        comm=CommConfig(init_timeout_seconds=600, train_timeout_seconds=600),
        debug=DebugConfig(seed=keys.seed, enable_structured_logging=False),
    )


def _name(dtype: torch.dtype) -> Literal["bfloat16", "float32"]:
    return "bfloat16" if dtype == torch.bfloat16 else "float32"
