"""Rules of a pretraining job that span several keys.

What a key may be by itself is said where the key is, in ``job``. ``load_job`` reports what ``broken_rules`` finds
together with everything else. Imports neither torch nor torchtitan.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from aotrain.integrations.torchtitan.families import DEBUG, FAMILIES

if TYPE_CHECKING:
    from aotrain.integrations.torchtitan.job import PretrainJob

# Built-in text needs no path; the others read what `data.path` names.
LOCAL_DATASETS = ("text", "json", "parquet")


def broken_rules(job: PretrainJob) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it) for each broken rule."""
    data = job.data
    if data.global_batch_size is None and data.batch_size is None:
        yield "data.global_batch_size", "is missing; give it, or data.batch_size per rank"
    if data.dataset in (*LOCAL_DATASETS, "hub") and data.path is None:
        yield "data.path", f"is missing; data.dataset {data.dataset!r} needs it"
    if data.dataset in ("stdlib", "c4") and data.path is not None:
        yield (
            "data.path",
            f"is given but data.dataset {data.dataset!r} does not read it; use text, json, parquet or hub",
        )
    if job.precision.emulate and not job.precision.recipes:
        yield "precision.emulate", "is set but precision.recipe is null; name a recipe or remove it"
    yield from _check_gathered(job)
    yield from _check_experts(job)
    if job.precision.recipe == "nvfp4" and job.parallelism.tp > 1:
        yield (
            "parallelism.tp",
            f"got {job.parallelism.tp}, but nvfp4 layers cannot be split; want tp 1 (dp_shard splits the weights), or "
            "precision.recipe mxfp8 or float8_rowwise",
        )
    if job.model.size == DEBUG and job.tokenizer != "byte":
        yield "tokenizer", f"got {job.tokenizer!r}, but model.size debug has 320 tokens and fits only 'byte'"
    looks_local = job.tokenizer.startswith((".", "/", "~"))
    if looks_local and not Path(job.tokenizer).expanduser().is_dir():
        yield "tokenizer", f"no such folder: {job.tokenizer!r}; want byte, a folder with tokenizer.json, or a hub id"
    if job.optimizer.name == "adamw":
        for key in ("bf16_stochastic_round", "bits"):
            if getattr(job.optimizer, key):
                yield f"optimizer.{key}", "is not offered by adamw; want optimizer.name adamw_8bit or another"


def _check_gathered(job: PretrainJob) -> Iterator[tuple[str, str]]:
    if not job.precision.fsdp_float8_all_gather:
        return
    recipe = job.precision.recipe
    if recipe is None:
        yield "precision.fsdp_float8_all_gather", "is set but precision.recipe is null; name a recipe or remove it"
    elif recipe.startswith(("mx", "nv")):
        yield "precision.fsdp_float8_all_gather", f"does not go with {recipe}, whose weights are gathered whole"


def _check_experts(job: PretrainJob) -> Iterator[tuple[str, str]]:
    layout, dispatch = job.parallelism, job.precision.expert_dispatch
    if not FAMILIES[job.model.family].is_moe:
        if job.precision.experts is not None:
            yield "precision.experts", f"is set but {job.model.family} has no experts; name a recipe, or another family"
        if layout.ep > 1:
            yield "parallelism.ep", f"got {layout.ep}, but {job.model.family} has no experts; want 1"
        if dispatch is not None:
            yield "precision.expert_dispatch", f"got {dispatch!r}, but {job.model.family} has no experts; want null"
    elif layout.dp_shard > 0 and (layout.dp_shard * layout.tp) % layout.ep:
        yield (
            "parallelism.ep",
            f"got {layout.ep}, want a divisor of dp_shard * tp, {layout.dp_shard * layout.tp} ranks",
        )
    elif layout.ep == 1 and dispatch is not None:
        yield (
            "precision.expert_dispatch",
            f"got {dispatch!r}, but with parallelism.ep 1 no token leaves its rank; want null, or ep of at least 2",
        )
