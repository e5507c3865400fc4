"""Float8Linear on DTensors: each rank multiplies what it has.

    columns (weight split along N):  output[M, N/p] = input[M, K]   @ weight[N/p, K].T     input grad: sum over ranks
    rows    (weight split along K):  output[M, N]   = input[M, K/p] @ weight[N, K/p].T     output: sum over ranks

Scales are, as the caller chooses,

- "whole": those of the operand as one matrix, so that the codes are those of a layer on one rank, and only the order of
  summation differs. A scale that reaches across a split (per tensor, or per row along a split dimension) takes a small
  all-reduce of largest magnitudes. Blocks of 128 are those of the whole where the parts' sizes are multiples of 128.
- "own": those of what a rank holds, a little finer where the others reach across a split, without communication.

This module loads torch.distributed.tensor, and is imported where there are DTensors.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from aotrain.formats import ScaledTensor, Scaling, dequantize
from aotrain.formats.scaling import block_amax
from aotrain.kernels import scaled_cast, scaled_cast_after
from aotrain.nn.gathered_weight import GatheredWeight, traced_cast_weight
from aotrain.nn.shard_amax import Splits, all_reduce_over_splits
from aotrain.ops import cast_weight, scaled_linear, transpose_quantized

if TYPE_CHECKING:
    from aotrain.nn.float8_linear import Float8Linear

Scales = Literal["whole", "own"]
# Attribute of a DTensor that was gathered as codes: a ScaledTensor of its rows.
_CODES = "_aotrain_codes"


def sharded_linear(layer: "Float8Linear", input: torch.Tensor, *, scales: Scales) -> DTensor:
    """The output of a layer whose weight is a DTensor, for a DTensor input.

    Raises:
        ValueError: the input is a plain tensor.
    """
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, DTensor)
    if not isinstance(input, DTensor):
        raise ValueError(
            f"Float8Linear: the weight is a DTensor ({weight.placements}) but the input is a plain tensor; use "
            "Float8ColwiseParallel or Float8RowwiseParallel, apply the layer's sharding config (model.parallelize), or "
            "keep both plain"
        )
    if layer.fsdp_planes is not None and type(weight._local_tensor) is torch.Tensor:
        _warn_ordinary_weight()
    layouts = [layout_of(x, w, input.ndim) for x, w in zip(input.placements, weight.placements, strict=True)]
    codes: ScaledTensor | None = getattr(input, _CODES, None)
    x = input.redistribute(placements=[each.input for each in layouts])
    x_local = x.to_local(grad_placements=[each.input_grad for each in layouts])
    w_local = weight.to_local(grad_placements=[each.weight_grad for each in layouts])
    casts = _Casts(
        codes if x.placements == input.placements else None,
        _splits(weight, [each.input for each in layouts], input.ndim) if scales == "whole" else (),
        _splits(weight, [each.output for each in layouts], input.ndim) if scales == "whole" else (),
        _splits(weight, weight.placements, weight.ndim) if scales == "whole" else (),
    )
    out = scaled_linear(
        x_local,
        w_local,
        None,
        layer.recipe,
        emulate=layer.emulate,
        save_for_backward="quantized" if casts.codes is not None else layer.save_for_backward,
        weight_casts=casts.weight,
        operand_casts=casts.operand,
    )
    if isinstance(bias, DTensor):
        out = add_bias(out, bias, layouts)
    elif bias is not None:
        out = out + bias.to(out.dtype)
    return DTensor.from_local(out, weight.device_mesh, [each.output for each in layouts], run_check=False)


def gather_as_codes(input: DTensor, scaling: Scaling) -> DTensor:
    """A DTensor replicated by gathering its codes, one byte per element, with one scale over all ranks.

    Float8Linear layers take the codes that come with the result; anything else sees dequantized values. The gradient is
    that of `redistribute`.
    """
    gathered, data, scale = _GatherCodes.apply(input, scaling)
    setattr(gathered, _CODES, ScaledTensor(data, scale, scaling))
    return gathered


def carry_codes(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Hand the codes of a gathered tensor on to another view of the same values."""
    codes = getattr(source, _CODES, None)
    if codes is not None and target is not source:
        setattr(target, _CODES, codes)
    return target


@functools.lru_cache(maxsize=1)
def _warn_ordinary_weight() -> None:
    warnings.warn(
        "enable_fsdp_float8_all_gather has no effect on Float8Linear layers that were split by torch's own "
        "tensor-parallel styles: FSDP2 gathers their weights in high precision, with the same result. Use "
        "Float8ColwiseParallel and Float8RowwiseParallel of aotrain.nn.tensor_parallel.",
        stacklevel=2,
    )


