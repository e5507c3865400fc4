"""Continue a small pretraining run on other numbers of ranks and compare its losses with a run that went through.

    python -m benchmarks.resume [--out benchmarks/results]

Each job runs to its end on two ranks, and again up to a checkpoint; from there one, two and three ranks continue it.
Prints and appends to resume.csv, per job and number of ranks: the largest relative difference of any loss after the
checkpoint, training and validation, and of the first one. Exits with an error when one is beyond its bound; two ranks
have to repeat the losses bit for bit.
"""

import argparse
import datetime
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aotrain.integrations.torchtitan.metrics_file import FILE_NAME, Row, read_rows
from benchmarks.run import ROOT, append_rows, environment

COLUMNS = (
    "date", "job", "ranks", "first_difference", "largest_difference", "bound", "last_loss", "hardware", "driver",
    "torch", "triton", "commit", "command",
)  # fmt: skip

SAVED, STEPS = 4, 12
RANKS = (1, 2, 3)
# As tests/integrations/torchtitan/test_resume_ranks.py holds it.
BOUND = 3e-3
COMMON = {
    "training.device": "cpu",
    "data.seq_len": "64",
    "data.global_batch_size": "6",
    "schedule.warmup_steps": "2",
    "schedule.total_steps": str(STEPS),
    "checkpoint.every": str(SAVED),
    "validation.every": "6",
    "validation.steps": "1",
    "metrics.every": "1",
    "metrics.tensorboard": "false",
}
# Name -> job file and the keys in which it differs.
JOBS: dict[str, tuple[str, Mapping[str, str]]] = {
    "float8_rowwise": ("llama3_debug_float8_rowwise_cpu", {}),
    "float8_rowwise_no_clipping": ("llama3_debug_float8_rowwise_cpu", {"training.max_norm": "1000"}),
    "bfloat16": ("llama3_debug_bf16_cpu", {}),
    "float32": ("llama3_debug_bf16_cpu", {"precision.param_dtype": "float32"}),
    "float8_rowwise_document": ("llama3_debug_float8_rowwise_cpu", {"data.shard_by": "document"}),
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results file")
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.resume", *(sys.argv[1:] if arguments is None else arguments)])
    where = environment(torch.device("cpu")) | {"command": command}
    rows = []
    for name in JOBS:
        with tempfile.TemporaryDirectory() as folder:
            rows += [row | where for row in compare(name, Path(folder))]
    append_rows(options.out / "resume.csv", rows, COLUMNS)
    return 1 if any(row["largest_difference"] > row["bound"] for row in rows) else 0


def compare(name: str, folder: Path) -> list[dict[str, Any]]:
    """Run one job below a folder; returns one row per number of ranks that continued it."""
    train(name, folder / "whole", STEPS, ranks=2)
    train(name, folder / "part", SAVED, ranks=2)
    whole = read_rows(folder / "whole" / FILE_NAME)
    found = []
    for ranks in RANKS:
        copy = folder / f"on{ranks}"
        shutil.copytree(folder / "part", copy)
        train(name, copy, STEPS, ranks)
        rows = read_rows(copy / FILE_NAME)
        gaps = differences(rows, whole)
        found.append(
            {
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "job": name,
                "ranks": ranks,
                "first_difference": f"{gaps[0]:.1e}",
                "largest_difference": float(f"{max(gaps):.1e}"),
                "bound": 0.0 if ranks == 2 else BOUND,
                "last_loss": [row["loss"] for row in rows if row["kind"] == "train"][-1],
            }
        )
        print(f"{name:28} {ranks} ranks: first {gaps[0]:.1e}, largest {max(gaps):.1e}", flush=True)
    return found


def differences(rows: list[Row], whole: list[Row]) -> list[float]:
    """Relative difference of each loss after the checkpoint, in the order of the run."""
    losses, expected = (
        {(r["step"], r["kind"]): r["loss"] for r in some if r["step"] > SAVED} for some in (rows, whole)
    )
    if losses.keys() != expected.keys():
        raise RuntimeError(f"the runs recorded other steps: got {sorted(losses)}, want {sorted(expected)}")
    return [abs(losses[key] / expected[key] - 1) for key in expected]


def train(name: str, run_dir: Path, steps: int, ranks: int) -> None:
    """Run, or continue, a job up to a step."""
    file, keys = JOBS[name]
    keys = {**COMMON, **keys, "training.steps": str(steps), "output_dir": str(run_dir)}
    settings = [argument for key, text in keys.items() for argument in ("--set", f"{key}={text}")]
    job = ROOT / "configs" / "pretrain" / f"{file}.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "aotrain.cli", "pretrain", str(job), "--nproc", str(ranks), *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} on {ranks} ranks failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())
