"""share_global_scales: NVFP4 in training with the global scales of the layers that a server joins.

    prepare_qat(model, "nvfp4")
    share_global_scales(model)          # after get_peft_model, if there are adapters

Servers join q/k/v and gate/up projections and keep one global scale for each result, the largest of its parts'
(`quantization.fused_groups`). Encoding depends on that scale, so layers that train with scales of their own are not
what is served. Here every layer's weight is encoded with the scale of its group, from the weights that all of its
members have at that moment. Layers that are joined with none get the scale that a file stores, which may differ from
their own in the last bit.

Every forward and backward reads the largest magnitudes of the whole group again, and with adapters merges its weights:
nothing is kept that a sharded or changed weight could make wrong. Members of a group must have their weights on the
same device and whole whenever one of them computes: with FSDP2, wrap whole blocks, not single layers.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aotrain.quantization.fused_groups import fused_groups, shared_global_scale
from aotrain.quantization.schemes import Encoded, Nvfp4Scheme, TensorScheme

logger = logging.getLogger(__name__)

_BELOW_ADAPTER = ".base_layer"


@dataclass(frozen=True, eq=False)
class FusedNvfp4Scheme(TensorScheme):
    """NVFP4 of one member's weight with the global scale of its group.

    Attributes:
        members: layers with a `weight` [N, K]; where a layer has `served_weight()`, that is what is encoded.
    """

    members: tuple[torch.nn.Module, ...]

    def global_scale(self) -> torch.Tensor:
        """Of the group now: float32 [1]."""
        return shared_global_scale(_served_weight(member).abs().amax() for member in self.members)

    def encode(
        self,
        x: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> Encoded:
        global_scale = self.global_scale() if global_scale is None else global_scale
        return Nvfp4Scheme().encode(x, scale=scale, zero_point=zero_point, global_scale=global_scale)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        return Nvfp4Scheme().decode(encoded, dtype)

    def problem(self, shape: Sequence[int]) -> str | None:
        return Nvfp4Scheme().problem(shape)

    def __repr__(self) -> str:  # members would print themselves, and their schemes, without end
        return f"FusedNvfp4Scheme(of {len(self.members)} layers)"


def share_global_scales(model: torch.nn.Module) -> list[tuple[str, ...]]:
    """Give the NVFP4 weights of a prepared model the global scales of fused groups, in place.

    Call it again when layers were replaced, as by adapters; the last call counts.

    Args:
        model: prepared: its layers have `weight_fake_quantizer`s.

    Returns:
        The groups, as dotted names of layers; one that is joined with none is a group of its own.

    Raises:
        ValueError: no layer's weight is fake-quantized to NVFP4 with a global scale.
    """
    quantizers: dict[str, Any] = {}
    for fqn, module in model.named_modules():
        quantizer = getattr(module, "weight_fake_quantizer", None)
        is_layer = hasattr(module, "weight") or hasattr(module, "served_weight")  # and no experts
        if is_layer and quantizer is not None and _has_global_scale(quantizer.scheme):
            quantizers[fqn.removesuffix(_BELOW_ADAPTER)] = quantizer
    if not quantizers:
        raise ValueError(
            "share_global_scales got a model without NVFP4 weights; want one prepared for it: "
            'prepare_qat(model, "nvfp4").'
        )
    groups = fused_groups(quantizers)
    for group in groups:
        members = tuple(model.get_submodule(name) for name in group)
        for name in group:
            quantizers[name].scheme = FusedNvfp4Scheme(members)
    logger.info("NVFP4 global scales: %d groups of %d layers", len(groups), len(quantizers))
    return groups


def _has_global_scale(scheme: TensorScheme) -> bool:
    return isinstance(scheme, FusedNvfp4Scheme) or (isinstance(scheme, Nvfp4Scheme) and scheme.two_level)


def _served_weight(module: Any) -> torch.Tensor:
    served = getattr(module, "served_weight", None)
    weight = module.weight.detach() if served is None else served()
    if hasattr(weight, "device_mesh"):  # a DTensor
        raise ValueError(
            f"share_global_scales got a group with a member of which this rank holds a part, {tuple(weight.shape)} as "
            f"{weight.placements}; want whole members whenever one computes: fully_shard the block that holds them "
            "all, not its layers."
        )
    return weight
