"""Decide what an export writes, from headers alone, and refuse at once what would go wrong later."""

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from aotrain.export.base import ExportFormat, Layer, Plan
from aotrain.export.checkpoint import Checkpoint
from aotrain.export.gguf_grid import GRID_KEY
from aotrain.export.selection import (
    HEAD,
    HIGH_PRECISION,
    is_stacked_experts,
    is_tied,
    is_token_embedding,
    module_name,
    reason_to_skip,
    refuse_stacked_experts,
)
from aotrain.quantization.fused_groups import fused_groups
from aotrain.quantization.schemes import AffineScheme, Q40Scheme, Scheme, get_scheme

# A layer that is not quantized must be named for readers that would take every linear layer.
_NAMED_REASONS = ("excluded", "router")


def make_plan(
    checkpoint: Checkpoint,
    scheme: Scheme,
    chosen: ExportFormat,
    exclude: Sequence[str],
    dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    *,
    embeddings: bool,
) -> tuple[Plan, torch.dtype, tuple[tuple[str, str], ...]]:
    """The plan, the dtype of the source's weights, and (name, reason) of matrices that stay dense.

    Raises:
        ValueError: a checkpoint that is quantized already, no linear layers, layers that the scheme does not fit,
            a tied output layer that is not excluded, or what the format's readers get wrong.
    """
    _refuse_quantized(checkpoint, scheme)
    shapes = {key: at.shape for key, at in checkpoint.entries.items()}
    refuse_stacked_experts([key for key, shape in shapes.items() if is_stacked_experts(key, shape, exclude)])
    reasons = {key: reason_to_skip(key, shape, exclude) for key, shape in shapes.items()}
    tied = is_tied(checkpoint.config, checkpoint.entries)
    tables = []
    if embeddings:
        tables = [key for key, shape in shapes.items() if is_token_embedding(key, shape, exclude)]
        _refuse_embeddings(checkpoint, chosen, scheme, reasons, tables, tied=tied)
        reasons |= dict.fromkeys(tables)
    keys = [key for key, reason in reasons.items() if reason is None]
    if not keys:
        raise ValueError(f"{checkpoint.folder} has no linear layer to quantize; exclude={tuple(exclude)} leaves none.")
    _refuse_idle_patterns(exclude, reasons)
    _refuse_split_groups(reasons)
    if tied and not any(fnmatch.fnmatchcase(HEAD, pattern) for pattern in exclude):
        raise ValueError(
            f"{checkpoint.folder} ties {HEAD} to the embedding, and servers keep one dense tensor for both: leave "
            f"{HEAD!r} in exclude."
        )
    source_dtype = Counter(checkpoint.entries[key].dtype for key in keys).most_common(1)[0][0]
    served = chosen.served_dtype(weight_dtype or source_dtype, dtype)
    for name, given in (("weight_dtype", weight_dtype or served), ("dtype", served)):
        if given not in HIGH_PRECISION:
            raise ValueError(f"export got {name} {given}; want float32, bfloat16 or float16.")
    scheme = _with_stored_scales(scheme, served)
    _check_shapes({key: shapes[key] for key in keys}, scheme)
    layers = {key: Layer(module_name(key), _matrix(shapes[key]), served, key in tables) for key in keys}
    ignored = [module_name(key) for key, reason in reasons.items() if reason in _NAMED_REASONS]
    ignored += [HEAD] if tied and HEAD not in ignored else []
    plan = Plan(scheme, layers, tuple(ignored), tuple(checkpoint.entries))
    reason = chosen.refusal_of_plan(plan)
    if reason is not None:
        raise ValueError(f"export got scheme {scheme.name} with format {chosen.name}: {reason}.")
    skipped = [
        (module_name(key), reason) for key, reason in reasons.items() if reason is not None and len(shapes[key]) >= 2
    ]
    return plan, source_dtype, tuple(skipped)


