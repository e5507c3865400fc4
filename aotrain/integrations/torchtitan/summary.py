"""``summary.json``: what a finished run was and where it ended."""

from __future__ import annotations

import json
import os
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from aotrain.integrations.torchtitan.job import PretrainJob
from aotrain.integrations.torchtitan.metrics_file import FILE_NAME, losses, read_rows

SUMMARY_FILE = "summary.json"


def write_summary(job: PretrainJob, run_dir: Path) -> dict[str, Any]:
    """Write and return the summary: first and last losses, speed, recipe, optimizer, versions.

    ``tokens_per_second`` is the median over the recorded steps after the first, all ranks together.
    """
    rows = read_rows(run_dir / FILE_NAME)
    speeds = [row["tokens_per_second"] for row in rows if row["kind"] == "train" and row["step"] > 1]
    summary = {
        "steps": job.training.steps,
        "train_loss": _ends(rows, "train"),
        "validation_loss": _ends(rows, "validation"),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "model": f"{job.model.family}_{job.model.size}",
        "recipe": job.precision.recipe,
        "experts": job.precision.experts,
        "expert_dispatch": job.precision.expert_dispatch,
        "param_dtype": job.precision.param_dtype,
        "optimizer": job.optimizer.name,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchtitan": version("torchtitan"),
    }
    (run_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _ends(rows: list[dict[str, Any]], kind: str) -> dict[str, float] | None:
    _, values = losses(rows, kind)
    return {"first": values[0], "last": values[-1], "lowest": min(values)} if values else None
