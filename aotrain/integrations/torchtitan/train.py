"""Entry point of a pretraining run.

    torchrun --nproc-per-node N -m aotrain.integrations.torchtitan.train --job FILE [--set key=value ...]

One process needs no torchrun. The job is read first: a mistake in it is shown without a traceback, with exit code 2,
before torch is imported and before anything is written. Then the shims for this torch version are installed, and
torchtitan's own Trainer runs. At the end rank 0 writes ``loss.png`` and ``summary.json`` into the run folder.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import netrc
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.job import PretrainJob, load_job

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

log = logging.getLogger("aotrain.pretrain")

# Exit code for a mistake in the job, as argparse uses it for the command line.
USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m aotrain.integrations.torchtitan.train", description=__doc__)
    parser.add_argument("--job", required=True, metavar="FILE", help="YAML job file, see configs/pretrain")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the job")
    options = parser.parse_args(arguments)
    try:
        run(load_job(options.job, options.set))
    except JobError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    return 0


def run(job: PretrainJob) -> Path:
    """Train a checked job in this process, as one rank of however many torchrun started.

    Args:
        job: from ``load_job``; ``output_dir`` is set.

    Returns:
        The run folder.

    Raises:
        JobError: the run cannot start as the job asks.
    """
    from aotrain.integrations.torchtitan import compat

    compat.install()

    from aotrain.integrations.torchtitan.build import build_config
    from aotrain.integrations.torchtitan.checkpoint import read_saved_data
    from aotrain.integrations.torchtitan.console import log_to, start_logging, stop_logging
    from aotrain.integrations.torchtitan.device import choose_device
    from aotrain.integrations.torchtitan.run_dir import CHECKPOINTS, plan_resume, save_job
    from aotrain.integrations.torchtitan.tokenizer import resolve_tokenizer

    assert job.output_dir is not None
    run_dir = Path(job.output_dir)
    single_process_environment()
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device_type = choose_device(job)
    _check_wandb(job)
    resume_step, changes = plan_resume(job)
    saved = None if resume_step is None else read_saved_data(run_dir / CHECKPOINTS / f"step-{resume_step}")
    start_logging(rank)
    try:
        config = build_config(
            job,
            device_type=device_type,
            num_ranks=num_ranks,
            tokenizer_dir=resolve_tokenizer(job.tokenizer),
            saved=saved,
        )
        log_to(run_dir, rank)
        if rank == 0:
            save_job(job)
            _announce(job, device_type, num_ranks, resume_step, changes)
            _announce_batch(config, num_ranks // job.parallelism.tp)
        _wandb_environment(job)
        _train(config)
        if rank == 0:
            _finish(job, run_dir)
    finally:
        stop_logging()
    return run_dir


def _train(config: Trainer.Config) -> None:
    """Build the trainer, train, and take everything down again, as torchtitan's own entry point does."""
    import torch.distributed as dist
    from torchtitan.observability import structured_logger

    structured_logger.init_structured_logger(source="training", output_dir=config.dump_folder, enable=False)
    trainer = None
    try:
        trainer = config.build()
        trainer.train()
    finally:
        if trainer is not None:
            trainer.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        # torchtitan switches automatic collection off for the whole process.
        gc.enable()


def _finish(job: PretrainJob, run_dir: Path) -> None:
    from aotrain.integrations.torchtitan.curves import draw_losses
    from aotrain.integrations.torchtitan.summary import write_summary

    summary = write_summary(job, run_dir)
    picture = draw_losses({run_dir.name: run_dir}, run_dir / "loss.png", title=run_dir.name)
    train, validation = summary["train_loss"], summary["validation_loss"]
    parts = [f"train loss {train['first']:.4f} -> {train['last']:.4f}"]
    if validation is not None:
        parts.append(f"validation loss {validation['first']:.4f} -> {validation['last']:.4f}")
    log.info("%s after %d steps; curves in %s", ", ".join(parts), summary["steps"], picture)


def _announce(job: PretrainJob, device: str, num_ranks: int, resume_step: int | None, changes: list[str]) -> None:
    where = f"{num_ranks} {device} rank" + ("s" if num_ranks > 1 else "")
    recipe = job.precision.recipe or job.precision.param_dtype
    if job.precision.experts is not None:
        recipe = f"{recipe}, experts {job.precision.experts}"
    log.info(
        "%s %s, %s, %s, %s; output in %s",
        job.model.family,
        job.model.size,
        recipe,
        job.optimizer.name,
        where,
        job.output_dir,
    )
    if resume_step is not None:
        log.info("continuing after step %d of %s", resume_step, job.output_dir)
    for change in changes:
        log.warning("changed since this run was last started: %s", change)


def _announce_batch(config: Trainer.Config, ranks: int) -> None:
    local, total = config.training.local_batch_size, config.training.global_batch_size
    passes = total // (local * ranks)
    log.info("%d sequences per step: data-parallel ranks %d x passes %d x batch %d", total, ranks, passes, local)


def single_process_environment() -> None:
    """What torchrun would set for one process, where it did not start us."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    )


def _check_wandb(job: PretrainJob) -> None:
    settings = job.metrics.wandb
    if settings is None:
        return
    if importlib.util.find_spec("wandb") is None:
        raise JobError("metrics.wandb: wandb is not installed; pip install wandb, or remove the section")
    if settings.mode == "online" and not _wandb_account_is_known():
        raise JobError("metrics.wandb: no account is known here; run `wandb login`, or set metrics.wandb.mode=offline")


def _wandb_account_is_known() -> bool:
    """Whether `wandb login` or the environment has left a key; asking wandb itself would go to the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_environment(job: PretrainJob) -> None:
    """torchtitan hands settings to wandb through its environment variables."""
    settings = job.metrics.wandb
    if settings is None:
        return
    assert job.output_dir is not None
    os.environ["WANDB_PROJECT"] = settings.project
    os.environ["WANDB_MODE"] = settings.mode
    os.environ["WANDB_RUN_NAME"] = settings.name or Path(job.output_dir).name


if __name__ == "__main__":
    sys.exit(main())
