"""Small real runs on the CPU, in this process."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aotrain.integrations.torchtitan import compat
from aotrain.integrations.torchtitan.job import PretrainJob, load_job
from aotrain.integrations.torchtitan.metrics_file import read_rows

compat.install()

CONFIGS = Path(__file__).parents[3] / "configs" / "pretrain"

# A few seconds per run: 2 sequences of 64 tokens per step.
TINY = [
    "training.steps=3",
    "data.seq_len=64",
    "data.global_batch_size=2",
    "validation.every=2",
    "validation.steps=1",
    "schedule.warmup_steps=2",
    "schedule.total_steps=6",
    "metrics.every=1",
    "metrics.tensorboard=false",
    "checkpoint.every=2",
]


@pytest.fixture(autouse=True)
def _quick_and_tidy(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, _poisoned_empty: None
) -> Iterator[None]:
    """No 2 s sleep at the end of a run, one cache folder, and no trace of a run in the process afterwards."""
    import torchtitan.trainer

    monkeypatch.setattr(torchtitan.trainer.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    before = dict(os.environ)
    level = logging.getLogger().level
    yield
    os.environ.clear()
    os.environ.update(before)
    logging.getLogger().setLevel(level)
    logging.getLogger("aotrain").setLevel(logging.NOTSET)
    torch.autograd.set_multithreading_enabled(True)
    gc.enable()


@pytest.fixture
def tiny_job(tmp_path: Path) -> Callable[..., PretrainJob]:
    """A tiny job: ``tiny_job("training.steps=2", name="run")`` writes into tmp_path/run."""

    def make(*overrides: str, name: str = "run", config: str = "llama3_debug_bf16_cpu") -> PretrainJob:
        settings = [*TINY, f"output_dir={tmp_path / name}", *overrides]
        return load_job(CONFIGS / f"{config}.yaml", settings)

    return make


@pytest.fixture
def train(tiny_job: Callable[..., PretrainJob]) -> Callable[..., list[dict[str, Any]]]:
    """Train a tiny job in this process and return the rows of its metrics.jsonl."""
    from aotrain.integrations.torchtitan.train import run

    def run_job(*overrides: str, **options: str) -> list[dict[str, Any]]:
        return read_rows(run(tiny_job(*overrides, **options)) / "metrics.jsonl")

    return run_job


def numbers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must repeat bit for bit: everything but speed and memory."""
    return [(row["kind"], row["step"], row["loss"], row.get("grad_norm"), row.get("lr")) for row in rows]
