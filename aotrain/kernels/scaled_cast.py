"""scaled_cast: quantize a high-precision matrix; bit-identical to `aotrain.formats.quantize`."""

import torch

from aotrain.formats import ELEMENT_FORMATS, SCALE_FORMATS, ScaledTensor, Scaling, quantize, scale_shape
from aotrain.kernels._library import LIBRARY

LIBRARY.define(
    "scaled_cast(Tensor x_hp, str element, str scale, int block_rows, int block_columns) -> (Tensor data, Tensor scale)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def scaled_cast(x_hp: torch.Tensor, scaling: Scaling) -> ScaledTensor:
    """Quantize with the scales of x's own blocks, rounding to nearest.

    Args:
        x_hp: [..., rows, columns], float32, bfloat16 or float16, any strides.
        scaling: target format and block shape; its rounding must be "nearest".

    Returns:
        ScaledTensor with contiguous data [..., rows, columns] and scale `scale_shape(x.shape, block)`.
    """
    if scaling.rounding != "nearest":
        raise ValueError("scaled_cast rounds to nearest; use formats.quantize with noise for stochastic rounding.")
    data, scale = torch.ops.aotrain.scaled_cast(x_hp, scaling.element.name, scaling.scale.name, *scaling.block)
    return ScaledTensor(data, scale, scaling)


def _reference(
    x_hp: torch.Tensor, element: str, scale: str, block_rows: int, block_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    scaling = Scaling(element=ELEMENT_FORMATS[element], scale=SCALE_FORMATS[scale], block=(block_rows, block_columns))
    q = quantize(x_hp.contiguous(), scaling)
    return q.data, q.scale


def _fake(
    x_hp: torch.Tensor, element: str, scale: str, block_rows: int, block_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    data = x_hp.new_empty(x_hp.shape, dtype=ELEMENT_FORMATS[element].dtype)
    shape = scale_shape(x_hp.shape, (block_rows, block_columns))
    return data, x_hp.new_empty(shape, dtype=SCALE_FORMATS[scale].dtype)


LIBRARY.impl("scaled_cast", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("aotrain::scaled_cast", _fake, lib=LIBRARY)
