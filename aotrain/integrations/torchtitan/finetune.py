"""Fine-tuning on torchtitan's trainer, as a recipe says: the second engine of ``aotrain finetune``.

The loop, FSDP2 and checkpoints are torchtitan's. What happens here: the model is built from config.json with the
recipe's low precision in its config tree, filled from safetensors, trained on the recipe's rows, and written back as an
ordinary Hugging Face folder, which is exported and measured if the recipe asks.

Under torchrun every rank calls ``run``; one process, with a GPU or without, needs no torchrun.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchtitan  # noqa: F401  here, so that a missing package is said at once

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
from aotrain.integrations.torchtitan import compat
from aotrain.integrations.torchtitan.finetune_keys import TrainerKeys, trainer_keys
from aotrain.integrations.torchtitan.metrics_file import FILE_NAME, losses, read_rows

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Recipe
    from aotrain.integrations.torchtitan.finetune_data import TokenRows
    from aotrain.integrations.torchtitan.finetune_model import Sources
    from aotrain.integrations.torchtitan.finetune_trainer import FinetuneTrainer

_PACKAGES = ("torch", "torchtitan", "transformers")


def problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(dotted key, message) of everything that this engine cannot do; see ``finetune_check``."""
    compat.install()
    from aotrain.integrations.torchtitan.finetune_check import problems

    yield from problems(recipe)


def describe(recipe: Recipe) -> str:
    """What happens to each layer of the recipe's model; see ``finetune_check``."""
    compat.install()
    from aotrain.integrations.torchtitan.finetune_check import describe

    return describe(recipe)


def run(recipe: Recipe) -> dict[str, Any]:
    """Train, save, export and measure.

    Returns:
        What summary.json in the output folder holds.

    Raises:
        JobError: something that the author of the recipe can repair.
    """
    compat.install()
    from torchtitan.observability import structured_logger

    from aotrain.integrations.torchtitan.console import start_logging, stop_logging
    from aotrain.integrations.torchtitan.train import single_process_environment

    for key, message in problems(recipe):
        raise JobError(f"{key}: {message}")
    refuse_other_run(recipe, "checkpoint/step-*")
    single_process_environment()
    start_logging(int(os.environ["RANK"]))
    try:
        structured_logger.init_structured_logger(source="training", output_dir=str(recipe.output_dir), enable=False)
        return _run(recipe, _prepare(recipe))
    finally:
        stop_logging()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        # torchtitan switches automatic collection off for the whole process.
        gc.enable()


@dataclass(frozen=True, slots=True)
class _Job:
    keys: TrainerKeys
    sources: Sources
    device: str
    rows: TokenRows
    heldout: TokenRows | None


def _prepare(recipe: Recipe) -> _Job:
    from aotrain.integrations.finetune.rows import load_rows
    from aotrain.integrations.torchtitan.device import finetune_device
    from aotrain.integrations.torchtitan.finetune_data import tokenize
    from aotrain.integrations.torchtitan.finetune_model import find_sources, load_tokenizer

    keys, sources = trainer_keys(recipe), find_sources(recipe.model, weights=True)
    device = finetune_device(recipe, use_cpu=keys.use_cpu)
    tokenizer = load_tokenizer(sources.tokenizer)
    rows, heldout = load_rows(recipe)
    # As TRL, which measures on packed rows. Whole rows see nothing of each other: packing would not change the measure.
    wrapped = keys.packing and keys.packing_strategy == "wrapped"
    return _Job(
        keys,
        sources,
        device,
        tokenize(rows, tokenizer, keys, packing=keys.packing),
        None if heldout is None else tokenize(heldout, tokenizer, keys, packing=wrapped),
    )


