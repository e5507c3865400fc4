"""What transformers, TRL and the model's configuration say about a recipe, without weights and without training."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from trl import SFTConfig

from aotrain.integrations.config_file import JobError
from aotrain.integrations.huggingface.finetune_model import (
    is_excluded,
    load_config,
    load_tokenizer,
    meta_model,
    prepare_low_precision,
)

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Recipe


def problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(dotted key, message) of unknown keys of SFTConfig, a model that cannot be had, and layers that do not fit."""
    known = [field.name for field in dataclasses.fields(SFTConfig) if field.init]
    for key in recipe.trainer:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean 'trainer.{near[0]}'?" if near else ""
            yield f"trainer.{key}", f"unknown key of trl.SFTConfig{hint}"
    try:
        model = _meta_model(recipe)
    except JobError as error:
        key, _, message = str(error).partition(": ")
        yield key, message
        return
    yield from _embeddings(recipe, model)
    yield from _misfits(recipe, model)
    yield from _unmatched(recipe, model)


def describe(recipe: Recipe) -> str:
    """What happens to each layer of the recipe's model, and how much of it there is.

    Raises:
        JobError: the model cannot be had, or prepared.
    """
    model = _meta_model(recipe)
    count = sum(p.numel() for p in model.parameters())
    lines = [f"{type(model).__name__}, {count / 1e6:,.1f} M parameters in {recipe.model.dtype}"]
    report = prepare_low_precision(model, recipe)
    if report is not None:
        lines.append(str(report))
    if recipe.export is not None and recipe.quantize is not None:
        from aotrain.export.description import served_lines
        from aotrain.export.table import get_format
        from aotrain.quantization import get_scheme

        names = [name for name, _, _ in _weights(_meta_model(recipe), embeddings=False)]
        kept = [name for name in names if not is_excluded(name, recipe.quantize.exclude)]
        lines += served_lines(get_scheme(recipe.quantize.scheme), get_format(recipe.export.format), kept)
    return "\n".join(lines)


def _meta_model(recipe: Recipe) -> torch.nn.Module:
    tokenizer = load_tokenizer(recipe.model)
    config = load_config(recipe.model, tokenizer)
    try:
        return meta_model(config, trust_remote_code=bool(recipe.model.kwargs.get("trust_remote_code")))
    except (ValueError, TypeError) as error:
        raise JobError(f"model: cannot build it: {error}") from error


def _embeddings(recipe: Recipe, model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Embeddings that are trained quantized and cannot be exported so."""
    if recipe.export is None or recipe.quantize is None or not recipe.quantize.embeddings:
        return
    from aotrain.export.table import get_format
    from aotrain.quantization import get_scheme

    reason = get_format(recipe.export.format).refusal_of_embeddings(get_scheme(recipe.quantize.scheme))
    if reason is not None:
        yield "quantize.embeddings", f"export.format {recipe.export.format} cannot carry them: {reason}"
    elif getattr(model.config, "tie_word_embeddings", False):
        yield "quantize.embeddings", "the output layer is tied to the embedding, and servers keep one dense tensor"


def _misfits(recipe: Recipe, model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Layers that the scheme cannot take."""
    if recipe.quantize is None:
        return
    from aotrain.quantization import get_scheme

    scheme = get_scheme(recipe.quantize.scheme)
    for name, out_features, in_features in _weights(model, embeddings=recipe.quantize.embeddings):
        if is_excluded(name, recipe.quantize.exclude):
            continue
        if problem := scheme.problem(out_features, in_features):
            shape = f"{name} [{out_features}, {in_features}]"
            yield "quantize.scheme", f"{shape}: {problem}; or list it in quantize.exclude"


def _weights(model: torch.nn.Module, *, embeddings: bool) -> Iterator[tuple[str, int, int]]:
    """(module, out_features, in_features) of everything that can be quantized."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            yield name, module.out_features, module.in_features
        elif isinstance(module, torch.nn.Embedding):
            if embeddings:
                yield name, module.num_embeddings, module.embedding_dim
        else:
            # transformers marks its experts with the layout of their weights: [E, K, N] if transposed, else [E, N, K].
            transposed = getattr(module, "is_transposed", False)
            for weight in module.parameters(recurse=False):
                if weight.dim() == 3:
                    n, k = weight.shape[1:]
                    yield name, *((k, n) if transposed else (n, k))


def _unmatched(recipe: Recipe, model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Patterns and targets that name no layer."""
    names = [name for name, module in model.named_modules() if not list(module.children())]
    leaves = sorted({name.rpartition(".")[2] for name in names})
    for pattern in recipe.quantize.exclude if recipe.quantize else ():
        # The default names a layer that a model with another head need not have.
        if pattern != "lm_head" and not any(is_excluded(name, (pattern,)) for name, _ in model.named_modules()):
            yield "quantize.exclude", f"{pattern!r} matches no layer; there are {', '.join(leaves)}"
    targets = recipe.lora.targets if recipe.lora and not isinstance(recipe.lora.targets, str) else ()
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = difflib.get_close_matches(target, leaves, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(leaves)}"
            yield "lora.targets", f"{target!r} is no layer of the model{hint}"
