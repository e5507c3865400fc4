"""A checkpoint that cannot be loaded is refused with its reason: other model, other optimizer, damaged files, code."""

import os
import pickle
import shutil

import pytest

from aotrain.integrations.torchtitan.checkpoint_check import CheckpointError, check_files, read_metadata


@pytest.fixture
def trained(train, tmp_path):
    """A run folder with checkpoints of steps 2 and 3."""
    train(name="run")
    return tmp_path / "run"


def refused(train, *overrides: str, name: str = "run") -> str:
    with pytest.raises(CheckpointError) as caught:
        train("training.steps=5", *overrides, name=name)
    return str(caught.value)


def test_each_kind_of_damage_has_its_message(trained, train, tmp_path):
    step = trained / "checkpoint" / "step-3"
    (data,) = step.glob("*.distcp")
    content, metadata = data.read_bytes(), (step / ".metadata").read_bytes()

    data.write_bytes(content[: len(content) // 2])
    message = refused(train)
    assert f"checkpoint {step} is incomplete: {data.name} has {len(content) // 2} bytes, expected " in message
    assert message.endswith("Remove this step's folder to continue from the one before it")

    data.unlink()
    assert f"{data.name} is missing (" in refused(train)
    data.write_bytes(content)

    (step / ".metadata").write_bytes(metadata[: len(metadata) // 2])
    assert f".metadata ({len(metadata) // 2} bytes) is damaged or no DCP metadata" in refused(train)

    shutil.rmtree(step)
    rows = train("training.steps=5", name="run")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5]


def test_another_model_names_the_entries_that_differ(trained, train, tmp_path, monkeypatch):
    from functools import partial

    from aotrain.integrations.torchtitan import models

    monkeypatch.setattr(
        models, "compute_ffn_hidden_dim", partial(models.compute_ffn_hidden_dim, ffn_dim_multiplier=2.0)
    )
    message = refused(train)
    assert f"checkpoint {trained / 'checkpoint' / 'step-3'} was of another model: " in message
    assert (
        "layers.0.feed_forward.w1.weight is [384, 128] float32 in the checkpoint, [768, 128] float32 in this run"
        in message
    )
    assert "; and " in message
    assert message.endswith("Use the model of the checkpoint, or another output_dir")


def test_another_optimizer_is_told_apart_from_another_model(trained, train):
    # The saved job would already say so; a checkpoint may also come from elsewhere.
    (trained / "job.json").unlink()
    message = refused(train, "optimizer.name=adamw")
    assert "was written with another optimizer: " in message
    assert ".exp_avg" in message
    assert "checkpoint.init_from in a new output_dir" in message


def test_a_position_per_rank_is_of_an_older_version(train, monkeypatch, tmp_path):
    from aotrain.integrations.torchtitan.data import TextDataLoader

    older = {"dp_rank_0": "{}", "world_size": 1}
    with monkeypatch.context() as patch:
        patch.setattr(TextDataLoader, "state_dict", lambda self: older)
        train("training.steps=2")
    before = sorted((tmp_path / "run").rglob("*"))
    message = refused(train)
    assert "step-2 keeps its data position in an older form, one per rank, or not at all; got no dataloader." in message
    assert "Start a new output_dir from its weights with checkpoint.init_from" in message
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert train(f"checkpoint.init_from={tmp_path}/run/checkpoint/step-2", "training.steps=1", name="next")


def test_batch_sizes_that_are_no_sizes_are_refused(train, monkeypatch):
    from aotrain.integrations.torchtitan.data import TextDataLoader

    state_dict = TextDataLoader.state_dict
    with monkeypatch.context() as patch:
        patch.setattr(TextDataLoader, "state_dict", lambda self: {**state_dict(self), "num_streams": 0})
        train("training.steps=2")
    assert "is damaged: dataloader got {'num_streams': 0}, want positive numbers" in refused(train)


def test_metadata_that_would_run_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "proof"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match=r"it names posix.mkdir, which is no part of DCP metadata"):
        read_metadata(tmp_path)
    assert not (tmp_path / "proof").exists()


def test_entries_that_would_run_code_are_refused(trained, train, tmp_path):
    """A harmless table of contents does not make the entries harmless."""
    import io

    import torch

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "proof"),)

    step = trained / "checkpoint" / "step-3"
    metadata = read_metadata(step)
    (info,) = (info for index, info in metadata.storage_data.items() if index.fqn == "train_state.step")
    payload = io.BytesIO()
    torch.save(Attack(), payload)
    data = step / info.relative_path
    offset = data.stat().st_size
    with data.open("ab") as file:
        file.write(payload.getvalue())
    info.offset, info.length = offset, len(payload.getvalue())
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"cannot be loaded: rank 0: UnpicklingError.*Weights only load failed"):
        train("training.steps=5", name="run")
    assert not (tmp_path / "proof").exists()


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .metadata: No such file"):
        read_metadata(tmp_path)


def test_files_of_a_good_checkpoint_pass(trained):
    for step in ("step-2", "step-3"):
        check_files(trained / "checkpoint" / step, read_metadata(trained / "checkpoint" / step))
