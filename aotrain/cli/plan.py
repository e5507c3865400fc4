"""`aotrain plan MODEL`: which linear layers gain from a recipe, by how much, and the filter for a job file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from aotrain.cli.launch import NOT_INSTALLED

if TYPE_CHECKING:
    from aotrain.integrations.planning import PlanTarget
    from aotrain.nn import Plan


def _optional(metavar: str) -> Any:
    """An option whose help text says what its absence means."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def plan(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    recipe: Annotated[str | None, _optional("NAME")] = None,
    tokens: Annotated[int | None, _optional("N")] = None,
    tp: Annotated[int | None, _optional("N")] = None,
    ep: Annotated[int | None, _optional("N")] = None,
    gpu: Annotated[str | None, _optional("NAME")] = None,
    out: Annotated[Path | None, _optional("FILE")] = None,
    skip: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="LAYER")] = (),
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = (),
    other_share: Annotated[float | None, _optional("PART")] = None,
    remeasure: bool = False,
) -> int:
    """Predict which linear layers of a model gain from low precision, and write the filter for it.

    Compares, for each layer, forward and backward in bfloat16 with casts plus products in the recipe. Measures on the
    local GPU, once per shape, or computes from a GPU's data sheet (a model, see docs/plan.md).

    Args:
        model: a job file such as configs/pretrain/llama3_8b_float8_rowwise_8xh100.yaml, a torchtitan model such as
            llama3/8b, or a folder with a Hugging Face config.json.
        recipe: float8_tensorwise, float8_rowwise, float8_rowwise_with_gw_hp, float8_blockwise, int8_rowwise, mxfp8,
            mxfp8_gw_hp, mxfp4 or nvfp4. Default: the job's, else float8_rowwise.
        tokens: tokens per GPU and forward pass (with tensor parallelism, of the ranks that split the layers together).
            Default: the job's batch_size * seq_len, else 16384.
        tp: tensor-parallel ranks. Default: the job's, else 1.
        ep: ranks that divide the experts of a mixture. Default: the job's, else 1.
        gpu: H100, H200, B200, A100, L40S, "RTX 4090" or MI300X: compute from its data sheet. Default: measure on the
            local GPU; without one, H100.
        out: write a YAML file with the precision section (recipe and skip list) for `aotrain pretrain`.
        skip: keep these layers in bfloat16: globs, or any part of a name. May be repeated. Default: the job's, else
            lm_head.
        set: change a key of the job file. May be repeated.
        other_share: part of a bfloat16 step that is not linear layers, 0 to 1. Default: estimated.
        remeasure: measure again what earlier runs have measured on this GPU.
    """
    try:
        from aotrain.gpus import find_gpu
        from aotrain.integrations.planning import find_target, recipe_of
    except ImportError as error:
        print(f"error: {error}; {NOT_INSTALLED}", file=sys.stderr)
        return 2
    try:
        recipe = recipe_of(recipe) if recipe is not None else None
        if gpu is not None:
            find_gpu(gpu)
        _check({"tokens": tokens, "tp": tp, "ep": ep}, other_share, out)
        target = find_target(model, set)
        sizes = {"tokens": tokens or target.tokens, "tp": tp or target.tp, "ep": ep or target.ep}
        made = _make(target, recipe, sizes, gpu, skip, other_share, remeasure)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _show(made, target)
    if out is not None:
        from aotrain.cli.plan_output import filter_yaml

        out.expanduser().write_text(filter_yaml(made, target.name), encoding="utf-8")
        print(f"filter in {out}: put it in the place of a job's precision section")
    return 0


def _check(counts: Mapping[str, int | None], other_share: float | None, out: Path | None) -> None:
    """Raise ValueError for what cannot be, before torch is loaded."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} got {value}, want at least 1")
    if other_share is not None and not 0 <= other_share < 1:
        raise ValueError(f"--other-share got {other_share}, want a number from 0 to below 1")
    if out is not None and not out.expanduser().absolute().parent.is_dir():
        raise ValueError(f"--out {out}: no such folder")


def _make(
    target: PlanTarget,
    recipe: str | None,
    sizes: Mapping[str, int],
    gpu: str | None,
    skip: tuple[str, ...],
    other_share: float | None,
    remeasure: bool,
) -> Plan:
    """The plan; the first thing here that needs torch."""
    from aotrain.nn import make_plan
    from aotrain.nn.measure import Measured
    from aotrain.nn.plan import times_for
    from aotrain.nn.skips import matches_skip

    shapes = target.shapes()
    if not skip:
        named = (entry for entry in target.skip if any(matches_skip(layer[0], entry) for layer in shapes))
        skip = target.skip if target.skip_is_given else tuple(named)
    times = times_for(gpu, refresh=remeasure)
    if isinstance(times, Measured):
        print(f"{times.label}; times are kept in {times.path}", file=sys.stderr)
    return make_plan(
        shapes,
        recipe or target.recipe,
        tokens=sizes["tokens"],
        tp=sizes["tp"],
        ep=sizes["ep"],
        times=times,
        skip=skip,
        other_share=other_share,
    )


def _show(made: Plan, target: PlanTarget) -> None:
    from aotrain.cli.plan_output import print_plan

    print_plan(made, target.name)
    for note in (target.note, *made.advice()):
        if note is not None:
            print(f"warning: {note}", file=sys.stderr)
