"""Training on real text ends where the high-precision twin ends, within the bounds of `benchmarks.convergence`."""

import csv
import math
from pathlib import Path

import pytest

from aotrain.integrations.torchtitan.job import load_job
from benchmarks.convergence import COLUMNS, SUITES, compare, distances, main
from benchmarks.run import ROOT, append_rows

JOBS = ROOT / "configs" / "pretrain"


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("suite", SUITES)
def test_ends_within_its_bounds_of_the_baseline(suite: str, tmp_path: Path):
    for end in distances(compare(suite, tmp_path)):
        assert end.percent <= end.bound, end


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
    rows = compare(suite, tmp_path, steps=3, overrides=short, only=[value], seeds=[0])
    assert [(row["run"], row["seed"]) for row in rows] == [(SUITES[suite].baseline, 0), (value, 0)]
    assert all(2.0 < row["validation_loss"] < 7.0 for row in rows)


def test_a_seed_decides_weights_and_text(tmp_path: Path):
    """One step, whose loss is that of the initial weights on the seed's first batch."""
    short = {"validation.steps": "1", "data.global_batch_size": "1", "data.seq_len": "32"}
    rows = compare("moe", tmp_path, steps=1, overrides=short, only=[], seeds=[0, 1])
    assert [(row["run"], row["seed"], row["percent"]) for row in rows] == [("null", 0, 0.0), ("null", 1, 0.0)]
    assert rows[0]["validation_loss"] != rows[1]["validation_loss"]


def test_the_distance_is_the_mean_over_pairs_of_one_seed():
    losses = {("null", 0): 1.0, ("mxfp8", 0): 1.01, ("null", 1): 3.0, ("mxfp8", 1): 3.05}
    rows = [
        {"run": run, "seed": seed, "validation_loss": loss, "bound_percent": 1.0 if run == "mxfp8" else 0.0}
        for (run, seed), loss in losses.items()
    ]
    baseline, other = distances(rows)
    assert (baseline.run, baseline.seeds, baseline.percent, baseline.standard_error) == ("null", 2, 0.0, 0.0)
    assert (other.run, other.seeds, other.bound) == ("mxfp8", 2, 1.0)
    # Differences of 0.5 and 2.5 % of the mean 2.0: mean 1.5, standard deviation sqrt(2), over sqrt(2).
    assert (other.loss, other.percent, other.standard_error) == pytest.approx((2.03, 1.5, 1.0))
    assert math.isnan(distances(rows[:2])[1].standard_error)


def test_the_results_have_the_columns_that_are_appended(tmp_path: Path):
    with (ROOT / "benchmarks" / "results" / "convergence.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == list(COLUMNS)
        assert all(row["seed"].isdigit() for row in reader)
    (tmp_path / "old.csv").write_text("date,suite\n")
    with pytest.raises(ValueError, match=r"got the columns .*, want .*; rewrite it"):
        append_rows(tmp_path / "old.csv", [], COLUMNS)


def test_a_run_that_the_suite_does_not_have_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["moe", "--only", "mxfp9"])
    assert "--only got mxfp9; want some of float8_rowwise" in capsys.readouterr().err
