"""Small mixtures of experts trained through jobs: they learn, repeat bit for bit, and resume."""

import json

import pytest

from .conftest import numbers
from .processes import finish, start

MOE = "deepseek_v3_debug_moe_float8_rowwise_cpu"


def test_twenty_steps_learn(train, tmp_path):
    options = ["training.steps=20", "schedule.total_steps=20", "schedule.warmup_steps=5", "data.global_batch_size=8"]
    rows = train(*options, "data.seq_len=128", "metrics.every=1", "validation.every=20", config=MOE)
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[0] > 5.5
    assert losses[-1] < 3.6
    validation = [row["loss"] for row in rows if row["kind"] == "validation"]
    assert validation[-1] < 3.6
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["model"], summary["recipe"], summary["experts"]) == (
        "deepseek_v3_debug",
        "float8_rowwise",
        "float8_rowwise",
    )


def test_mxfp8_learns(train):
    options = ["training.steps=10", "schedule.total_steps=10", "schedule.warmup_steps=2", "data.global_batch_size=4"]
    rows = train(*options, "validation.every=null", config="deepseek_v3_debug_moe_mxfp8_cpu")
    assert rows[0]["loss"] > 5.5
    assert rows[-1]["loss"] < 4.2


def test_repeats_and_resumes_bit_for_bit(train):
    """The balance of experts, a buffer outside of the optimizer, included."""
    options = ["training.steps=4", "checkpoint.every=2", "metrics.every=1"]
    whole = train(*options, name="whole", config=MOE)
    train(*options, "training.steps=2", name="parts", config=MOE)
    assert numbers(train(*options, name="parts", config=MOE)) == numbers(whole)


def test_experts_dealt_onto_two_ranks_continue_on_one(train, tmp_path):
    options = ["training.steps=4", "checkpoint.every=2", "metrics.every=1", "validation.every=null"]
    whole = train(*options, name="whole", config=MOE)
    first = [*options, "training.steps=2", "data.batch_size=1", "parallelism.ep=2"]
    finish(start(MOE, tmp_path / "parts", *first, ranks=2))
    continued = train(*options, name="parts", config=MOE)
    assert [row["step"] for row in continued] == [1, 2, 3, 4]
    assert [row["loss"] for row in continued] == pytest.approx([row["loss"] for row in whole], rel=3e-3)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_activation_checkpointing_changes_no_bit(train, checkpointing):
    options = ["training.steps=2", "checkpoint.enabled=false"]
    plain = train(*options, name="plain", config=MOE)
    recomputed = train(*options, f"training.activation_checkpoint={checkpointing}", name="recomputed", config=MOE)
    assert numbers(recomputed) == numbers(plain)


def test_the_experts_recipe_is_independent_of_the_layers_recipe(train):
    options = ["training.steps=2", "checkpoint.enabled=false", "validation.every=null"]
    losses = {}
    for recipe in ("null", "float8_rowwise"):
        for experts in ("null", "float8_rowwise", "int8_rowwise"):
            keys = [f"precision.recipe={recipe}", f"precision.experts={experts}"]
            rows = train(*options, *keys, name=f"{recipe}-{experts}", config=MOE)
            losses[recipe, experts] = tuple(row["loss"] for row in rows)
    assert len(set(losses.values())) == len(losses)
    want = losses["null", "null"]
    assert all(loss == pytest.approx(want, rel=0.01) for loss in losses.values())


def test_qwen3_in_small(train):
    """torchtitan's own debug size: 64 experts."""
    overrides = ["model.family=qwen3_moe", "model.size=debugmodel", "training.steps=1", "validation.every=null"]
    (row,) = train(*overrides, "data.seq_len=32", "checkpoint.enabled=false", config=MOE)
    assert 6.0 < row["loss"] < 9.0
