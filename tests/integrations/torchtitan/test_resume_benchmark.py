"""The comparison of benchmarks.resume; its runs are those of test_resume_ranks."""

import pytest

from benchmarks.resume import differences


def rows(*losses):
    return [{"step": step, "kind": "train", "loss": loss} for step, loss in enumerate(losses, start=3)]


def test_only_losses_after_the_checkpoint_are_compared():
    assert differences(rows(9.0, 9.0, 2.0, 4.5), rows(1.0, 1.0, 2.0, 4.0)) == [0.0, 0.125]


def test_other_steps_are_an_error():
    with pytest.raises(RuntimeError, match="the runs recorded other steps"):
        differences(rows(1.0, 1.0, 1.0), rows(1.0, 1.0, 1.0, 1.0))
