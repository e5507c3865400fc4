"""Training on real text ends where the high-precision twin ends, within the bounds of `benchmarks.convergence`."""

from pathlib import Path

import pytest

from aotrain.integrations.torchtitan.job import load_job
from benchmarks.convergence import SUITES, compare, main
from benchmarks.run import ROOT

JOBS = ROOT / "configs" / "pretrain"


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("suite", SUITES)
def test_ends_within_its_bounds_of_the_baseline(suite: str, tmp_path: Path):
    for row in compare(suite, tmp_path):
        assert row["percent"] <= row["bound_percent"], row


@pytest.mark.parametrize("suite", SUITES)
def test_every_run_is_a_valid_job(suite: str):
    one = SUITES[suite]
    for value in (one.baseline, *one.bounds):
        load_job(JOBS / one.job, [f"{key}={text}" for key, text in {**one.overrides, one.key: value}.items()])


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_runs(suite: str, tmp_path: Path):
    """Three steps of the baseline and of one other run, to see that they are compared, not where they end."""
    short = {"validation.steps": "1", "data.global_batch_size": "2"}
    value = next(iter(SUITES[suite].bounds))
    rows = compare(suite, tmp_path, steps=3, overrides=short, only=[value])
    assert [row["run"] for row in rows] == [SUITES[suite].baseline, value]
    assert all(2.0 < row["validation_loss"] < 7.0 for row in rows)


def test_a_run_that_the_suite_does_not_have_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["moe", "--only", "mxfp9"])
    assert "--only got mxfp9; want some of float8_rowwise" in capsys.readouterr().err
