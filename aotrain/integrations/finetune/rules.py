"""Rules of a recipe that span several keys: what cannot work is said before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from aotrain.integrations.finetune.names import TORCH_ADAMW, export_problem

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Recipe

# Keys of `trl.SFTConfig` that other sections set.
SET_ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "optim": "optimizer.name",
    "model_init_kwargs": "model",
    "trust_remote_code": "model.trust_remote_code",
}


def check_recipe(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(dotted key, message) of each thing in a recipe that cannot work."""
    yield from _check_model(recipe)
    yield from _check_data(recipe)
    yield from _check_low_precision(recipe)
    yield from _check_lora(recipe)
    yield from _check_trainer(recipe)
    yield from _check_evaluate(recipe)
    yield from _check_export(recipe)


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~"))


def _check_model(recipe: Recipe) -> Iterator[tuple[str, str]]:
    model = recipe.model
    if model.path is None:
        if not (model.config and "model_type" in model.config):
            yield (
                "model.path",
                "is null, so model.config has to say what to build: want a path, or {model_type: llama, ...}",
            )
        if model.tokenizer is None:
            yield "model.tokenizer", "is missing; without model.path want byte, a folder or a hub id"
        if model.dtype == "auto":
            yield "model.dtype", "got 'auto', but there is no checkpoint to take it from; want bfloat16 or float32"
        if model.kwargs:
            yield f"model.{next(iter(model.kwargs))}", "is for from_pretrained, but model.path is null"
    elif model.config is not None:
        yield "model.config", "is given beside model.path, whose own configuration is used; remove one"
    elif _looks_local(model.path) and not Path(model.path).expanduser().is_dir():
        yield "model.path", f"no such folder: {model.path!r} (looked from {Path.cwd()})"
    if model.tokenizer and _looks_local(model.tokenizer) and not Path(model.tokenizer).expanduser().is_dir():
        yield "model.tokenizer", f"no such folder: {model.tokenizer!r}; want byte, a folder or a hub id"


def _check_data(recipe: Recipe) -> Iterator[tuple[str, str]]:
    from aotrain.integrations.finetune.recipe import STDLIB_PAIRS

    data = recipe.data
    if data.path == STDLIB_PAIRS:
        for key in data.kwargs:
            yield f"data.{key}", f"is for load_dataset, which {STDLIB_PAIRS} does not call; remove it"
    elif data.max_chars is not None:
        yield "data.max_chars", f"is only for {STDLIB_PAIRS}; trainer.max_length cuts long rows"
    files = data.kwargs.get("data_files")
    for name in [files] if isinstance(files, str) else files if isinstance(files, list) else []:
        if isinstance(name, str) and _looks_local(name) and "*" not in name and not Path(name).expanduser().exists():
            yield "data.data_files", f"no such file: {name!r} (looked from {Path.cwd()})"


def _check_low_precision(recipe: Recipe) -> Iterator[tuple[str, str]]:
    quantize, optimizer = recipe.quantize, recipe.optimizer
    if quantize is not None and recipe.float8 is not None:
        yield "float8", "does not go with quantize: one of them decides what a product sees; remove one"
    steps = recipe.trainer.get("max_steps")
    if quantize is not None and isinstance(steps, int) and 0 < steps <= quantize.start_step + quantize.anneal_steps:
        late = f"quantize.start_step + anneal_steps, {quantize.start_step + quantize.anneal_steps}"
        yield "trainer.max_steps", f"got {steps}, want more than {late}: no step would be fully quantized"
    if optimizer.offload and optimizer.name == TORCH_ADAMW:
        yield "optimizer.offload", "is not offered by adamw; want optimizer.name adamw_32bit, adamw_8bit or another"
    if recipe.trainer.get("optim_args") and optimizer.name == TORCH_ADAMW:
        yield "trainer.optim_args", "are options of our optimizers; want optimizer.name adamw_8bit or another"


def _check_lora(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.lora is None:
        return
    if recipe.model.path is None:
        yield "lora", "adapts a pretrained model; want model.path"
    if recipe.float8 is not None:
        yield "float8", "does not go with lora: the frozen layers have no weight gradient to gain from; remove one"
    if recipe.quantize is None:
        return
    for key, given in (("dropout", recipe.lora.dropout), ("use_dora", recipe.lora.use_dora)):
        if given:
            message = "does not go with quantize: training sees W + scale * B A, the weight that is served; remove it"
            yield f"lora.{key}", message


def _check_trainer(recipe: Recipe) -> Iterator[tuple[str, str]]:
    folder = recipe.trainer.get("output_dir")
    if not isinstance(folder, str) or not folder:
        yield "trainer.output_dir", "is missing; want the folder of everything that the run writes"
    for key in recipe.trainer:
        if key in SET_ELSEWHERE:
            yield f"trainer.{key}", f"is set by {SET_ELSEWHERE[key]}; give it there"


def _check_evaluate(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.evaluate is None:
        return
    if recipe.evaluate.heldout >= 1 and recipe.evaluate.heldout % 1:
        yield "evaluate.heldout", f"got {recipe.evaluate.heldout}, want a part below 1 or a whole number of rows"
    if recipe.evaluate.control and recipe.quantize is None:
        yield "evaluate.control", "is the run without quantization, and quantize is null; remove it"


def _check_export(recipe: Recipe) -> Iterator[tuple[str, str]]:
    export = recipe.export
    if export is None:
        return
    if recipe.quantize is None:
        yield "export", "needs quantize, which says in what format; dense weights are in trainer.output_dir anyway"
        return
    if problem := export_problem(recipe.quantize.scheme, export.format):
        yield "export.format", problem
    path = Path(export.path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        yield "export.path", f"{export.path} exists already; remove it or give another"
