"""The folder of a run: what is in it, and whether it may be continued.

``output_dir`` holds ``job.json`` (the job as it was last started), ``metrics.jsonl``, ``checkpoint/step-N``, ``logs``,
``tb``, and at the end ``loss.png`` and ``summary.json``. A run continues from its newest complete checkpoint when the
job still describes the same run: keys that decide what the weights and the data position mean must not change; any
other change is reported.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.job import PretrainJob

JOB_FILE = "job.json"
CHECKPOINTS = "checkpoint"

# Changing one of these makes it another run.
_IDENTITY = (
    "model.",
    "tokenizer",
    "optimizer.name",
    "data.dataset",
    "data.path",
    "data.text_field",
    "data.hub_config",
    "data.seq_len",
    "data.shard_by",
    "training.seed",
)

# These do not touch the numbers of the run.
_FREE = ("output_dir", "metrics.", "checkpoint.", "training.device", "data.workers")


def latest_step(run_dir: Path) -> int | None:
    """Step of the newest complete checkpoint; None without one. A checkpoint is complete once it has its metadata."""
    steps = [
        int(match.group(1))
        for folder in (run_dir / CHECKPOINTS).glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", folder.name)) and (folder / ".metadata").is_file()
    ]
    return max(steps, default=None)


def plan_resume(job: PretrainJob) -> tuple[int | None, list[str]]:
    """Decide how the run starts.

    Returns:
        The step to continue from, None for a fresh start; and one line per changed key of a continued run.

    Raises:
        JobError: the folder holds a run that must not, or cannot, be continued by this job.
    """
    assert job.output_dir is not None  # load_job fills it in
    run_dir = Path(job.output_dir)
    step = latest_step(run_dir)
    if step is None or not job.checkpoint.enabled:
        return None, []
    if job.checkpoint.resume == "never":
        raise JobError(
            f"output_dir {run_dir} already holds a run up to step {step} and checkpoint.resume is never; "
            "give another output_dir, remove the folder, or set checkpoint.resume=auto"
        )
    changes = _changes(run_dir, job)
    breaking = [line for key, line in changes if key.startswith(_IDENTITY)]
    if breaking:
        raise JobError(
            f"output_dir {run_dir} holds another run (up to step {step}): {'; '.join(breaking)}. "
            "Give another output_dir, or put these keys back to continue it"
        )
    return step, [line for _, line in changes]


def save_job(job: PretrainJob) -> None:
    """Keep a copy of the job in its run folder."""
    assert job.output_dir is not None
    path = Path(job.output_dir) / JOB_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(job.to_dict(), indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _changes(run_dir: Path, job: PretrainJob) -> list[tuple[str, str]]:
    """(key, "key: old -> new") of what differs from the job that wrote the folder, leaving out what is free."""
    try:
        saved = json.loads((run_dir / JOB_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, json.JSONDecodeError) as error:
        raise JobError(
            f"cannot read {run_dir / JOB_FILE}: {error}; remove it to continue without comparison"
        ) from error
    old, new = _flatten(saved), _flatten(job.to_dict())
    return [
        (key, f"{key}: {old.get(key)!r} -> {new.get(key)!r}")
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_FREE)
    ]


def _flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
