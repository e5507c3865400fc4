"""`aotrain pretrain JOB.yaml`: check the job, then train it with torchrun on the torchtitan trainer."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from aotrain.cli.launch import NOT_INSTALLED, run, torchrun_command

WORKER = "aotrain.integrations.torchtitan.train"


def pretrain(
    job: tyro.conf.Positional[Path],
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = (),
    nproc: int = 1,
    check: bool = False,
) -> int:
    """Pretrain a model on the torchtitan trainer.

    Args:
        job: YAML job file, for example configs/pretrain/llama3_debug_float8_rowwise_cpu.yaml.
        set: change a key of the job, for example --set training.steps=50. May be repeated.
        nproc: processes on this machine, one per GPU. For several machines use the printed torchrun command.
        check: only check the job file.
    """
    try:
        from aotrain.integrations.config_file import JobError
        from aotrain.integrations.torchtitan.job import load_job
    except ImportError as error:
        print(f"error: {error}; {NOT_INSTALLED}", file=sys.stderr)
        return 2
    if nproc < 1:
        print(f"error: --nproc got {nproc}, want at least 1", file=sys.stderr)
        return 2
    try:
        load_job(job, set)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if check:
        print(f"{job}: ok")
        return 0
    overrides = [part for override in set for part in ("--set", override)]
    return run(torchrun_command(WORKER, ["--job", str(job), *overrides], nproc))
