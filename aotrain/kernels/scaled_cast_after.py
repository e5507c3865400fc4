"""scaled_cast_after: `scaled_cast` that a compiler computes in backward, not in forward.

torch.compile divides one graph into forward and backward. It takes a cast of a weight or of an input for expensive, so
it computes the cast in forward and keeps the codes, even where the weight itself costs nothing to keep. This op takes
one more tensor, such as the gradient of the output, and leaves it unread: what depends on a gradient is in backward.
"""

from collections.abc import Sequence

import torch

from aotrain.formats import ELEMENT_FORMATS, SCALE_FORMATS, ScaledTensor, Scaling
from aotrain.kernels._library import LIBRARY
from aotrain.kernels._padding import UNPADDED, Multiples
from aotrain.kernels.scaled_cast import scaled_cast

LIBRARY.define(
    "scaled_cast_after(Tensor x_hp, Tensor after, str element, str scale, int block_rows, int block_columns,"
    " int[2] pad=[1, 1]) -> (Tensor data, Tensor scale)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def scaled_cast_after(
    x_hp: torch.Tensor, scaling: Scaling, after: torch.Tensor | None, *, pad: Multiples = UNPADDED
) -> ScaledTensor:
    """`scaled_cast`, not before `after` is there.

    Args:
        x_hp: as for `scaled_cast`.
        scaling: as for `scaled_cast`.
        after: any tensor, whose content does not matter; None is `scaled_cast` itself.
        pad: as for `scaled_cast`.
    """
    if after is None or scaling.rounding != "nearest":
        return scaled_cast(x_hp, scaling, pad=pad)
    scaling_args = scaling.element.name, scaling.scale.name, *scaling.block
    data, scale = torch.ops.aotrain.scaled_cast_after(x_hp, after, *scaling_args, pad)
    return ScaledTensor(data, scale, scaling)


def _any_device(
    x_hp: torch.Tensor,
    after: torch.Tensor,
    element: str,
    scale: str,
    block_rows: int,
    block_columns: int,
    pad: Sequence[int] = UNPADDED,
) -> tuple[torch.Tensor, torch.Tensor]:
    # On meta tensors this is the fake implementation, too.
    scaling = Scaling(element=ELEMENT_FORMATS[element], scale=SCALE_FORMATS[scale], block=(block_rows, block_columns))
    q = scaled_cast(x_hp, scaling, pad=(pad[0], pad[1]))
    return q.data, q.scale


LIBRARY.impl("scaled_cast_after", _any_device, "CompositeExplicitAutograd")
torch.library.register_fake("aotrain::scaled_cast_after", _any_device, lib=LIBRARY)
