"""Weights that do not depend on how many ranks share them.

On a GPU, DTensor draws random numbers so that every sharding gives the same weights. On the CPU it does not: each rank
fills its own shard from the same seed. Here every parameter is drawn as a whole tensor from a seed made of the job's
seed and the parameter's name, and each rank keeps its part. No communication; costs one full parameter of memory at a
time, and the time to draw it on every rank, which is why it is used for the CPU only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.protocols.module import Module


@dataclass(frozen=True, slots=True)
class NamedInit:
    """A ``param_init`` function that draws the whole parameter under a seed of its own."""

    base: Callable[[torch.Tensor], object]
    name: str
    seed: int

    def __call__(self, param: nn.Parameter) -> None:
        full = torch.empty(param.shape, dtype=param.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed_of(self.name, self.seed))
            self.base(full)
        with torch.no_grad():
            if isinstance(param, DTensor):
                # src_data_rank=None: every rank drew the same tensor, so nothing is sent.
                full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
            param.copy_(full)


def _seed_of(name: str, seed: int) -> int:
    """32 bits from both: torch's CPU generator ignores the upper half of a larger seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "little")


def name_parameter_inits(model_config: Module.Config, seed: int) -> int:
    """Replace, in place, every ``param_init`` of a model config tree by its ``NamedInit``. Returns how many."""
    count = 0
    for fqn, config, _, _ in model_config.traverse(Module.Config, recurse=True):
        assert isinstance(config, Module.Config)
        if config.param_init is None:
            continue
        # A new dict: layers share theirs.
        named: dict[str, Callable[..., object]] = {}
        for name, base in config.param_init.items():
            keep = base is skip_param_init or isinstance(base, NamedInit)
            named[name] = base if keep else NamedInit(base=base, name=f"{fqn}.{name}", seed=seed)
            count += not keep
        config.param_init = named
    return count
