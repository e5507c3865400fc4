"""Training on real text ends where the high-precision twin ends, within the bounds of `benchmarks.convergence`."""

from pathlib import Path

import pytest

from benchmarks.convergence import SUITES, compare


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("suite", SUITES)
def test_ends_within_its_bounds_of_the_baseline(suite: str, tmp_path: Path):
    for row in compare(suite, tmp_path):
        assert row["percent"] <= row["bound_percent"], row


@pytest.mark.parametrize("suite", SUITES)
def test_the_suites_run(suite: str, tmp_path: Path):
    """Three steps of each run: that the job files and keys are right, not where they end."""
    rows = compare(suite, tmp_path, steps=3, overrides={"validation.steps": "1", "data.global_batch_size": "2"})
    assert [row["run"] for row in rows] == [SUITES[suite].baseline, *SUITES[suite].bounds]
    assert all(2.0 < row["validation_loss"] < 7.0 for row in rows)
