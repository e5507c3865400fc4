"""mx_cast: quantize a matrix, or it and its transposition, to MX; bit-identical to `formats.quantize_mx`.

`scaled_cast` and `scaled_cast_both` come here for every MX scaling: 1 x 32 blocks with E8M0 scales, with stochastic
rounding and the random Hadamard transform where the scaling has them. On CUDA, rounding to nearest of e4m3, e5m2 and
e2m1 is a Triton kernel that reads x once for both outputs, and so is stochastic rounding to e2m1, after a read that
makes its key; e2m1 behind a transform of 32 is another. On CPU rounding to nearest is C++, and so are, for e2m1,
stochastic rounding and the transform (`_mx_cpu`). Everything else runs the definition itself.
"""

import torch

from aotrain.formats import (
    BLOCKWISE_1X32,
    ELEMENT_FORMATS,
    FLOAT4_E2M1,
    SCALE_FORMATS,
    ScaledTensor,
    Scaling,
    quantize_mx,
    scale_shape,
)
from aotrain.formats.mx import check_mx, signs_of
from aotrain.kernels import _cast_cpu, _mx_cpu
from aotrain.kernels._dispatch import FLOAT8_CAPABILITY, MIN_CAPABILITY, triton_problem, warn_slow
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

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements that the Triton kernel makes, and what they need of a GPU: e2m1 is made of integers.
_CAPABILITY = {
    "float8_e4m3fn": FLOAT8_CAPABILITY,
    "float8_e5m2": FLOAT8_CAPABILITY,
    "float4_e2m1fn": MIN_CAPABILITY,
}


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
    """The C++ kernel of `scaled_cast`, of the transformed matrix where there is a transform; stochastic has its own."""
    scaling = _scaling(element, scale, rounding, hadamard)
    signs = signs_of(scaling, x_hp.device) if hadamard else None
    if rounding == "stochastic" and _mx_cpu.stochastic_problem(x_hp, element) is None:
        return _mx_cpu.mx_stochastic(x_hp, signs, scaling)
    if rounding != "nearest" or _cast_cpu.problem(x_hp, element, scale):
        return _reference(x_hp, element, scale, rounding, hadamard)
    x = x_hp if signs is None else _mx_cpu.hadamard_transform(x_hp, signs)
    return _cast_cpu.scaled_cast(x, element, scale, *BLOCKWISE_1X32)


def mx_cast_gap(scaling: Scaling) -> str | None:
    """What keeps an MX cast from being one fused kernel on a GPU; None when it is one."""
    if scaling.element.name not in _CAPABILITY:
        return f"there is no kernel for MX casts to {scaling.element.name} yet"
    if (scaling.rounding != "nearest" or scaling.hadamard) and scaling.element != FLOAT4_E2M1:
        return f"there is no kernel for stochastic rounding or transforms of MX casts to {scaling.element.name} yet"
    if scaling.hadamard not in (0, BLOCKWISE_1X32[1]):
        return f"there is no kernel for MX casts behind a transform of {scaling.hadamard} yet"
    return None


def _cuda_problem(x_hp: torch.Tensor, scaling: Scaling) -> str | None:
    return mx_cast_gap(scaling) or triton_problem(x_hp.device, _CAPABILITY[scaling.element.name])


def _nothing_to_launch(x_hp: torch.Tensor) -> bool:
    """Whether there are no elements, or a type that raises."""
    return x_hp.dim() < 2 or x_hp.dtype not in _KERNEL_DTYPES or x_hp.numel() == 0


