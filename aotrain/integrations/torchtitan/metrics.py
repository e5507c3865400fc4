"""What a run shows and records: console line, progress bar, metrics.jsonl, tensorboard, wandb.

torchtitan's ``MetricsProcessor`` computes the numbers; it hands them to loggers. Ours is one more logger, so nothing
of the arithmetic is repeated here.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torchtitan.components.metrics import BaseLogger, LoggerContainer, MetricsProcessor
from torchtitan.distributed import ParallelDims

from aotrain.integrations.torchtitan.metrics_file import FILE_NAME, MetricsFile, Row

log = logging.getLogger("aotrain.pretrain")

# GPUs whose bf16 peak torchtitan knows; for any other it takes an A100's, and the quotient would mean nothing.
_KNOWN_PEAKS = (
    "A100",
    "A6000",
    "H100",
    "H200",
    "H20",
    "GB200",
    "GB300",
    "B200",
    "B300",
    "MI250X",
    "MI3",
    "l40s",
    "TPU",
)


class RunMetrics(MetricsProcessor):
    """torchtitan's metrics, and a ``RunLogger`` beside its tensorboard and wandb loggers."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        total_steps: int | None = None
        """Length of the run for the progress bar; None shows no bar."""

        low_precision: bool = False
        """Products run below bf16: utilization of the bf16 peak would mean nothing, so it is not reported."""

    def __init__(self, config: Config, *, parallel_dims: ParallelDims, **kwargs: Any) -> None:
        MetricsProcessor.__init__(self, config, parallel_dims=parallel_dims, **kwargs)
        # torchtitan's own flag for "do not report MFU".
        self.has_quantization = self.has_quantization or config.low_precision or not self._peak_is_known()

    def _peak_is_known(self) -> bool:
        name = self.device_memory_monitor.device_name
        return any(known in name for known in _KNOWN_PEAKS)

    def _build_metric_logger(self, **kwargs: Any) -> BaseLogger:
        stock = MetricsProcessor._build_metric_logger(self, **kwargs)
        parallel_dims: ParallelDims = kwargs["parallel_dims"]
        if torch.distributed.get_rank() != _reporting_rank(parallel_dims):
            return stock
        total_steps = kwargs["config"].total_steps
        loggers = LoggerContainer()
        loggers.add_logger(stock)
        run_dir = Path(kwargs["dump_folder"])
        loggers.add_logger(RunLogger(run_dir, total_steps=total_steps, world_size=parallel_dims.world_size))
        return loggers


class RunLogger(BaseLogger):
    """Console line, progress bar and metrics.jsonl of the reporting rank.

    Args:
        run_dir: where metrics.jsonl goes.
        total_steps: length of the progress bar; None for no bar. The bar also needs a terminal on stderr.
        world_size: ranks, to turn tokens per second and rank into tokens per second.
    """

    def __init__(self, run_dir: Path, *, total_steps: int | None, world_size: int) -> None:
        self._file = MetricsFile(run_dir / FILE_NAME)
        self._world_size = world_size
        self._total = total_steps
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Record torchtitan's metrics of a training step or of a validation."""
        row = self._validation_row(metrics, step) if "validation_metrics/loss" in metrics else self._row(metrics, step)
        self._file.append(row)
        self._advance(step)
        log.info(_console_line(row, self._total))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _validation_row(self, metrics: dict[str, Any], step: int) -> Row:
        return {"kind": "validation", "step": step, "loss": metrics["validation_metrics/loss"]}

    def _row(self, metrics: dict[str, Any], step: int) -> Row:
        row: Row = {
            "kind": "train",
            "step": step,
            "loss": metrics["loss_metrics/global_avg_loss"],
            "grad_norm": metrics["grad_norm"],
            "lr": next((value for key, value in metrics.items() if key.startswith("lr/")), None),
            "tokens_per_second": metrics["throughput(tps)"] * self._world_size,
            "tokens_seen": metrics.get("n_tokens_seen"),
            "seconds_per_step": metrics["time_metrics/end_to_end(s)"],
            "memory_gib": metrics["memory/max_reserved(GiB)"],
            "tflops": metrics["tflops"],
        }
        if "mfu(%)" in metrics:
            row["mfu"] = metrics["mfu(%)"]
        return row

    def _advance(self, step: int) -> None:
        if self._total is None or not sys.stderr.isatty():
            return
        if self._progress is None:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task("training", total=self._total)
            self._progress.start()
        self._progress.update(self._task, completed=step)


def _reporting_rank(parallel_dims: ParallelDims) -> int:
    """The first rank of the last pipeline stage: the one that knows the loss."""
    return (parallel_dims.world_size // parallel_dims.pp) * (parallel_dims.pp - 1)


def _console_line(row: Row, total: int | None) -> str:
    step = f"step {row['step']:>4}" + (f"/{total}" if total is not None else "")
    if row["kind"] == "validation":
        return f"{step}  validation loss {row['loss']:.4f}"
    parts = [
        step,
        f"loss {row['loss']:.4f}",
        f"grad norm {row['grad_norm']:.3f}",
        f"lr {row['lr']:.2e}" if row["lr"] is not None else "",
        f"{row['tokens_per_second']:,.0f} tokens/s",
        f"{row['memory_gib']:.2f} GiB",
        f"mfu {row['mfu']:.1f} %" if "mfu" in row else "",
    ]
    return "  ".join(part for part in parts if part)
