"""What may change between two starts of the same run."""

import json

import pytest

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.run_dir import JOB_FILE, latest_step, plan_resume, save_job


@pytest.fixture
def at_step_40(tiny_job, tmp_path):
    """A run folder with complete checkpoints 20 and 40, and 60 half written."""
    save_job(tiny_job())
    for step in (20, 40, 60):
        folder = tmp_path / "run" / "checkpoint" / f"step-{step}"
        folder.mkdir(parents=True)
        if step != 60:
            (folder / ".metadata").touch()
    return tmp_path / "run"


def test_the_newest_complete_checkpoint_counts(at_step_40, tiny_job):
    assert latest_step(at_step_40) == 40
    assert plan_resume(tiny_job()) == (40, [])


def test_an_empty_folder_is_a_fresh_start(tiny_job, tmp_path):
    assert latest_step(tmp_path / "run") is None
    assert plan_resume(tiny_job("checkpoint.resume=never")) == (None, [])


@pytest.mark.parametrize(
    "override",
    ["metrics.every=7", "checkpoint.every=9", "data.workers=1", "training.device=auto"],
)
def test_some_keys_are_free(at_step_40, tiny_job, override):
    assert plan_resume(tiny_job(override)) == (40, [])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.steps=9", "training.steps: 3 -> 9"),
        ("optimizer.lr=0.5", "optimizer.lr: 0.004 -> 0.5"),
        ("precision.recipe=rowwise", "precision.recipe: None -> 'float8_rowwise'"),
    ],
    ids=["steps", "lr", "recipe"],
)
def test_some_changes_are_reported(at_step_40, tiny_job, override, line):
    assert plan_resume(tiny_job(override)) == (40, [line])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.seed=1", "training.seed: 0 -> 1"),
        ("optimizer.name=adamw", "optimizer.name: 'adamw_8bit' -> 'adamw'"),
        ("data.seq_len=32", "data.seq_len: 64 -> 32"),
        ("data.shard_by=document", "data.shard_by: 'sequence' -> 'document'"),
    ],
    ids=["seed", "optimizer", "seq_len", "shard_by"],
)
def test_some_changes_make_it_another_run(at_step_40, tiny_job, override, line):
    with pytest.raises(JobError, match=rf"holds another run \(up to step 40\): {line}. Give another output_dir"):
        plan_resume(tiny_job(override))


def test_a_damaged_copy_of_the_job_is_named(at_step_40, tiny_job):
    (at_step_40 / JOB_FILE).write_text("{")
    with pytest.raises(JobError, match=r"cannot read .*job.json: .*; remove it to continue without comparison"):
        plan_resume(tiny_job())


def test_the_copy_is_the_job(tiny_job, tmp_path):
    job = tiny_job("checkpoint.async=true")
    save_job(job)
    saved = json.loads((tmp_path / "run" / JOB_FILE).read_text())
    assert type(job).model_validate_json(json.dumps(saved)) == job
    assert saved["checkpoint"]["async"] is True
