"""The benchmark runner: rows with their origin, and no row for a wrong result."""

import csv

import pytest
import torch

from benchmarks import registry, run
from benchmarks.case import Case


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(registry, "CPU_SHAPES", ((32, 64),))


def test_rows_say_where_they_come_from(small, tmp_path, capsys):
    assert run.main(["scaled_cast", "--out", str(tmp_path), "--repeats", "3"]) == 0
    assert run.main(["scaled_cast", "--out", str(tmp_path), "--repeats", "3"]) == 0
    rows = list(csv.DictReader((tmp_path / "scaled_cast.csv").open()))
    assert [row["case"] for row in rows] == 2 * ["scaled_cast-rowwise", "scaled_cast-rowwise-transposed", "copy"]
    for row in rows:
        assert float(row["q10_ms"]) <= float(row["median_ms"]) <= float(row["q90_ms"])
        assert float(row["gb_per_s"]) > 0
        assert row["torch"] == torch.__version__
        assert all(row[key] for key in ("date", "hardware", "triton", "commit"))
        assert row["command"].startswith("python -m benchmarks.run scaled_cast")
    assert "GB/s" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(small, tmp_path, capsys, monkeypatch):
    def wrong() -> None:
        raise AssertionError("bits differ")

    def broken(device):
        yield Case(name="bad", shape="1x1", run=lambda: None, check=wrong, bytes_moved=1)

    monkeypatch.setitem(run.BENCHMARKS, "scaled_cast", broken)
    assert run.main(["scaled_cast", "--out", str(tmp_path), "--repeats", "3"]) == 1
    assert "bad 1x1 is wrong and was not timed: bits differ" in capsys.readouterr().err
    assert list(csv.DictReader((tmp_path / "scaled_cast.csv").open())) == []
