"""Whole runs: they learn, repeat, resume, and mistakes in the job stop them before anything is written."""

import json
import os
import subprocess
import sys

import pytest

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.train import main

from .conftest import CONFIGS, TINY, numbers


def losses(rows, kind):
    return [row["loss"] for row in rows if row["kind"] == kind]


def test_a_run_leaves_curves_summary_and_log(train, tmp_path):
    rows = train()
    run_dir = tmp_path / "run"
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("train", 1),
        ("validation", 1),
        ("train", 2),
        ("validation", 2),
        ("train", 3),
        ("validation", 3),
    ]
    assert losses(rows, "validation")[-1] < losses(rows, "validation")[0] < 6.5
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["train_loss"]["last"] == losses(rows, "train")[-1]
    assert summary["validation_loss"]["first"] == losses(rows, "validation")[0]
    assert summary["optimizer"] == "adamw_8bit"
    assert summary["recipe"] is None
    assert "Trainer is initialized" in (run_dir / "logs" / "rank0.log").read_text()
    assert (run_dir / "checkpoint" / "step-3" / ".metadata").is_file()


def test_the_same_job_repeats_bit_for_bit(train):
    first = train(name="first", config="llama3_debug_float8_rowwise_cpu")
    second = train(name="second", config="llama3_debug_float8_rowwise_cpu")
    assert numbers(first) == numbers(second)


@pytest.mark.parametrize("recipe", ["mxfp8", "mxfp8_gw_hp", "mxfp4"])
def test_a_job_trains_in_mx_and_repeats_bit_for_bit(train, recipe):
    """mxfp4's stochastic rounding included, whose noise is a function of the gradients."""
    settings = (f"precision.recipe={recipe}", "training.steps=2")
    first, second = (train(*settings, name=name) for name in ("first", "second"))
    assert numbers(first) == numbers(second)
    assert losses(first, "train")[-1] < 6.5


def test_a_job_trains_in_nvfp4_and_resumes_bit_for_bit(train):
    """Noise belongs to the gradients, so that nothing of it has to be saved. The last block stays in high precision."""
    settings = ("precision.recipe=nvfp4", 'precision.skip=["lm_head", "layers.3.*"]')
    plain, first = train(name="plain"), train(*settings, name="first")
    assert numbers(first) != numbers(plain)
    assert losses(first, "train")[-1] < 6.5
    train(*settings, "training.steps=2", name="again")
    assert numbers(train(*settings, name="again"))[-2:] == numbers(first)[-2:]


def test_another_seed_gives_other_weights(train):
    first = train("training.steps=1", name="first")
    second = train("training.steps=1", "training.seed=1", name="second")
    assert losses(first, "train") != losses(second, "train")


@pytest.mark.parametrize("config", ["llama3_debug_bf16_cpu", "llama3_debug_float8_rowwise_cpu"])
def test_resume_is_bit_for_bit(train, config):
    whole = train("training.steps=5", name="whole", config=config)
    train("training.steps=2", name="parts", config=config)
    parts = train("training.steps=5", name="parts", config=config)
    # The first part ended at step 2, so it measured there; so did the whole run (every 2 steps).
    assert numbers(parts) == numbers(whole)


def test_resume_of_many_streams_read_in_the_background(train):
    options = ("data.shard_by=document", "data.workers=1", "data.global_batch_size=4", "data.batch_size=1")
    whole = train("training.steps=4", *options, name="whole")
    train("training.steps=2", *options, name="parts")
    assert numbers(train("training.steps=4", *options, name="parts")) == numbers(whole)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_4bit", "adamw_fp8"])
def test_resume_with_every_optimizer(train, optimizer):
    name = f"optimizer.name={optimizer}"
    whole = train("training.steps=4", name, name="whole")
    train("training.steps=2", name, name="parts")
    assert numbers(train("training.steps=4", name, name="parts")) == numbers(whole)


def test_starting_from_weights_takes_nothing_else(train, tmp_path):
    train("training.steps=2", "optimizer.lr=0.01", name="first")
    rows = train(f"checkpoint.init_from={tmp_path / 'first/checkpoint/step-2'}", name="second")
    assert rows[0]["step"] == 1
    assert rows[0]["loss"] < 6.0  # untrained weights give 6.16