def _refuse_embeddings(
    checkpoint: Checkpoint,
    chosen: ExportFormat,
    scheme: Scheme,
    reasons: Mapping[str, str | None],
    tables: Sequence[str],
    *,
    tied: bool,
) -> None:
    """Raise ValueError if embeddings cannot be exported quantized as they were trained."""
    reason = chosen.refusal_of_embeddings(scheme)
    if reason is not None:
        raise ValueError(
            f"export got embeddings with scheme {scheme.name} and format {chosen.name}: {reason}. Train without "
            "quantized embeddings, or use format torchao, or gguf-grid."
        )
    if tied:
        raise ValueError(
            f"{checkpoint.folder} ties {HEAD} to the embedding, and servers keep one dense tensor for both: it cannot "
            "be exported with quantized embeddings."
        )
    others = [module_name(key) for key, why in reasons.items() if why == "embedding" and key not in tables]
    if others or not tables:
        what = f"{', '.join(others[:3])} may be embeddings of something else" if others else "no table of tokens"
        raise ValueError(
            f"export got embeddings, and {checkpoint.folder} has {what}; want tables of tokens only: exclude the "
            "others, here as in training."
        )


def _refuse_idle_patterns(exclude: Sequence[str], keys: Iterable[str]) -> None:
    """Raise ValueError for a pattern that matches no module; the output layer may be absent where it is tied."""
    if isinstance(exclude, str):
        raise ValueError(f"export got exclude={exclude!r}; want a list of patterns: [{exclude!r}].")
    names = [module_name(key) for key in keys]
    idle = [
        pattern for pattern in exclude if not fnmatch.filter(names, pattern) and not fnmatch.fnmatchcase(HEAD, pattern)
    ]
    if idle:
        raise ValueError(f"exclude={idle[0]!r} matches none of {len(names)} modules, such as {names[0]}.")


def _refuse_split_groups(reasons: Mapping[str, str | None]) -> None:
    """Raise ValueError if some of the layers that servers join are excluded and others are not."""
    matrices = [key for key, reason in reasons.items() if reason in (None, "excluded")]
    split = [group for group in fused_groups(matrices) if len({reasons[key] for key in group}) > 1]
    if split:
        names = "\n  ".join(", ".join(map(module_name, group)) for group in split[:5])
        raise ValueError(
            f"exclude covers part of {len(split)} groups of layers that servers join into one; exclude all of a group, "
            f"or none:\n  {names}"
        )


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns


def _refuse_quantized(checkpoint: Checkpoint, scheme: Scheme) -> None:
    """Raise ValueError for a source that holds no dense weights of its own."""
    folder, config = checkpoint.folder, checkpoint.config
    nested = [value for value in config.values() if isinstance(value, dict) and "quantization_config" in value]
    if "quantization_config" in config or nested:
        raise ValueError(
            f"{folder} is quantized already (quantization_config in config.json): export the dense checkpoint that it "
            "was made from."
        )
    if GRID_KEY in config and not isinstance(scheme.weight, Q40Scheme):
        raise ValueError(
            f"{folder} holds weights on the grid {config[GRID_KEY]}, and another grid would change them: export the "
            "checkpoint that it was made from."
        )
    learned = [key for key in checkpoint.entries if "fake_quantizer" in key]
    if learned:
        raise ValueError(
            f"{folder} has state of fake quantizers ({learned[0]}): it was saved from a prepared model that learns its "
            "ranges. Save the weights under their plain names, and pass the ranges as `scales`."
        )
    coded = [key for key, at in checkpoint.entries.items() if at.dtype not in HIGH_PRECISION and key.endswith("weight")]
    if coded:
        raise ValueError(
            f"{folder}: {coded[0]} has dtype {checkpoint.entries[coded[0]].dtype}; want float32, bfloat16 or float16 "
            "weights: export a dense checkpoint."
        )


def _with_stored_scales(scheme: Scheme, dtype: torch.dtype) -> Scheme:
    """The scheme with integer scales in the dtype that servers keep them in, which is the model's."""
    if isinstance(scheme.weight, AffineScheme) and scheme.weight.format.scale_dtype not in (None, dtype):
        raise ValueError(
            f"export got a scheme with scales in {scheme.weight.format.scale_dtype} for a model in {dtype}; servers "
            "round scales to the dtype of the model: want the same, or None."
        )
    return get_scheme(scheme, scale_dtype=dtype)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> None:
    problems = [
        f"{module_name(key)}: {problem}"
        for key, (rows, columns) in shapes.items()
        if (problem := scheme.problem(rows, columns)) is not None
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"scheme {scheme.name} does not fit {len(problems)} of {len(shapes)} layers; exclude them by pattern, or "
            f"choose another scheme:\n  {listed}"
        )
