"""The rows of a recipe, and those that are held out of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from aotrain.integrations.config_file import JobError
from aotrain.integrations.finetune.recipe import STDLIB_PAIRS
from aotrain.integrations.finetune.stdlib_pairs import stdlib_pairs

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Data, Recipe

Rows = Dataset | IterableDataset


def load_rows(recipe: Recipe) -> tuple[Rows, Rows | None]:
    """(rows to train on, rows held out for `evaluate`).

    Raises:
        JobError: no such data, or too few rows.
    """
    rows = _read(recipe.data)
    if recipe.evaluate is None:
        return rows, None
    heldout = recipe.evaluate.heldout
    if isinstance(rows, IterableDataset):
        if heldout < 1:
            raise JobError(f"evaluate.heldout: got {heldout}, but a stream has no length; want a number of rows")
        return rows.skip(int(heldout)), rows.take(int(heldout))
    count = int(heldout) if heldout >= 1 else max(1, int(heldout * len(rows)))
    if count >= len(rows):
        raise JobError(f"evaluate.heldout: got {count} rows, and there are only {len(rows)}; want fewer")
    if recipe.data.path == STDLIB_PAIRS:  # ordered so that the end is files of its own
        return rows.take(len(rows) - count), rows.skip(len(rows) - count)
    parts: Any = rows.train_test_split(test_size=count, seed=recipe.trainer.get("seed", 42))
    return parts["train"], parts["test"]


def _read(data: Data) -> Rows:
    if data.path == STDLIB_PAIRS:
        rows: Rows = Dataset.from_list(stdlib_pairs(max_rows=data.max_rows, max_chars=data.max_chars))
    else:
        try:
            rows = load_dataset(data.path, split=data.split, **data.kwargs)
        except (DatasetNotFoundError, DatasetGenerationError, OSError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise JobError(
                f"data: cannot read {data.path!r}, split {data.split!r}: {reason}; check names, split and network"
            ) from error
        if data.max_rows is not None:
            rows = rows.take(min(data.max_rows, len(rows)) if isinstance(rows, Dataset) else data.max_rows)
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise JobError(f"data: {data.path!r}, split {data.split!r}, has no rows; want at least one")
    return rows
