"""FakeQuantizedLinear on DTensors, as tensor parallelism has them: each rank quantizes and multiplies what it holds.

    columns (weight split along N):  output[M, N/p] = fq(input)[M, K]   @ fq(weight)[N/p, K].T
    rows    (weight split along K):  output[M, N]   = fq(input)[M, K/p] @ fq(weight)[N, K/p].T     summed over ranks

Codes are those of the whole tensors, since every rank must hold whole groups: elements that share a scale. Splits that
part a group are refused, not approximated. Under FSDP2 alone there are no DTensors in forward, which has gathered them.

This module loads torch.distributed.tensor, and is imported where there are DTensors.
"""

from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, Placement

from aotrain.nn.sharded_linear import Layout, add_bias, layout_of
from aotrain.qat.fake_quantizer import FakeQuantizerBase, block_of

if TYPE_CHECKING:
    from aotrain.qat.linear import FakeQuantizedLinear


def sharded_linear(layer: "FakeQuantizedLinear", input: torch.Tensor) -> DTensor:
    """The output of a layer whose parameters are DTensors, for a DTensor input [..., K].

    Raises:
        ValueError: an input or a bias that is a plain tensor; fake quantizers with learned ranges or hooks; a split
            that parts groups of elements with one scale.
    """
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, DTensor)
    if not isinstance(input, DTensor) or not (bias is None or isinstance(bias, DTensor)):
        raise ValueError(
            f"FakeQuantizedLinear got a weight that is a DTensor ({weight.placements}) with a plain "
            f"{'bias' if isinstance(input, DTensor) else 'input'}. With FSDP2, prepare the model before fully_shard, "
            "and call the modules that are sharded, not layers in them; with tensor parallelism, give every layer a "
            "style (ColwiseParallel, RowwiseParallel) before prepare_qat."
        )
    if not layer.can_fuse():
        raise ValueError(
            "FakeQuantizedLinear got a weight that is a DTensor, and a fake quantizer that learns its range or has "
            "hooks; want dynamic scales with tensor parallelism."
        )
    layouts = [layout_of(x, w, input.ndim) for x, w in zip(input.placements, weight.placements, strict=True)]
    inputs = [each.input for each in layouts]
    _check_groups("an input", layer.activation_fake_quantizer, input, inputs)
    _check_groups("a weight", layer.weight_fake_quantizer, weight, weight.placements)
    x = input.redistribute(placements=inputs).to_local(grad_placements=[each.input_grad for each in layouts])
    w = weight.to_local(grad_placements=[each.weight_grad for each in layouts])
    outputs = [each.output for each in layouts]
    is_summed = any(output.is_partial() for output in outputs)
    out = layer.product(x, w, None if bias is None or is_summed else _local_bias(bias, layouts))
    if bias is not None and is_summed:
        out = add_bias(out, bias, layouts)
    return DTensor.from_local(out, weight.device_mesh, outputs, run_check=False)


def _local_bias(bias: DTensor, layouts: list[Layout]) -> torch.Tensor:
    return bias.to_local(grad_placements=[each.bias_grad for each in layouts])


def _check_groups(
    what: str, quantizer: FakeQuantizerBase | None, x: DTensor, placements: list[Placement] | tuple[Placement, ...]
) -> None:
    """Raise ValueError where a rank would hold a part of a group."""
    if quantizer is None:
        return
    for mesh_dim, placement in enumerate(placements):
        ranks = x.device_mesh.size(mesh_dim)
        if not placement.is_shard() or ranks == 1:
            continue
        is_last = placement.is_shard(x.ndim - 1)
        block = block_of(quantizer.scheme)[1 if is_last else 0]
        held = -(-x.shape[-1 if is_last else 0] // ranks)
        if block == -1 or (block > 1 and held % block):
            raise ValueError(
                f"FakeQuantizedLinear got {what} {tuple(x.shape)} split over {ranks} ranks as {placement}, which parts "
                f"{'what has one scale' if block == -1 else f'groups of {block}'} in {quantizer.scheme}; want every "
                "rank to hold whole groups: ColwiseParallel for this layer, a scheme with smaller groups, or no fake "
                "quantization of it (exclude)."
            )
