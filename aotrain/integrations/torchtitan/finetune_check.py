"""What torchtitan and the model's files say about a recipe, without memory for weights and without training."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import TYPE_CHECKING

import torch
from torchtitan.models.common.linear import Linear

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.finetune_keys import recipe_problems, trainer_keys, trainer_problems
from aotrain.integrations.torchtitan.finetune_layout import Layout, max_length, model_spec
from aotrain.integrations.torchtitan.finetune_model import Sources, build_spec, find_sources, load_tokenizer
from aotrain.integrations.torchtitan.finetune_optim import optimizer_config
from aotrain.integrations.torchtitan.finetune_qat import misfits
from aotrain.integrations.torchtitan.finetune_weights import model_shapes, weight_shapes
from aotrain.integrations.torchtitan.models import vocab_size

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Recipe

# Of tensors that are missing or too many.
_SHOWN = 4


def problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(dotted key, message) of keys without a meaning here, a model that torchtitan cannot be, and layers that do not
    fit."""
    yield from recipe_problems(recipe)
    try:
        if recipe.optimizer.name != "adamw":
            optimizer_config(recipe.optimizer, recipe.trainer.get("optim_args"))
    except JobError as error:
        yield _split(error)
    try:
        sources = find_sources(recipe.model, weights=False)
    except JobError as error:
        yield _split(error)
        return
    yield from _model_problems(recipe, sources)


def describe(recipe: Recipe) -> str:
    """What happens to each layer of the recipe's model, and how much of it there is.

    Raises:
        JobError: the model cannot be had, or prepared.
    """
    sources, keys = find_sources(recipe.model, weights=False), trainer_keys(recipe)
    spec, report = build_spec(recipe, sources, keys, "sdpa")
    with torch.device("meta"):
        count = sum(param.numel() for param in spec.model.build().parameters())
    lines = [f"torchtitan's {spec.name}, {count / 1e6:,.1f} M parameters in {str(sources.dtype)[6:]}"]
    return "\n".join([*lines, str(report)] if report is not None else lines)


def _model_problems(recipe: Recipe, sources: Sources) -> Iterator[tuple[str, str]]:
    spec = model_spec(sources.config, "sdpa")
    layout = Layout(sources.config, spec)
    tokens = load_tokenizer(sources.tokenizer).get_vocab_size()
    if tokens > vocab_size(spec):
        yield (
            "model.tokenizer",
            f"it has {tokens} tokens, but the model embeds {vocab_size(spec)}; want the model's own",
        )
    longest = max_length(sources.config)
    if not list(trainer_problems(recipe.trainer)) and (got := trainer_keys(recipe).max_length) > longest:
        yield "trainer.max_length", f"got {got}, but the model has max_position_embeddings {longest}; want at most that"
    if sources.folder is not None and any(sources.folder.glob("*.safetensors")):
        with torch.device("meta"):
            wanted = model_shapes(spec.model.build(), layout)
        yield from _weight_problems(wanted, weight_shapes(sources.folder), tied=layout.tied)
    if recipe.quantize is None:
        return
    for key, message in misfits(spec.model, recipe.quantize, layout):
        yield f"quantize.{key}", message
    names = [name for fqn, *_ in spec.model.traverse(Linear.Config) for name in layout.hf_layers(fqn)]
    for pattern in recipe.quantize.exclude:
        if not any(fnmatch(name, pattern) for name in names):
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            yield "quantize.exclude", f"{pattern!r} matches no layer; there are {leaves}"


def _weight_problems(
    wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], *, tied: bool
) -> Iterator[tuple[str, str]]:
    extra = sorted(found.keys() - wanted.keys() - ({"lm_head.weight"} if tied else set()))
    for what, names in (
        ("lacks", sorted(wanted.keys() - found.keys())),
        ("has tensors that torchtitan's model does not:", extra),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield "model.path", f"the checkpoint {what} {', '.join(names[:_SHOWN])}{more}"
    for name in sorted(wanted.keys() & found.keys()):
        if wanted[name] != found[name]:
            yield "model.path", f"{name} got shape {list(found[name])}, config.json says {list(wanted[name])}"


def _split(error: JobError) -> tuple[str, str]:
    key, _, message = str(error).partition(": ")
    return key, message
