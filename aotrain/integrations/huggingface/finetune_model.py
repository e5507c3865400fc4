"""The tokenizer and the model of a recipe, made ready for low precision before a Trainer sees them."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from aotrain.integrations.byte_tokenizer import byte_tokenizer_dir
from aotrain.integrations.config_file import JobError

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Lora, Model, Recipe
    from aotrain.quantization import Scheme

# Arguments of from_pretrained that say which files are meant; configuration and tokenizer are read with them too.
_WHICH_FILES = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "trust_remote_code")
# What the libraries raise for a name that is not there, a file that is broken, and options that do not exist.
_CANNOT_LOAD = (OSError, ValueError, KeyError, TypeError)


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe's model section, with a padding token.

    Raises:
        JobError: there is none, naming the key.
    """
    name = model.tokenizer or model.path
    assert name is not None  # the recipe's rules
    folder = byte_tokenizer_dir() if name == "byte" else name
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **_which_files(model))
    except _CANNOT_LOAD as error:
        key = "model.tokenizer" if model.tokenizer else "model.path"
        raise JobError(
            f"{key}: no tokenizer in {name!r} ({_first_line(error)}); want a folder or a hub id with tokenizer.json, "
            "or model.tokenizer: byte"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(model: Model, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """The transformers configuration of a recipe's model section.

    Args:
        model: with a path, its configuration is read; without, it is made of `config`.
        tokenizer: gives a model without a path its vocabulary and special tokens.

    Raises:
        JobError: no such model, or transformers does not know its kind, or one of its keys.
    """
    if model.path is not None:
        try:
            return AutoConfig.from_pretrained(model.path, **_which_files(model))
        except _CANNOT_LOAD as error:
            raise JobError(
                f"model.path: cannot read the configuration of {model.path!r}: {_first_line(error)}"
            ) from error
    settings = dict(model.config or {})
    kind = settings.pop("model_type")
    if tokenizer is not None:
        settings.setdefault("vocab_size", len(tokenizer))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            settings.setdefault(name, getattr(tokenizer, name))
    try:
        return AutoConfig.for_model(kind, **settings)
    except _CANNOT_LOAD as error:
        raise JobError(f"model.config: {_first_line(error)}") from error


def meta_model(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without memory, for questions about its layers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The weights of a recipe's model section in its dtype, on the CPU or where its own keys put them.

    Random weights are those of `trainer.seed`.

    Raises:
        JobError: it cannot be loaded.
    """
    model, config = recipe.model, load_config(recipe.model, tokenizer)
    dtype: Any = model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    if model.path is None:
        torch.manual_seed(recipe.trainer.get("seed", 42))
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype, **model.kwargs)
    except _CANNOT_LOAD as error:
        raise JobError(f"model: cannot load {model.path!r}: {_first_line(error)}") from error


def prepare_low_precision(model: torch.nn.Module, recipe: Recipe, dtype: torch.dtype | None = None) -> Any:
    """Swap the linear layers for those that the recipe trains with, in place.

    Args:
        model: to prepare.
        recipe: what with.
        dtype: of the weights that layers quantize, and so of the checkpoint and of integer scales; None is the model's.

    Returns:
        The report: what was converted, what was skipped and why; None when the recipe trains in the model's dtype.

    Raises:
        JobError: a layer that the scheme cannot take, or no layer at all.
    """
    try:
        if recipe.quantize is not None:
            from aotrain.qat import prepare_qat

            return prepare_qat(
                model,
                served_scheme(recipe, dtype or next(model.parameters()).dtype),
                exclude=recipe.quantize.exclude,
                embeddings=recipe.quantize.embeddings,
            )
        if recipe.float8 is not None:
            from aotrain.nn import Float8LinearConfig, conversion_report, convert_to_float8_training

            config = Float8LinearConfig.from_recipe_name(recipe.float8)
            convert_to_float8_training(model, config=config, module_filter_fn=lambda _, fqn: not is_excluded(fqn))
            return conversion_report(model)
    except ValueError as error:
        raise JobError(f"{'quantize' if recipe.quantize else 'float8'}: {error}") from error
    return None


def served_scheme(recipe: Recipe, dtype: torch.dtype) -> Scheme:
    """The recipe's scheme with integer scales in the dtype of the checkpoint that will be served."""
    from aotrain.quantization import get_scheme

    assert recipe.quantize is not None
    return get_scheme(recipe.quantize.scheme, scale_dtype=dtype)


def is_excluded(fqn: str, patterns: tuple[str, ...] = ("lm_head",)) -> bool:
    """Whether a layer keeps its precision."""
    return any(fnmatch(fqn, pattern) for pattern in patterns)


def add_lora(model: Any, lora: Lora, *, quantized: bool) -> torch.nn.Module:
    """The model with trainable adapters and frozen weights.

    Args:
        model: prepared for quantization already, if it is to be.
        lora: the recipe's section.
        quantized: training sees the grid of W + scale * B A.

    Raises:
        JobError: targets that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    from aotrain.integrations.huggingface.peft import qat_lora_config

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyrefly: ignore[bad-argument-type]
        target_modules=targets,
        lora_dropout=lora.dropout,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, qat_lora_config(config) if quantized else config)
    except ValueError as error:
        raise JobError(f"lora.targets: {_first_line(error)}") from error


def _which_files(model: Model) -> dict[str, Any]:
    return {key: model.kwargs[key] for key in _WHICH_FILES if key in model.kwargs}


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