def _run(recipe: Recipe, job: _Job) -> dict[str, Any]:
    from aotrain.integrations.torchtitan.console import log_to
    from aotrain.integrations.torchtitan.finetune_build import build_trainer, layout_of
    from aotrain.integrations.torchtitan.finetune_model import served_dtype
    from aotrain.integrations.torchtitan.finetune_weights import save_weights

    nll: dict[str, float | None] = {}
    rank = int(os.environ["RANK"])
    is_first = rank == 0
    trainer = build_trainer(recipe, job.keys, job.sources, job.device, job.rows)
    torch.distributed.barrier()  # no rank writes before all have looked into the folder
    log_to(recipe.output_dir, rank)
    if is_first:
        write_recipe(recipe)
    if job.heldout is not None and job.sources.folder is not None:
        nll |= _measure(recipe, job, trainer, "start", "start_rounded")
    trainer.train()
    others = [folder for folder in (job.sources.folder, job.sources.tokenizer) if folder is not None]
    dtype, layout = served_dtype(recipe, job.sources, job.keys), layout_of(job.sources)
    save_weights(trainer.model, layout, recipe.output_dir, config=_served_config(job), others=others, dtype=dtype)
    if job.heldout is not None:
        nll["qat" if recipe.quantize else "trained"] = trainer.mean_nll(
            job.heldout, job.keys.per_device_eval_batch_size
        )
    steps, device = trainer.step, trainer.device
    trainer.close()
    del trainer
    gc.collect()
    if recipe.evaluate is not None and recipe.evaluate.control:
        nll |= _control(recipe, job)
    # From here on no rank waits for another, and nobody shall think so: compressed-tensors deals the layers that it
    # decompresses to the ranks of a process group, with broadcasts.
    torch.distributed.destroy_process_group()
    notes: dict[str, str] = {}
    if is_first and recipe.export is not None:
        export_served(recipe, recipe.output_dir)
        if job.heldout is not None:
            nll["exported"], notes = _measure_exported(recipe, job, dtype, device)
    summary = {
        **summarize(nll),
        **notes,
        "losses": _first_and_last(recipe.output_dir),
        "steps": steps,
        "versions": {name: version(name) for name in _PACKAGES if importlib.util.find_spec(name)},
    }
    if is_first:
        if nll:
            print(table(summary, recipe.quantize.scheme if recipe.quantize else None))
        write_json(recipe.output_dir / SUMMARY, summary)
    return summary


def _measure(recipe: Recipe, job: _Job, trainer: FinetuneTrainer, dense: str, rounded: str) -> dict[str, float | None]:
    """nll without quantization, and with the weights rounded as they are."""
    assert job.heldout is not None
    batch_size = job.keys.per_device_eval_batch_size
    found: dict[str, float | None] = {dense: trainer.mean_nll(job.heldout, batch_size, quantized=False)}
    if recipe.quantize is not None:
        found[rounded] = trainer.mean_nll(job.heldout, batch_size)
    return found


def _control(recipe: Recipe, job: _Job) -> dict[str, float | None]:
    """Train the same model on the same batches with its fake quantizers off, and measure it dense and rounded."""
    from aotrain.integrations.torchtitan.finetune_build import build_trainer

    twin = control_recipe(recipe)
    trainer = build_trainer(twin, trainer_keys(twin), job.sources, job.device, job.rows)
    trainer.train()
    found = _measure(twin, job, trainer, "control", "control_rounded")
    trainer.close()
    return found


def _served_config(job: _Job) -> dict[str, Any]:
    """config.json of the saved model; one without a source is named after its architecture."""
    names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {"architectures": [names[job.sources.config["model_type"]]], **job.sources.config}


def _measure_exported(
    recipe: Recipe, job: _Job, dtype: torch.dtype, device: torch.device
) -> tuple[float | None, dict[str, str]]:
    """nll of the exported checkpoint as transformers reads it; None and the reason where a package is missing."""
    from aotrain.integrations.torchtitan.finetune_trainer import mean_nll

    assert recipe.export is not None
    assert job.heldout is not None
    try:
        from aotrain.integrations.huggingface.served import served_logits

        logits = served_logits(Path(recipe.export.path), dtype, device)
    except ImportError as error:
        return None, {"exported_note": f"transformers cannot read it here: {error}"}
    batch_size = job.keys.per_device_eval_batch_size
    return mean_nll(lambda inputs, _: logits(inputs["input"]), job.heldout, batch_size, device), {}


def _first_and_last(folder: Path) -> dict[str, float | None]:
    """The first and the last loss that was recorded; the reporting rank is the first."""
    if not (folder / FILE_NAME).is_file():
        return {"first": None, "last": None}
    _, recorded = losses(read_rows(folder / FILE_NAME), "train")
    return {"first": recorded[0], "last": recorded[-1]} if recorded else {"first": None, "last": None}
