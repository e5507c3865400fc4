"""Which linear layers a server joins into one, and the one global scale that such a group has.

Inference engines concatenate the projections that read the same input, q/k/v of an attention and gate/up of a
feed-forward network, and keep one NVFP4 global scale for the result: the largest of the parts'. A part that was encoded
with a smaller one would then decode to wrong values. So training and export give all parts the scale of the group.

Source: the layers that vLLM's model definitions fuse; Llama, Mixtral, GPT-like and DeepSeek names.
"""

from collections.abc import Iterable

import torch

from aotrain.quantization.schemes.nvfp4 import storable_global_scale

# Last components of module names that are joined where they have the same parent module.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)
_FAMILY = {leaf: family for family in FUSED for leaf in family}


def fused_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Partition linear layers into the groups that a server joins; a layer that is joined with none is alone.

    Args:
        names: of modules, or of their weights with `.weight` at the end.

    Returns:
        Groups in the order of their first member, members in the order given.
    """
    groups: dict[tuple[str, tuple[str, ...] | str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        groups.setdefault((parent, _FAMILY.get(leaf, leaf)), []).append(name)
    return [tuple(members) for members in groups.values()]


def shared_global_scale(amax: Iterable[torch.Tensor]) -> torch.Tensor:
    """NVFP4 global scale of a group, float32 [1], from the largest magnitude of each member's weight.

    Args:
        amax: one-element tensors of any floating dtype, on one device.

    Raises:
        ValueError: no members.
    """
    members = [each.detach().float().reshape(1) for each in amax]
    if not members:
        raise ValueError("shared_global_scale got no members; want the largest magnitude of at least one weight.")
    return storable_global_scale(torch.stack(members).amax(dim=0))
