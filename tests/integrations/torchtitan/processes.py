"""Tiny runs in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from aotrain.integrations.torchtitan.metrics_file import Row, read_rows

from .conftest import CONFIGS, TINY


def command(config: str, out: Path, *overrides: str, ranks: int = 1) -> list[str]:
    """The command line of a run, under torchrun for several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, *worker(config, out, *overrides)]


def worker(config: str, out: Path, *overrides: str) -> list[str]:
    module = ["-m", "aotrain.integrations.torchtitan.train", "--job", str(CONFIGS / f"{config}.yaml")]
    settings = [part for text in (*TINY, *overrides, f"output_dir={out}") for part in ("--set", text)]
    return [*module, *settings]


def start(*arguments, **options) -> subprocess.Popen[str]:
    return _popen(command(*arguments, **options), {})


def start_each(config: str, out: Path, *overrides: str, ranks: int) -> list[subprocess.Popen[str]]:
    """One process per rank, without torchrun over them: quicker, and each can be killed."""
    return start_ranks(worker(config, out, *overrides), ranks=ranks)


def start_ranks(arguments: list[str], *, ranks: int) -> list[subprocess.Popen[str]]:
    """``python ARGUMENTS`` as each rank of one group."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    arguments = [sys.executable, *arguments]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [_popen(arguments, {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]


def _popen(arguments: list[str], extra: dict[str, str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **extra}
    return subprocess.Popen(arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(*processes: subprocess.Popen[str]) -> str:
    """Wait for all to succeed; the output of the first."""
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return outputs[0]


def train_rows(run_dir: Path) -> list[Row]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "train"]


def train_losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in train_rows(run_dir)]
