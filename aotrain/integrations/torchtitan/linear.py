"""``aotrain.nn.Float8Linear`` as a torchtitan module, also under tensor parallelism.

With torchtitan's ``partial_dtensor`` backend a tensor-parallel layer gets DTensors. Each rank multiplies what it has,

    columns (weight split along N):  output[M, N/p] = input[M, K]   @ weight[N/p, K].T     input grad: sum over ranks
    rows    (weight split along K):  output[M, N]   = input[M, K/p] @ weight[N, K/p].T     output: sum over ranks

and scales are taken over what a rank holds: rowwise scales of a column-split layer are those of the whole layer,
scales that reach across a split (tensorwise, or rowwise along a split K) are each rank's own, hence a little finer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torchtitan.config.override import derive
from torchtitan.models.common.linear import Linear

import aotrain.nn
from aotrain.ops import scaled_linear
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

    def __init__(self, config: Config) -> None:
        # Not aotrain.nn.Float8Linear.__init__: its next in line is Linear.__init__, which takes a config.
        Linear.__init__(self, config)
        self._set_config(get_recipe(config.recipe), config.emulate)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]; DTensors in, DTensor out."""
        if not isinstance(self.weight, DTensor):
            return super().forward(input)
        if not isinstance(input, DTensor):
            raise ValueError(
                f"Float8Linear: the weight is a DTensor ({self.weight.placements}) but the input is a plain tensor; "
                "apply the layer's sharding config (model.parallelize) or keep both plain"
            )
        return self._forward_sharded(input, self.weight)

    def _forward_sharded(self, input: DTensor, weight: DTensor) -> DTensor:
        mesh = weight.device_mesh
        layouts = [
            _layout(x, w, input.ndim, has_bias=self.bias is not None)
            for x, w in zip(input.placements, weight.placements, strict=True)
        ]
        x_local = input.redistribute(placements=[each.input for each in layouts]).to_local(
            grad_placements=[each.input_grad for each in layouts]
        )
        w_local = weight.to_local(grad_placements=[each.weight_grad for each in layouts])
        bias = self.bias
        if isinstance(bias, DTensor):
            bias = bias.to_local(grad_placements=[each.bias_grad for each in layouts])
        out = scaled_linear(x_local, w_local, bias, self.recipe, emulate=self.emulate)
        return DTensor.from_local(out, mesh, [each.output for each in layouts], run_check=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Placements along one mesh dimension: of the operand as used, of its gradient as computed, of the output."""

    input: Placement
    input_grad: Placement
    weight_grad: Placement
    bias_grad: Placement
    output: Placement


def _layout(input: Placement, weight: Placement, ndim: int, *, has_bias: bool) -> _Layout:
    if weight.is_shard(0):
        return _Layout(
            input=Replicate(),
            input_grad=Partial(),
            weight_grad=weight,
            bias_grad=Shard(0),
            output=Shard(ndim - 1),
        )
    if weight.is_shard(1):
        if has_bias:
            raise NotImplementedError("a bias would be added once per rank; keep row-parallel layers without bias")
        features = Shard(ndim - 1)
        return _Layout(input=features, input_grad=features, weight_grad=weight, bias_grad=Replicate(), output=Partial())
    # A whole weight: the ranks have different rows of the input, or all have the same.
    split_rows = input.is_shard() and not input.is_shard(ndim - 1)
    rows = input if split_rows else Replicate()
    total = Partial() if split_rows else Replicate()
    return _Layout(input=rows, input_grad=rows, weight_grad=total, bias_grad=total, output=rows)


def float8_linear_config(config: Linear.Config, *, recipe: str, emulate: bool = False) -> Float8Linear.Config:
    """The float8 version of a linear layer's config; initialization and sharding are carried over.

    Raises:
        ValueError: unknown recipe, or a layer that is not a plain ``Linear`` (it computes something of its own).
    """
    get_recipe(recipe)
    if type(config) is not Linear.Config:
        raise ValueError(
            f"cannot replace a {type(config).__qualname__}: it is not a plain Linear; leave this layer out"
        )
    return derive(config, Float8Linear.Config, recipe=recipe, emulate=emulate)
