"""Fine-tuning a transformers model with TRL's SFTTrainer, as a recipe says.

The loop is TRL's. What happens here: the model is built and prepared for low precision before the trainer sees it, the
optimizer and the callbacks go in through the trainer's own arguments, and afterwards an ordinary dense checkpoint is in
`output_dir` (of LoRA: the adapter there, and the merged model in `merged`), exported and measured if the recipe asks.

Under torchrun, with or without FSDP through accelerate, every rank calls `run`.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from aotrain.integrations.config_file import JobError
from aotrain.integrations.finetune.output import (
    SUMMARY,
    control_recipe,
    export_served,
    refuse_other_run,
    write_json,
    write_recipe,
)
from aotrain.integrations.finetune.perplexity import summarize, table
from aotrain.integrations.finetune.rows import Rows, load_rows
from aotrain.integrations.huggingface.callbacks import ShardingCheck
from aotrain.integrations.huggingface.finetune_check import describe, problems
from aotrain.integrations.huggingface.finetune_model import (
    add_lora,
    build_model,
    load_tokenizer,
    prepare_low_precision,
    served_scheme,
)
from aotrain.integrations.huggingface.perplexity import mean_nll
from aotrain.integrations.huggingface.sharded_save import save_whole
from aotrain.integrations.huggingface.trainer_kwargs import trainer_kwargs
from aotrain.qat import share_global_scales
from aotrain.quantization.schemes import Nvfp4Scheme

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Recipe

__all__ = ["describe", "problems", "run"]

_PACKAGES = ("torch", "transformers", "trl", "accelerate")


def run(recipe: Recipe) -> dict[str, Any]:
    """Train, save, export and measure.

    Returns:
        What summary.json in the output folder holds.

    Raises:
        JobError: something that the author of the recipe can repair.
    """
    args = training_arguments(recipe)
    _claim_output(recipe, args)
    tokenizer = load_tokenizer(recipe.model)
    rows, heldout = load_rows(recipe)
    nll: dict[str, float | None] = {}
    trainer = build_trainer(recipe, args, tokenizer, rows, heldout)
    model: Any = trainer.model
    dtype = layer_dtype(args, next(model.parameters()).dtype)  # FSDP is going to make float32 masters
    if heldout is not None and recipe.model.path is not None and not _wants_fsdp(args):
        nll |= _measure(recipe, trainer, "start", "start_rounded")
    losses = _train(trainer, recipe)
    save_whole(trainer, recipe.output_dir, quantized=recipe.quantize is not None)
    if heldout is not None:
        nll["qat" if recipe.quantize else "trained"] = mean_nll(_quantizing(trainer, recipe), trainer)
    if recipe.evaluate is not None and recipe.evaluate.control:
        nll |= _control(recipe, tokenizer, rows, heldout)
    notes: dict[str, str] = {}
    if args.process_index == 0:
        served = _merged(recipe, tokenizer) if recipe.lora else recipe.output_dir
        if recipe.export is not None:
            export_served(recipe, served)
    if recipe.export is not None and heldout is not None:
        args.distributed_state.wait_for_everyone()  # pyrefly: ignore[missing-attribute]
        nll["exported"], notes = _measure_exported(recipe, trainer, dtype)
    summary = {
        **summarize(nll),
        **notes,
        "losses": losses,
        "steps": trainer.state.global_step,
        "versions": {name: version(name) for name in _PACKAGES},
    }
    if args.process_index == 0:
        if nll:
            print(table(summary, recipe.quantize.scheme if recipe.quantize else None))
        write_json(recipe.output_dir / SUMMARY, summary)
    return summary


def training_arguments(recipe: Recipe) -> SFTConfig:
    """TRL's arguments: `trainer` as it is, and the optimizer's hyper-parameters.

    Raises:
        JobError: keys or values that TRL refuses.
    """
    optimizer = recipe.optimizer
    try:
        return SFTConfig(
            **recipe.trainer,
            learning_rate=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1],
            adam_epsilon=optimizer.eps,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise JobError(f"trainer: {error}") from error


def build_trainer(
    recipe: Recipe, args: SFTConfig, tokenizer: PreTrainedTokenizerBase, rows: Rows, heldout: Rows | None
) -> SFTTrainer:
    """A trainer whose model is prepared: low precision first, then adapters, then the optimizer.

    Raises:
        JobError: the model cannot be loaded, a layer cannot be quantized, or options of the optimizer are unknown.
    """
    model: torch.nn.Module = build_model(recipe, tokenizer)
    dtype = layer_dtype(args, next(model.parameters()).dtype)
    report = prepare_low_precision(model, recipe, dtype)
    if report is not None and args.process_index == 0:
        print(report)
    if recipe.lora is not None:
        model = add_lora(model, recipe.lora, quantized=recipe.quantize is not None)
    if recipe.quantize is not None and isinstance(served_scheme(recipe, dtype).weight, Nvfp4Scheme):
        share_global_scales(model)
    try:
        ours = trainer_kwargs(recipe)
    except ValueError as error:
        raise JobError(f"trainer.{error}") from error
    trainer = SFTTrainer(
        model,  # pyrefly: ignore[bad-argument-type]
        args=args,
        train_dataset=rows,
        eval_dataset=heldout,
        processing_class=tokenizer,
        **ours,
    )
    trainer.add_callback(ShardingCheck(trainer, wants_fsdp=_wants_fsdp(args)))
    return trainer


def layer_dtype(args: SFTConfig, dtype: torch.dtype) -> torch.dtype:
    """Dtype in which layers get the weights of a model of this dtype, and quantize them; the checkpoint has it too.

    Under FSDP with mixed precision that of the copies that FSDP gathers of its masters. Autocast converts what layers
    multiply, after they have quantized it.
    """
    if _wants_fsdp(args) and (args.bf16 or args.fp16):
        return torch.bfloat16 if args.bf16 else torch.float16
    return dtype


def _wants_fsdp(args: SFTConfig) -> bool:
    """Asked for in the recipe, or by `accelerate launch` with an FSDP config."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _claim_output(recipe: Recipe, args: SFTConfig) -> None:
    """Refuse a folder that holds another run, on all ranks before any writes to it."""
    refuse_other_run(recipe)
    args.distributed_state.wait_for_everyone()  # pyrefly: ignore[missing-attribute]
    if args.process_index == 0:
        write_recipe(recipe)


