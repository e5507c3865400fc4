"""The aotrain command as a user types it: help, mistakes, a short run with its printed torchrun line, curves."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
JOB = ROOT / "configs" / "pretrain" / "llama3_debug_float8_rowwise_cpu.yaml"


def aotrain(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aotrain.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize(
    "command",
    [[], ["pretrain"], ["plan"], ["curves"], ["export"]],
    ids=["aotrain", "pretrain", "plan", "curves", "export"],
)
def test_help(command: list[str]):
    result = aotrain(*command, "--help")
    assert result.returncode == 0
    assert "usage: aotrain" in result.stdout


def test_check_accepts_every_shipped_job():
    for path in sorted((ROOT / "configs" / "pretrain").glob("*.yaml")):
        result = aotrain("pretrain", path, "--check")
        assert result.returncode == 0, result.stderr
        assert "ok" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--set", "training.stepz=3"], ["training.stepz", "did you mean 'training.steps'"]),
        (["--set", "optimizer.lr=fast", "--set", "model.size=9b"], ["2 problems", "optimizer.lr", "model.size"]),
        (["--nproc", 0], ["--nproc got 0"]),
    ],
    ids=["unknown key", "two problems", "nproc"],
)
def test_mistakes_are_shown_without_a_traceback_and_start_nothing(tmp_path, arguments, messages):
    result = aotrain("pretrain", JOB, "--set", f"output_dir={tmp_path / 'run'}", *arguments)
    assert result.returncode == 2
    for message in messages:
        assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "torchrun" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_broken_yaml_names_the_line(tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text("model:\n  size: debug\n precision: [\n")
    result = aotrain("pretrain", job)
    assert result.returncode == 2
    assert f"{job}:3" in result.stderr


def test_a_short_run_prints_a_torchrun_line_that_works_by_itself(tmp_path):
    overrides = {"training.steps": 2, "validation.every": "null", "checkpoint.enabled": "false"}
    options = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    first = aotrain("pretrain", JOB, *options, "--set", f"output_dir={tmp_path / 'first'}")
    assert first.returncode == 0, first.stderr
    line = next(line for line in first.stderr.splitlines() if line.startswith("+ "))
    printed = shlex.split(line.removeprefix("+ ").replace(str(tmp_path / "first"), str(tmp_path / "second")))
    launcher = [part for part in printed if not part.startswith("OMP_NUM_THREADS")]
    assert launcher[0] == "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", *launcher[1:]]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    losses = [json.loads((tmp_path / run / "summary.json").read_text())["train_loss"] for run in ("first", "second")]
    assert losses[0] == losses[1]

    picture = tmp_path / "curves.png"
    compared = aotrain("curves", tmp_path / "first", tmp_path / "second", "--out", picture)
    assert compared.returncode == 0, compared.stderr
    assert "+0.00 %" in compared.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_curves_of_an_unfinished_run_say_so(tmp_path):
    result = aotrain("curves", tmp_path)
    assert result.returncode == 2
    assert "no summary.json" in result.stderr
