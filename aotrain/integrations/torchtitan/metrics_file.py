"""``metrics.jsonl``: one JSON object per recorded step, the run's own account of itself.

A train row has ``kind: train`` and ``step, loss, grad_norm, lr, tokens_per_second, tokens_seen, seconds_per_step,
memory_gib`` (and ``tflops``, ``mfu`` in percent where they mean something); a validation row has ``kind: validation``
and ``step, loss``. Floats are written with all their digits, so that two runs can be compared bit for bit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from aotrain.integrations.config_file import JobError

FILE_NAME = "metrics.jsonl"

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """All complete rows. A last line that a crash cut off is left out.

    Raises:
        JobError: no such file, or a line in the middle is not a row.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise JobError(f"cannot read {path}: {error.strerror}; want the {FILE_NAME} of a run") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            row["step"], row["kind"], row["loss"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise JobError(f"{path}:{number}: not a row of metrics: {line[:80]!r}") from error
        rows.append(row)
    return rows


def losses(rows: list[Row], kind: str) -> tuple[list[int], list[float]]:
    """Steps and losses of the rows of one kind ("train" or "validation")."""
    chosen = [row for row in rows if row["kind"] == kind]
    return [row["step"] for row in chosen], [row["loss"] for row in chosen]


class MetricsFile:
    """Appends rows; the first row of a process removes what an earlier process recorded from that step on.

    A run that was killed between two checkpoints repeats some steps when it is resumed. Their old rows are dropped, so
    the file stays one curve.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started = False

    def append(self, row: Row) -> None:
        if not self._started:
            self._drop_from(row["step"])
            self._started = True
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _drop_from(self, step: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            return
        kept = [row for row in read_rows(self._path) if row["step"] < step]
        replacement = self._path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(replacement, self._path)
