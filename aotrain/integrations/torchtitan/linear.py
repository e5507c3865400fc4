"""``aotrain.nn.Float8Linear`` as a torchtitan module, also under tensor parallelism, and ``aotrain.nn.NVFP4Linear``.

With torchtitan's ``partial_dtensor`` backend a tensor-parallel layer gets DTensors: ``aotrain.nn.sharded_linear`` with
scales of what each rank holds. NVFP4 layers refuse to be split.
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

# Not a row of the table of recipes: its products are no casts followed by one product with their scales.
NVFP4 = "nvfp4"


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


class NVFP4Linear(aotrain.nn.NVFP4Linear, Linear):
    """torchtitan's ``Linear`` with the forward and backward products of ``aotrain.nn.NVFP4Linear``."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        emulate: bool = False
        """Round to NVFP4 values but multiply in high precision."""

    def __init__(self, config: Config) -> None:
        # As above.
        Linear.__init__(self, config)
        self._set_config(aotrain.nn.NVFP4TrainingConfig(emulate=config.emulate), None)

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """torchtitan's.

        Raises:
            NotImplementedError: tensor parallelism would split the layer.
        """
        if parallel_dims.tp_enabled:
            raise NotImplementedError(
                "recipe nvfp4 got tensor parallelism, which splits weights that it scales as a whole; want "
                "parallelism.tp 1 (shard by FSDP), or another recipe, such as float8_rowwise or mxfp8"
            )
        super().parallelize(parallel_dims)


def check_recipe(recipe: str) -> None:
    """Raise ValueError for what is not the recipe of a linear layer; lists those that are."""
    if recipe == NVFP4:
        return
    try:
        get_recipe(recipe)
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('.')}, {NVFP4}.") from None


def float8_linear_config(
    config: Linear.Config, *, recipe: str, emulate: bool = False, fsdp_float8_all_gather: bool = False
) -> Float8Linear.Config | NVFP4Linear.Config:
    """The low-precision version of a linear layer's config; initialization and sharding are carried over.

    Raises:
        ValueError: unknown recipe, nvfp4 with weights gathered as codes, or a layer that is not a plain ``Linear`` (it
            computes something of its own).
    """
    check_recipe(recipe)
    if type(config) is not Linear.Config:
        raise ValueError(
            f"cannot replace a {type(config).__qualname__}: it is not a plain Linear; leave this layer out"
        )
    if recipe == NVFP4:
        if fsdp_float8_all_gather:
            raise ValueError("fsdp_float8_all_gather does not go with recipe nvfp4, whose weights are gathered whole")
        return derive(config, NVFP4Linear.Config, emulate=emulate)
    return derive(
        config,
        Float8Linear.Config,
        recipe=recipe,
        emulate=emulate,
        fsdp_float8_all_gather=fsdp_float8_all_gather,
    )
