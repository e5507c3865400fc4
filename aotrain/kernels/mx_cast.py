"""mx_cast: quantize a matrix, or it and its transposition, to MX; bit-identical to `formats.quantize_mx`.

`scaled_cast` and `scaled_cast_both` come here for every MX scaling: 1 x 32 blocks with E8M0 scales, with stochastic
rounding and the random Hadamard transform where the scaling has them.
"""

import torch

from aotrain.formats import (
    BLOCKWISE_1X32,
    ELEMENT_FORMATS,
    SCALE_FORMATS,
    ScaledTensor,
    Scaling,
    hadamard_transform,
    quantize_mx,
    scale_shape,
)
from aotrain.formats.mx import check_mx, signs_of
from aotrain.kernels import _cast_cpu
from aotrain.kernels._library import LIBRARY

LIBRARY.define(
    "mx_cast(Tensor x_hp, str element, str scale, str rounding, int hadamard) -> (Tensor data, Tensor scale)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIBRARY.define(
    "mx_cast_both(Tensor x_hp, str element, str scale, str rounding, int hadamard,"
    " str element_t, str scale_t, str rounding_t, int hadamard_t)"
    " -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def mx_cast(x_hp: torch.Tensor, scaling: Scaling) -> ScaledTensor:
    """Quantize.

    Args:
        x_hp: [..., rows, columns], float32, bfloat16 or float16, any strides.
        scaling: an MX scaling.

    Returns:
        As `formats.quantize_mx`, contiguous.

    Raises:
        ValueError: the scaling is not MX.
    """
    check_mx(scaling)
    data, scale = torch.ops.aotrain.mx_cast(x_hp, *_names(scaling))
    return ScaledTensor(data, scale, scaling)


def mx_cast_both(x_hp: torch.Tensor, scaling: Scaling, scaling_t: Scaling) -> tuple[ScaledTensor, ScaledTensor]:
    """`mx_cast(x, scaling)` and `mx_cast(x.mT, scaling_t)`, from one pass over x where there is a kernel."""
    check_mx(scaling)
    check_mx(scaling_t)
    data, scale, data_t, scale_t = torch.ops.aotrain.mx_cast_both(x_hp, *_names(scaling), *_names(scaling_t))
    return ScaledTensor(data, scale, scaling), ScaledTensor(data_t, scale_t, scaling_t)


def _names(scaling: Scaling) -> tuple[str, str, str, int]:
    return scaling.element.name, scaling.scale.name, scaling.rounding, scaling.hadamard


def _scaling(element: str, scale: str, rounding: str, hadamard: int) -> Scaling:
    return Scaling(
        element=ELEMENT_FORMATS[element],
        scale=SCALE_FORMATS[scale],
        block=BLOCKWISE_1X32,
        rounding=rounding,
        hadamard=hadamard,
    )


def _reference(
    x_hp: torch.Tensor, element: str, scale: str, rounding: str, hadamard: int
) -> tuple[torch.Tensor, torch.Tensor]:
    q = quantize_mx(x_hp.contiguous(), _scaling(element, scale, rounding, hadamard))
    return q.data, q.scale


def _cpu(
    x_hp: torch.Tensor, element: str, scale: str, rounding: str, hadamard: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The C++ kernel of `scaled_cast`, of the transformed matrix where there is a transform."""
    if rounding != "nearest" or _cast_cpu.problem(x_hp, element, scale):
        return _reference(x_hp, element, scale, rounding, hadamard)
    if hadamard:
        x_hp = hadamard_transform(x_hp, signs_of(_scaling(element, scale, rounding, hadamard), x_hp.device))
    return _cast_cpu.scaled_cast(x_hp, element, scale, *BLOCKWISE_1X32)


def _fake(
    x_hp: torch.Tensor, element: str, scale: str, rounding: str, hadamard: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x_hp.shape[-2:]
    if hadamard:
        columns = (columns + hadamard - 1) // hadamard * hadamard
    shape = (*x_hp.shape[:-2], rows, columns)
    data = x_hp.new_empty(shape, dtype=ELEMENT_FORMATS[element].dtype)
    return data, x_hp.new_empty(scale_shape(shape, BLOCKWISE_1X32), dtype=SCALE_FORMATS[scale].dtype)


def _two_casts(
    x_hp: torch.Tensor,
    element: str,
    scale: str,
    rounding: str,
    hadamard: int,
    element_t: str,
    scale_t: str,
    rounding_t: str,
    hadamard_t: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whatever implements `mx_cast` on the device, twice."""
    return (
        *torch.ops.aotrain.mx_cast(x_hp, element, scale, rounding, hadamard),
        *torch.ops.aotrain.mx_cast(x_hp.mT, element_t, scale_t, rounding_t, hadamard_t),
    )


def _fake_both(
    x_hp: torch.Tensor,
    element: str,
    scale: str,
    rounding: str,
    hadamard: int,
    element_t: str,
    scale_t: str,
    rounding_t: str,
    hadamard_t: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        *_fake(x_hp, element, scale, rounding, hadamard),
        *_fake(x_hp.mT, element_t, scale_t, rounding_t, hadamard_t),
    )


LIBRARY.impl("mx_cast", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("mx_cast", _cpu, "CPU")
torch.library.register_fake("aotrain::mx_cast", _fake, lib=LIBRARY)
LIBRARY.impl("mx_cast_both", _two_casts, "CompositeExplicitAutograd")
torch.library.register_fake("aotrain::mx_cast_both", _fake_both, lib=LIBRARY)
