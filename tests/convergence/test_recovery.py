"""The recovery benchmark runs; and, slow, 2 bits win back most of what quantization costs."""

import math

import pytest

from benchmarks import recovery_report
from benchmarks.recovery import COLUMNS, MIN_GAP, Sizes, compare
from benchmarks.run import ROOT, append_rows

TINY = Sizes(hidden=64, layers=1, base_steps=4, steps=3, eval_windows=4)


def test_a_row_has_control_ptq_and_qat():
    (row,) = compare(0, ["int4-g32"], TINY)
    losses = [row[f"{name}_nll"] for name in ("control", "ptq", "qat")]
    assert all(2.0 < loss < 6.0 for loss in losses)
    assert len(set(losses)) == 3
    assert row["gap_percent"] == round(100 * (math.exp(losses[1] - losses[0]) - 1), 3)
    if row["gap_percent"] < 100 * MIN_GAP:
        assert row["recovery"] == ""
    else:
        assert row["recovery"] == pytest.approx((losses[1] - losses[2]) / (losses[1] - losses[0]), abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_two_bits_recover():
    (row,) = compare(0, ["int2-g32"], Sizes())
    assert row["recovery"] >= 0.85


def test_the_guide_has_the_table_of_the_results():
    """`python -m benchmarks.recovery_report` prints it and draws the plot beside it."""
    rows = recovery_report.read(recovery_report.RESULTS)
    guide = (ROOT / "docs" / "qat.md").read_text()
    assert recovery_report.table(rows) in guide
    assert f"({recovery_report.PLOT.relative_to(ROOT / 'docs')})" in guide
    assert recovery_report.PLOT.exists()


def test_a_report_of_rows(tmp_path, capsys):
    def row(scheme, seed, control, ptq, qat, recovery):
        nats = {"control_nll": control, "ptq_nll": ptq, "qat_nll": qat}
        perplexities = {name.replace("nll", "ppl"): math.exp(value) for name, value in nats.items()}
        return (
            {"scheme": scheme, "steps": 250, "seed": seed, "gap_percent": 4.0, "recovery": recovery}
            | nats
            | perplexities
        )

    first = row("int4-g32", 0, 1.0, 1.01, 1.005, "")
    again = row("int2-g32", 1, 1.0, 1.5, 1.4, 0.2)
    rows = [first, row("int2-g32", 1, 1.0, 1.5, 1.3, 0.4), row("int2-g32", 0, 1.0, 1.5, 1.2, 0.6), again]
    rows = [dict.fromkeys(COLUMNS, "") | each for each in rows]
    append_rows(tmp_path / "rows.csv", rows, COLUMNS)
    pictures = [tmp_path / name / "plot.svg" for name in ("one", "two")]
    for picture in pictures:
        assert recovery_report.main(["--results", str(tmp_path / "rows.csv"), "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    # By scheme and seed, the later row of a seed; 60 and 20 %: mean 40, standard error 20.
    assert [line.split(" | ")[2] for line in lines[2:5]] == ["0", "1", "mean"]
    assert lines[2] == "| int2-g32 | 250 | 0 | 2.7183 | 4.4817 | 3.3201 | 4.00 % | 60.0 % |"
    assert lines[4].endswith("| **40.0 +- 20.0 %** |")
    assert lines[5].endswith("| gap too small |")
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