def test_float32_parameters_differ_from_bfloat16_by_rounding_only(train):
    config = "llama3_debug_float8_rowwise_cpu"
    (bfloat16,) = losses(train("training.steps=1", name="bf16", config=config), "train")
    (float32,) = losses(train("training.steps=1", "precision.param_dtype=float32", name="fp32", config=config), "train")
    assert float32 != bfloat16
    assert float32 == pytest.approx(bfloat16, rel=2e-3)


@pytest.mark.parametrize("choice", ["selective", "full"])
def test_activation_checkpointing_changes_no_bit(train, choice):
    config = "llama3_debug_float8_rowwise_cpu"
    plain = train("training.steps=2", name="plain", config=config)
    recomputed = train("training.steps=2", f"training.activation_checkpoint={choice}", name=choice, config=config)
    assert numbers(recomputed) == numbers(plain)


def test_gradient_accumulation_sees_the_same_text(train):
    options = ("training.steps=2", "precision.param_dtype=float32", "data.global_batch_size=4")
    whole = train(*options, name="whole")
    parts = train(*options, "data.batch_size=1", name="parts")
    assert losses(parts, "train") == pytest.approx(losses(whole, "train"), rel=1e-5)


def test_an_output_dir_of_another_run_is_refused(train):
    train("training.steps=2")
    with pytest.raises(JobError, match=r"holds another run \(up to step 2\): training.seed: 0 -> 3"):
        train("training.seed=3")


def test_resume_never_refuses_an_existing_run(train):
    train("training.steps=2")
    with pytest.raises(JobError, match=r"already holds a run up to step 2 and checkpoint.resume is never"):
        train("checkpoint.resume=never")


def test_wandb_offline_needs_no_account(train, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    train("metrics.wandb={mode: offline, project: aotrain-test}", "metrics.tensorboard=true", "training.steps=1")
    run_dir = tmp_path / "run"
    assert list(run_dir.glob("tb/*/wandb/offline-run-*/run-*.wandb"))
    assert list(run_dir.glob("tb/*/events.out.tfevents.*"))


def test_wandb_online_without_account_is_an_error(train, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with pytest.raises(JobError, match=r"metrics.wandb: no account is known here"):
        train("metrics.wandb={mode: online}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.stepz=3"], "training.stepz: unknown key; did you mean 'training.steps'?"),
        (["data.dataset=text", "data.path=/no/such/file.txt"], "data.path: no such file: '/no/such/file.txt'"),
        (["data.dataset=text", "data.path={folder}"], "data: no files in"),
        (["tokenizer=./no/such/folder", "model.size=1b"], "tokenizer: no such folder"),
        (["data.global_batch_size=3", "data.batch_size=2"], "data.batch_size: got 2, want a divisor of 3"),
        (["parallelism.tp=2"], "does not make 1 ranks"),
        (["training.device=cuda"], "training.device: cuda is asked for, but torch sees no GPU"),
        (["precision.recipe=float8_rowwise", "precision.skip=[w9]"], "precision.skip: 'w9' matches no linear layer"),
    ],
    ids=["unknown-key", "missing-path", "empty-folder", "no-tokenizer", "batch", "ranks", "no-gpu", "skip"],
)
def test_a_mistake_exits_2_without_traceback_or_traces(overrides, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    overrides = [text.replace("{folder}", str(tmp_path / "empty")) for text in overrides]
    settings = [*TINY, f"output_dir={tmp_path / 'run'}", *overrides]
    arguments = [part for text in settings for part in ("--set", text)]
    assert main(["--job", str(CONFIGS / "llama3_debug_bf16_cpu.yaml"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_mistake_is_shown_before_torch_is_imported(tmp_path):
    code = (
        "import sys; from aotrain.integrations.torchtitan.train import main; "
        f"code = main(['--job', {str(tmp_path / 'absent.yaml')!r}]); "
        "assert code == 2; print('torchtitan' in sys.modules, 'datasets' in sys.modules)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "False False\n"
    assert "cannot read the job file" in done.stderr
