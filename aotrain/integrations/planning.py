"""What `aotrain plan` is asked to plan: a job file, a torchtitan model or a config.json, found without importing torch.

``find_target`` checks the names; ``PlanTarget.shapes`` then imports what it needs and lists the layers.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.batch import batch_sizes
from aotrain.integrations.torchtitan.families import FAMILIES
from aotrain.integrations.torchtitan.job import Precision, PretrainJob, load_job

if TYPE_CHECKING:
    from aotrain.nn.layer_times import Layer

# Without a job: as many tokens as the published measurements of float8 linear layers were made with.
DEFAULT_TOKENS = 16384
DEFAULT_RECIPE = "float8_rowwise"
DEFAULT_SKIP = ("lm_head",)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanTarget:
    """A model, and how it will be trained as far as that is known."""

    # As printed.
    name: str
    # Lists the linear layers and experts.
    shapes: Callable[[], list[Layer]]
    recipe: str = DEFAULT_RECIPE
    # Rows of x per forward pass and data-parallel rank.
    tokens: int = DEFAULT_TOKENS
    tp: int = 1
    ep: int = 1
    # Entries that match no layer of this model are dropped unless `skip_is_given`.
    skip: tuple[str, ...] = DEFAULT_SKIP
    skip_is_given: bool = False
    # What was assumed.
    note: str | None = None


def find_target(model: str, overrides: Sequence[str] = ()) -> PlanTarget:
    """The target that a MODEL argument names.

    Args:
        model: a pretraining job file, FAMILY/SIZE of torchtitan, or a folder with config.json.
        overrides: ``key=value`` strings for a job file.

    Raises:
        JobError: there is no such thing, or the job file has mistakes.
    """
    path = Path(model).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return _of_job(path, load_job(path, overrides))
    if overrides:
        raise JobError(f"--set {overrides[0]}: changes a job file, but the model is {model!r}")
    folder = path.parent if path.name == "config.json" else path
    if (folder / "config.json").is_file():
        return PlanTarget(name=str(folder), shapes=lambda: _huggingface_shapes(folder))
    if path.is_dir():
        raise JobError(f"model {model!r}: the folder has no config.json")
    return _of_family(model)


def recipe_of(name: str) -> str:
    """The full name of a recipe that jobs can have.

    Raises:
        JobError: unknown; lists the valid names and the nearest.
    """
    try:
        recipe = Precision(recipe=typing.cast(typing.Any, name)).recipe
    except ValidationError:
        recipe = None
    if recipe is None:
        literal = typing.get_args(Precision.model_fields["recipe"].annotation)[0]
        raise JobError(f"unknown recipe {name!r}; {_want(name, typing.get_args(literal))}")
    return recipe


def _of_job(path: Path, job: PretrainJob) -> PlanTarget:
    layout, family = job.parallelism, FAMILIES[job.model.family]
    sizes = batch_sizes(job, layout.tp * layout.dp_replicate * max(layout.dp_shard, 1))
    note = None
    if job.data.batch_size is None and layout.dp_shard == -1:
        note = "data.batch_size is null: its tokens are those of one data-parallel rank; --tokens gives another number"
    return PlanTarget(
        name=str(path),
        shapes=lambda: _torchtitan_shapes(family.package, family.sizes[job.model.size]),
        recipe=job.precision.recipe or job.precision.experts or DEFAULT_RECIPE,
        tokens=sizes.local * job.data.seq_len,
        tp=layout.tp,
        ep=layout.ep,
        skip=tuple(job.precision.skip),
        skip_is_given=True,
        note=note,
    )


def _of_family(model: str) -> PlanTarget:
    from aotrain.integrations.torchtitan.shapes import families

    known = families()
    family, slash, size = model.partition("/")
    if not slash or family not in known:
        kinds = "a job file (*.yaml), FAMILY/SIZE of torchtitan, or a folder with config.json"
        names = [f"{name}/{each}" for name, sizes in known.items() for each in sizes]
        near = difflib.get_close_matches(model.lower(), [name.lower() for name in names], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise JobError(f"unknown model {model!r}; want {kinds}. Families: {', '.join(known)}{hint}")
    if size.lower() not in {each.lower() for each in known[family]}:
        raise JobError(f"unknown size {size!r} of {family}; {_want(size, known[family])}")
    return PlanTarget(name=model, shapes=lambda: _torchtitan_shapes(family, _stock_size(family, size)))


def _stock_size(family: str, size: str) -> str:
    """The size as torchtitan writes it."""
    from aotrain.integrations.torchtitan.shapes import families

    return {each.lower(): each for each in families()[family]}[size.lower()]


def _torchtitan_shapes(family: str, size: str) -> list[Layer]:
    from aotrain.integrations.torchtitan.shapes import layer_shapes

    return layer_shapes(family, size)


def _huggingface_shapes(folder: Path) -> list[Layer]:
    from aotrain.integrations.huggingface.shapes import layer_shapes

    return layer_shapes(folder)


def _want(got: str, valid: Iterable[str]) -> str:
    names = list(valid)
    near = difflib.get_close_matches(got.lower(), [name.lower() for name in names], n=1, cutoff=0.5)
    hint = f"; did you mean {next(name for name in names if name.lower() == near[0])!r}?" if near else ""
    return f"want one of {', '.join(names)}{hint}"