def _cuda(
    x_hp: torch.Tensor, element: str, scale: str, rounding: str, hadamard: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton kernel where there is one. Tests call it with CPU tensors under Triton's interpreter."""
    scaling = _scaling(element, scale, rounding, hadamard)
    reason = None if _nothing_to_launch(x_hp) else _cuda_problem(x_hp, scaling)
    if reason is not None:
        warn_slow("mx_cast", reason)
    if reason is not None or _nothing_to_launch(x_hp):
        return _reference(x_hp, element, scale, rounding, hadamard)
    return _kernel(x_hp, scaling, _measures(x_hp, scaling))


def _cuda_both(
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
    """One kernel for both, or one key; where there is no kernel, `mx_cast` says so."""
    names, names_t = (element, scale, rounding, hadamard), (element_t, scale_t, rounding_t, hadamard_t)
    scaling, scaling_t = _scaling(*names), _scaling(*names_t)
    if _nothing_to_launch(x_hp) or _cuda_problem(x_hp, scaling) or _cuda_problem(x_hp, scaling_t):
        return _two_casts(x_hp, *names, *names_t)
    measures = _measures(x_hp, scaling, scaling_t)
    if names == names_t and not hadamard:
        return _tiles(x_hp, scaling, measures, rows=True, columns=True)
    return *_kernel(x_hp, scaling, measures), *_kernel(x_hp.mT, scaling_t, measures)


def _measures(x_hp: torch.Tensor, *scalings: Scaling) -> torch.Tensor | None:
    """The noise key of x and of its transposition where one of the scalings is stochastic."""
    if all(scaling.rounding == "nearest" for scaling in scalings):
        return None
    from aotrain.kernels.triton.nvfp4_cast import measure

    # A sum over all elements in whatever order: of a view that is not copied.
    x = x_hp if x_hp.stride(-1) == 1 else x_hp.mT
    return measure(x.reshape(-1, x.shape[-1]), 0, plain=False, transform=False, checksum=True)


def _kernel(x_hp: torch.Tensor, scaling: Scaling, measures: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    measures = None if scaling.rounding == "nearest" else measures
    if not scaling.hadamard:
        data, scale = _tiles(x_hp, scaling, measures, rows=True, columns=False)[:2]
        return data, scale
    from aotrain.kernels.triton.mx_transform_cast import mx_transform_cast

    data, scale = mx_transform_cast(x_hp.reshape(-1, *x_hp.shape[-2:]).mT, scaling.scale, measures)
    return data.view(*x_hp.shape[:-1], data.shape[-1]), scale.view(*x_hp.shape[:-1], scale.shape[-1])


def _tiles(
    x_hp: torch.Tensor, scaling: Scaling, measures: torch.Tensor | None, *, rows: bool, columns: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernel on a matrix, read along its contiguous dimension, with the outputs in the shape of the operands."""
    from aotrain.kernels.triton.mx_cast import mx_cast_tiles

    matrices = x_hp.reshape(-1, *x_hp.shape[-2:])
    arguments = scaling.element, scaling.scale, measures
    if x_hp.stride(-2) == 1 != x_hp.stride(-1):
        data_t, x_scale_t, data, x_scale = mx_cast_tiles(matrices.mT, *arguments, rows=columns, columns=rows)
    else:
        data, x_scale, data_t, x_scale_t = mx_cast_tiles(matrices, *arguments, rows=rows, columns=columns)
    shape, shape_t = x_hp.shape, x_hp.mT.shape
    if rows:
        data, x_scale = data.view(shape), x_scale.view(scale_shape(shape, BLOCKWISE_1X32))
    if columns:
        data_t, x_scale_t = data_t.view(shape_t), x_scale_t.view(scale_shape(shape_t, BLOCKWISE_1X32))
    return data, x_scale, data_t, x_scale_t


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
LIBRARY.impl("mx_cast", _cuda, "CUDA")
torch.library.register_fake("aotrain::mx_cast", _fake, lib=LIBRARY)
LIBRARY.impl("mx_cast_both", _two_casts, "CompositeExplicitAutograd")
LIBRARY.impl("mx_cast_both", _cuda_both, "CUDA")
torch.library.register_fake("aotrain::mx_cast_both", _fake_both, lib=LIBRARY)