class _GatherCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: DTensor, scaling: Scaling) -> tuple[DTensor, torch.Tensor, torch.Tensor]:
        ctx.placements = input.placements
        mesh, local = input.device_mesh, input.to_local()
        rows = local.reshape(-1, local.shape[-1])
        splits = tuple((0, mesh.get_group(dim)) for dim, each in enumerate(input.placements) if each.is_shard())
        (amax,) = all_reduce_over_splits([block_amax(rows, scaling.block)], [scaling.block], splits)
        q = scaled_cast(rows, scaling, amax=amax)
        codes = DTensor.from_local(
            q.data.view(torch.uint8).view(local.shape),  # gloo gathers no float8
            mesh,
            input.placements,
            run_check=False,
            shape=input.shape,
            stride=input.stride(),
        )
        replicated = [Replicate()] * mesh.ndim
        data = codes.redistribute(placements=replicated).to_local().view(scaling.element.dtype)
        data = data.view(-1, data.shape[-1])
        values = dequantize(ScaledTensor(data, q.scale, scaling), input.dtype).view(input.shape)
        ctx.mark_non_differentiable(data, q.scale)
        return DTensor.from_local(values, mesh, replicated, run_check=False), data, q.scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[DTensor, None]:
        return grad_outputs[0].redistribute(placements=ctx.placements), None


@dataclass(frozen=True, slots=True)
class _Casts:
    """Casts of operands of which this rank holds a part."""

    codes: ScaledTensor | None
    input_splits: Splits
    grad_splits: Splits
    weight_splits: Splits

    def operand(
        self,
        x: torch.Tensor,
        scaling: Scaling | None,
        scaling_t: Scaling | None,
        *,
        operand: Literal["input", "grad_output"],
        after: torch.Tensor | None = None,
    ) -> tuple[ScaledTensor | None, ScaledTensor | None]:
        """See `aotrain.ops.OperandCasts`."""
        q = None if scaling is None else self._one(x, scaling, operand, after, transposed=False)
        if scaling_t is None:
            return q, None
        t = transpose_quantized(q) if q is not None and scaling == scaling_t else None
        return q, self._one(x, scaling_t, operand, after, transposed=True) if t is None else t

    def _one(
        self, x: torch.Tensor, scaling: Scaling, operand: str, after: torch.Tensor | None, *, transposed: bool
    ) -> ScaledTensor:
        if operand == "input" and self.codes is not None and self.codes.scaling == scaling:
            found = transpose_quantized(self.codes) if transposed else self.codes
            assert found is not None
            return found
        return _cast(x, scaling, self.input_splits if operand == "input" else self.grad_splits, transposed, after)

    def weight(
        self, weight: torch.Tensor, scaling: Scaling, *, transposed: bool, after: torch.Tensor | None = None
    ) -> ScaledTensor:
        """See `aotrain.ops.WeightCasts`."""
        if isinstance(weight, GatheredWeight):
            cast = traced_cast_weight if torch.compiler.is_compiling() else cast_weight
            return cast(weight, scaling, transposed=transposed, after=after)
        return _cast(weight, scaling, self.weight_splits, transposed, after)


def _cast(
    x: torch.Tensor, scaling: Scaling, splits: Splits, transposed: bool, after: torch.Tensor | None
) -> ScaledTensor:
    if transposed:
        x, splits = x.t(), tuple((1 - dim, group) for dim, group in splits)
    if all(scaling.block[dim] != -1 for dim, _ in splits):
        return scaled_cast_after(x, scaling, after)
    (amax,) = all_reduce_over_splits([block_amax(x, scaling.block)], [scaling.block], splits)
    return scaled_cast(x, scaling, amax=amax)


def _splits(weight: DTensor, placements: "list[Placement] | tuple[Placement, ...]", ndim: int) -> Splits:
    """Dimensions of an operand, as rows and columns, that lie on several ranks."""
    mesh = weight.device_mesh
    return tuple(
        (1 if placement.is_shard(ndim - 1) else 0, mesh.get_group(mesh_dim))
        for mesh_dim, placement in enumerate(placements)
        if placement.is_shard() and mesh.size(mesh_dim) > 1
    )


def add_bias(out: torch.Tensor, bias: DTensor, layouts: "list[Layout]") -> torch.Tensor:
    local = bias.to_local(grad_placements=[each.bias_grad for each in layouts]).to(out.dtype)
    ranks = [bias.device_mesh.get_local_rank(dim) for dim, each in enumerate(layouts) if each.output.is_partial()]
    if any(ranks):  # the outputs are summed: one rank adds it, and all have its gradient
        local = local - local.detach()
    return out + local


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Placements along one mesh dimension: of the operand as used, of its gradient as computed, of the output."""

    input: Placement
    input_grad: Placement
    weight_grad: Placement
    bias_grad: Placement
    output: Placement


@functools.lru_cache(maxsize=64)
def layout_of(input: Placement, weight: Placement, ndim: int) -> Layout:
    if weight.is_shard(0):
        return Layout(
            input=Replicate(),
            input_grad=Partial(),
            weight_grad=weight,
            bias_grad=Shard(0),
            output=Shard(ndim - 1),
        )
    if weight.is_shard(1):
        features = Shard(ndim - 1)
        return Layout(input=features, input_grad=features, weight_grad=weight, bias_grad=Replicate(), output=Partial())
    # A whole weight: the ranks have different rows of the input, or all have the same.
    split_rows = input.is_shard() and not input.is_shard(ndim - 1)
    rows = input if split_rows else Replicate()
    total = Partial() if split_rows else Replicate()
    return Layout(input=rows, input_grad=rows, weight_grad=total, bias_grad=total, output=rows)
