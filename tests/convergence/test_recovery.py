"""The recovery benchmark runs; and, slow, 2 bits win back most of what quantization costs."""

import math

import pytest

from benchmarks.recovery import MIN_GAP, Sizes, compare

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
