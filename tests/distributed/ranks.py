"""Run a function on several gloo processes and bring back what each returned."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`[function(rank, world_size, *args) for each rank]`, each in its own process with a gloo group.

    The function must be importable (module level); what it returns must be loadable with weights_only.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_entry, (world_size, folder, function, args), nprocs=world_size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _entry(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    result = function(rank, world_size, *args)
    partial = Path(folder) / f"{rank}.partial"
    torch.save(result, partial)
    partial.rename(Path(folder) / f"{rank}.pt")
    # Leave only when every rank has its result, and without tearing gloo down: a rank that did so while another was
    # still busy was seen to abort ("terminate called without an active exception") after its work was done.
    while not all((Path(folder) / f"{other}.pt").exists() for other in range(world_size)):
        time.sleep(0.01)
    os._exit(0)
