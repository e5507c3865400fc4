"""Runs that repeat, that were interrupted, and that several ranks share."""

import json

import pytest

from aotrain.integrations.config_file import JobError
from aotrain.integrations.finetune import run
from aotrain.integrations.torchtitan.metrics_file import read_rows
from aotrain.testing import assert_bitwise_equal

from .processes import finish, start_ranks
from .tiny_finetune import loader, read_weights


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


def test_the_same_recipe_repeats_and_the_control_is_a_run_without_quantization(load, tmp_path):
    first = run(load("export=null", "evaluate.control=true"))
    again = run(load("export=null", f"trainer.output_dir={tmp_path / 'again'}"))
    assert first["nll"]["qat"] == again["nll"]["qat"]
    dense = run(load("export=null", f"trainer.output_dir={tmp_path / 'dense'}", "quantize=null"))
    assert first["nll"]["control"] == dense["nll"]["trained"]
    assert dense["recovered"] is None
    want, got = (read_weights(tmp_path / name) for name in ("out", "again"))
    for name, value in want.items():
        assert_bitwise_equal(got[name], value, what=name)


def test_an_interrupted_run_goes_on_to_the_same_bits(load, tmp_path):
    saving = ("trainer.save_strategy=steps", "trainer.save_steps=2", "evaluate=null", "export=null")
    whole = load(*saving, f"trainer.output_dir={tmp_path / 'whole'}", "quantize.start_step=3")
    run(whole)
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    (tmp_path / "whole" / "checkpoint" / "step-2").rename(tmp_path / "out" / "checkpoint" / "step-2")
    with pytest.raises(JobError, match=r"did not finish, up to step-2; continue it with --trainer.resume_from"):
        run(load(*saving, "quantize.start_step=3"))
    resumed = load(*saving, "trainer.resume_from_checkpoint=true", "quantize.start_step=3")
    run(resumed)
    assert [row["step"] for row in read_rows(resumed.output_dir / "metrics.jsonl")] == [3, 4, 5, 6]
    want, got = read_weights(whole.output_dir), read_weights(resumed.output_dir)
    for name, value in want.items():
        assert_bitwise_equal(got[name], value, what=name)
    with pytest.raises(JobError, match="holds a finished run"):
        run(load(*saving, "trainer.resume_from_checkpoint=true"))


def test_two_ranks_train_what_one_does(load, tmp_path):
    """Sharded by FSDP2 over gloo: same batches, so the same losses but for the order of sums."""
    # A large eps: else AdamW's first steps are the signs of gradients, also of those that are only noise.
    changes = [
        "evaluate.control=true",
        "trainer.max_steps=3",
        "optimizer.name=adamw",
        "optimizer.eps=1e-2",
    ]
    # int4 puts the largest weight of each group on a tie between two codes, where the last bit of a sum decides.
    changes += ["quantize.scheme=fp8-weight-only"]
    one = load(*changes)
    alone = run(one)
    out = tmp_path / "two"
    folders = [f"trainer.output_dir={out}", f"export.path={tmp_path / 'two_served'}"]
    settings = [*changes, *folders, "trainer.per_device_train_batch_size=2"]
    arguments = ["-m", "aotrain.cli", "finetune", str(tmp_path / "recipe.yaml")]
    arguments += [part for setting in settings for part in ("--set", setting)]
    finish(*start_ranks(arguments, ranks=2))
    summary = json.loads((out / "summary.json").read_text())
    got, want = ([row["loss"] for row in read_rows(folder / "metrics.jsonl")] for folder in (out, one.output_dir))
    assert got == pytest.approx(want, abs=1e-4)
    assert "exported" in alone["nll"]
    for name, value in alone["nll"].items():
        assert summary["nll"][name] == pytest.approx(value, abs=1e-4), name
    one_weights, two_weights = read_weights(one.output_dir), read_weights(out)
    assert one_weights.keys() == two_weights.keys()
    for name, value in one_weights.items():
        assert (two_weights[name] - value).abs().mean() < 1e-5, name
