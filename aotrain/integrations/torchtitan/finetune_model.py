"""The model of a recipe: its folder and configuration, its torchtitan spec, and the low precision it trains in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.protocols.model_spec import ModelSpec

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.finetune_keys import TrainerKeys
from aotrain.integrations.torchtitan.finetune_layout import HFConfig, Layout, mismatches, model_spec
from aotrain.integrations.torchtitan.finetune_qat import quantize_layers, share_global_scales
from aotrain.integrations.torchtitan.tokenizer import resolve_tokenizer
from aotrain.nn import Report

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Model, Recipe

_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a recipe's model comes from."""

    # None: random weights.
    folder: Path | None
    tokenizer: Path
    config: HFConfig
    # Of the parameters; the products and the saved checkpoint may have fewer bits.
    dtype: torch.dtype


def find_sources(model: Model, *, weights: bool) -> Sources:
    """Folders and configuration of a recipe's model section.

    Args:
        model: the section.
        weights: also fetch weights from the hub, where the path is an id of it.

    Raises:
        JobError: no such folder, configuration or tokenizer, or a model that torchtitan cannot be.
    """
    folder = None if model.path is None else _folder(model.path, weights=weights)
    if folder is None:
        tokenizer = _tokenizer(model.tokenizer or "")
        config = {**(model.config or {})}
        config.setdefault("vocab_size", load_tokenizer(tokenizer).get_vocab_size())
        key = "model.config"
    else:
        tokenizer = _tokenizer(model.tokenizer) if model.tokenizer else _own_tokenizer(folder)
        config = _read_config(folder)
        key = "model.path"
    if found := list(mismatches(config)):
        raise JobError(f"{key}: torchtitan cannot be this model: {'; '.join(found)}")
    name = model.dtype if model.dtype != "auto" else config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in ("bfloat16", "float32"):
        raise JobError(f"model.dtype: the checkpoint is in {name}; want bfloat16 or float32")
    return Sources(folder, tokenizer, config, getattr(torch, name))


def load_tokenizer(folder: Path) -> HuggingFaceTokenizer:
    """torchtitan's tokenizer of a folder."""
    return HuggingFaceTokenizer(tokenizer_path=str(folder))


def products_dtype(sources: Sources, keys: TrainerKeys) -> torch.dtype:
    """What the products of training run in."""
    return torch.bfloat16 if keys.bf16 else sources.dtype


def served_dtype(recipe: Recipe, sources: Sources, keys: TrainerKeys) -> torch.dtype:
    """Of the saved checkpoint: where weights are rounded to a scheme, what was rounded in training."""
    return sources.dtype if recipe.quantize is None else products_dtype(sources, keys)


def build_spec(recipe: Recipe, sources: Sources, keys: TrainerKeys, attention: str) -> tuple[ModelSpec, Report | None]:
    """The model's spec in the low precision of the recipe, and what that is for each layer.

    Raises:
        JobError: nothing can be converted.
    """
    spec = model_spec(sources.config, attention)
    layout = Layout(sources.config, spec)
    if recipe.quantize is not None:
        report = quantize_layers(spec.model, recipe.quantize, layout, products_dtype(sources, keys))
        if not report.converted:
            raise JobError(f"quantize: found no layer to quantize: {report.summary()}")
        if recipe.quantize.scheme == "nvfp4":
            _share_scales(spec, layout)
        return spec, report
    if recipe.float8 is not None:
        from aotrain.integrations.torchtitan.converters import Float8Converter

        converter = Float8Converter(
            Float8Converter.Config(recipe=recipe.float8, model_compile_enabled=keys.torch_compile)
        )
        converter.convert(spec.model)  # in place
        return spec, converter.report
    return spec, None


def _share_scales(spec: ModelSpec, layout: Layout) -> None:
    """Let layers that a server joins find each other once the model is built."""
    parallelize: Any = spec.parallelize_fn

    @wraps(parallelize)
    def share_and_parallelize(model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        share_global_scales(model, layout)
        return parallelize(model, **kwargs)

    spec.parallelize_fn = share_and_parallelize


def _folder(path: str, *, weights: bool) -> Path:
    folder = Path(path).expanduser()
    return folder if folder.is_dir() else _download(path, weights=weights)


def _download(name: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab.*", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise JobError(
            f"model.path: {name!r} is no folder and cannot be fetched from the hub ({reason}); check the name and the "
            "network; a gated model needs HF_TOKEN"
        ) from error


def _tokenizer(name: str) -> Path:
    try:
        return resolve_tokenizer(name)
    except JobError as error:
        raise JobError(f"model.{error}") from error


def _own_tokenizer(folder: Path) -> Path:
    if not (folder / "tokenizer.json").is_file():
        raise JobError(f"model.path: {folder} has no tokenizer.json; add it, or give model.tokenizer: byte or a folder")
    return folder


def _read_config(folder: Path) -> HFConfig:
    try:
        return json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise JobError(f"model.path: cannot read {folder / _CONFIG}: {error}") from error
