"""gpu_check.sh by what it runs: order, resumption and its limit, with a stand-in for Python."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in *"$FAILING"*) exit 1 ;; esac
"""


@pytest.fixture
def check(tmp_path):
    """Run the script; returns its exit status and the stages it ran, by their first words."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(failing: str = "nothing", limit: int = 570) -> tuple[int, list[str]]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        variables = {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "CALLS": str(calls), "FAILING": failing}
        done = subprocess.run(
            [str(ROOT / "scripts" / "gpu_check.sh")],
            env=os.environ | variables | {"LIMIT": str(limit)},
            capture_output=True,
            check=False,
        )
        lines = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, [line.split()[2] if line.startswith("-m benchmarks") else line[:9] for line in lines]

    return run


STAGES = ["-c import", "-m aotrai", "-m pytest", "float8", "moe", "optim", "routing", "scaled_cast", "nvfp4"]


def test_tests_run_before_benchmarks_and_a_passed_stage_is_not_repeated(check):
    assert check() == (0, STAGES)
    assert check() == (0, [])


def test_a_failed_stage_fails_the_run_and_only_it_is_repeated(check):
    assert check(failing="benchmarks.run optim") == (1, STAGES)
    assert check() == (0, ["optim"])


def test_no_stage_begins_without_time(check):
    assert check(limit=10) == (1, [])
    assert check() == (0, STAGES)


def test_every_gpu_test_lies_where_the_script_looks(check):
    folders = {path.relative_to(ROOT / "tests").parts[0] for path in marked()}
    script = (ROOT / "scripts" / "gpu_check.sh").read_text()
    assert folders
    for folder in folders:
        assert f"tests/{folder}" in script


def marked() -> list[Path]:
    return [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu\n" in path.read_text()]
