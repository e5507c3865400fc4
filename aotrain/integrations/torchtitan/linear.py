"""``aotrain.nn.Float8Linear`` as a torchtitan module, also under tensor parallelism.

With torchtitan's ``partial_dtensor`` backend a tensor-parallel layer gets DTensors: ``aotrain.nn.sharded_linear`` with
scales of what each rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan.config.override import derive
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.linear import Linear

import aotrain.nn
from aotrain.nn.fsdp_wrap import unwrap_weights, wrap_weights
from aotrain.nn.gathered_weight import planes_of
from aotrain.recipes import get_recipe


class Float8Linear(aotrain.nn.Float8Linear, Linear):
    """torchtitan's ``Linear`` with the forward and backward products of ``aotrain.nn.Float8Linear``.

    Being both, it is initialized, sharded, checkpointed and wrapped by LoRA like any ``Linear``; its parameters have
    the same names.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        recipe: str = "float8_rowwise"
        """A name in ``aotrain.recipes.RECIPES``."""

        emulate: bool = False
        """Round to float8 values but multiply in high precision."""

        fsdp_float8_all_gather: bool = False
        """Let FSDP2 gather codes, one byte per element."""

    def __init__(self, config: Config) -> None:
        # Not aotrain.nn.Float8Linear.__init__: its next in line is Linear.__init__, which takes a config.
        Linear.__init__(self, config)
        self._set_config(get_recipe(config.recipe), config.emulate)
        self.tensor_parallel_scales = "own"
        if config.fsdp_float8_all_gather:
            self.fsdp_planes = planes_of(self.recipe)
            wrap_weights(self)

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """torchtitan's, which splits ordinary parameters; FSDP2 comes after it."""
        unwrap_weights(self)
        super().parallelize(parallel_dims)
        wrap_weights(self)


def float8_linear_config(
    config: Linear.Config, *, recipe: str, emulate: bool = False, fsdp_float8_all_gather: bool = False
) -> Float8Linear.Config:
    """The float8 version of a linear layer's config; initialization and sharding are carried over.

    Raises:
        ValueError: unknown recipe, or a layer that is not a plain ``Linear`` (it computes something of its own).
    """
    get_recipe(recipe)
    if type(config) is not Linear.Config:
        raise ValueError(
            f"cannot replace a {type(config).__qualname__}: it is not a plain Linear; leave this layer out"
        )
    return derive(
        config,
        Float8Linear.Config,
        recipe=recipe,
        emulate=emulate,
        fsdp_float8_all_gather=fsdp_float8_all_gather,
    )
