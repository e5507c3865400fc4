"""Run a function on several gloo processes and bring back what each returned."""

import tempfile
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
    try:
        torch.save(function(rank, world_size, *args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