def _train(trainer: SFTTrainer, recipe: Recipe) -> dict[str, float | None]:
    """Train; the first and the last loss that was logged."""
    try:
        trainer.train(resume_from_checkpoint=recipe.trainer.get("resume_from_checkpoint") or None)
    except ValueError as error:
        if "checkpoint" in str(error).lower():
            raise JobError(f"trainer.resume_from_checkpoint: {error}") from error
        raise
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"first": losses[0], "last": losses[-1]} if losses else {"first": None, "last": None}


def _quantizing(trainer: SFTTrainer, recipe: Recipe, *, on: bool = True) -> torch.nn.Module:
    """The trainer's model with its fake quantizers, if it has any, fully on or off."""
    if recipe.quantize is not None:
        from aotrain.qat import QATSchedule

        model: Any = trainer.model
        QATSchedule(start_step=0 if on else 1).apply(model, 0)
    return trainer.model_wrapped  # pyrefly: ignore[bad-return]


def _measure(recipe: Recipe, trainer: SFTTrainer, dense: str, rounded: str) -> dict[str, float | None]:
    """nll without quantization, and with the weights rounded as they are."""
    found: dict[str, float | None] = {dense: mean_nll(_quantizing(trainer, recipe, on=False), trainer)}
    if recipe.quantize is not None:
        found[rounded] = mean_nll(_quantizing(trainer, recipe), trainer)
    return found


def _control(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: Rows, heldout: Rows | None
) -> dict[str, float | None]:
    """Train the same model on the same batches with its fake quantizers off, and measure it dense and rounded."""
    twin = control_recipe(recipe)
    trainer = build_trainer(twin, training_arguments(twin), tokenizer, rows, heldout)
    _train(trainer, twin)
    return _measure(twin, trainer, "control", "control_rounded")


def _merged(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Merge the saved adapter into the base model; returns the folder of the dense checkpoint."""
    from peft import LoraConfig, PeftModel

    from aotrain.integrations.huggingface.peft import qat_lora_config

    folder = recipe.output_dir / "merged"
    config = LoraConfig.from_pretrained(str(recipe.output_dir))
    assert isinstance(config, LoraConfig)
    if recipe.quantize is not None:  # merges to the bits that training saw
        config = qat_lora_config(config, recipe.quantize.scheme)
    model = PeftModel.from_pretrained(build_model(recipe, tokenizer), str(recipe.output_dir), config=config)
    model.merge_and_unload().save_pretrained(folder)  # pyrefly: ignore[not-callable]
    tokenizer.save_pretrained(folder)
    return folder


def _measure_exported(recipe: Recipe, trainer: SFTTrainer, dtype: torch.dtype) -> tuple[float | None, dict[str, str]]:
    """nll of the exported checkpoint as transformers reads it; None and the reason where it cannot.

    Every rank takes part: compressed-tensors deals the layers that it decompresses to the ranks of the process group,
    and waits for all of them.
    """
    assert recipe.export is not None
    if not _on_every_rank(Path(recipe.export.path).is_dir()):
        return None, {"exported_note": "not every process sees the folder of the export: it is on another machine"}
    try:
        model = AutoModelForCausalLM.from_pretrained(recipe.export.path, dtype=dtype)
    except ImportError as error:
        return None, {"exported_note": f"transformers cannot read it here: {error}"}
    return mean_nll(model.to(trainer.args.device), trainer), {}


def _on_every_rank(here: bool) -> bool:
    if not torch.distributed.is_initialized():
        return here
    everywhere = [here] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, here)
    return all(everywhere)
