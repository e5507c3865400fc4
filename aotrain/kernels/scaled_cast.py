"""scaled_cast: quantize a high-precision matrix; bit-identical to `aotrain.formats.quantize`.

On CUDA, rowwise scaling to e4m3fn and e5m2 is one fused Triton kernel. On CPU, float32 scales of these two formats
are a C++ kernel (`_cast_cpu`) for every block shape. Everything else runs the definition itself.
"""

import torch

from aotrain.formats import ELEMENT_FORMATS, ROWWISE, SCALE_FORMATS, ScaledTensor, Scaling, quantize, scale_shape
from aotrain.kernels import _cast_cpu
from aotrain.kernels._dispatch import triton_problem, warn_slow
from aotrain.kernels._library import LIBRARY

LIBRARY.define(
    "scaled_cast(Tensor x_hp, str element, str scale, int block_rows, int block_columns)"
    " -> (Tensor data, Tensor scale)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scaled_cast(x_hp: torch.Tensor, scaling: Scaling, *, amax: torch.Tensor | None = None) -> ScaledTensor:
    """Quantize, rounding to nearest.

    Args:
        x_hp: [..., rows, columns], float32, bfloat16 or float16, any strides.
        scaling: target format and block shape; its rounding must be "nearest".
        amax: float32 `scale_shape(x.shape, block)`, the largest magnitudes that the scales come from, where x is a part
            of a larger matrix; by default those of x's own blocks.

    Returns:
        ScaledTensor with contiguous data [..., rows, columns] and scale `scale_shape(x.shape, block)`.
    """
    if scaling.rounding != "nearest":
        raise ValueError("scaled_cast rounds to nearest; use formats.quantize with noise for stochastic rounding.")
    if amax is not None:
        if x_hp.is_cuda:
            warn_slow("scaled_cast", "there is no kernel for a given amax yet")
        return quantize(x_hp.contiguous(), scaling, amax=amax)
    data, scale = torch.ops.aotrain.scaled_cast(x_hp, scaling.element.name, scaling.scale.name, *scaling.block)
    return ScaledTensor(data, scale, scaling)


def _reference(
    x_hp: torch.Tensor, element: str, scale: str, block_rows: int, block_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    scaling = Scaling(element=ELEMENT_FORMATS[element], scale=SCALE_FORMATS[scale], block=(block_rows, block_columns))
    q = quantize(x_hp.contiguous(), scaling)
    return q.data, q.scale


def _cpu(
    x_hp: torch.Tensor, element: str, scale: str, block_rows: int, block_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    cast = _reference if _cast_cpu.problem(x_hp, element, scale) else _cast_cpu.scaled_cast
    return cast(x_hp, element, scale, block_rows, block_columns)


def _cuda(
    x_hp: torch.Tensor, element: str, scale: str, block_rows: int, block_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton kernel where there is one. Tests call it with CPU tensors under Triton's interpreter."""
    block = (block_rows, block_columns)
    if x_hp.dim() < 2 or x_hp.dtype not in _KERNEL_DTYPES:
        return _reference(x_hp, element, scale, *block)  # raises
    reason = _kernel_gap(element, scale, block) or triton_problem(x_hp.device)
    if reason is not None:
        warn_slow("scaled_cast", reason)
        return _reference(x_hp, element, scale, *block)

    from aotrain.kernels.triton.scaled_cast import scaled_cast_rowwise

    matrix = x_hp.reshape(x_hp.shape[:-1].numel(), x_hp.shape[-1])
    data, row_scale = scaled_cast_rowwise(matrix, ELEMENT_FORMATS[element], SCALE_FORMATS[scale])
    return data.view(x_hp.shape), row_scale.view(scale_shape(x_hp.shape, block))


def cast_kernel_gap(scaling: Scaling) -> str | None:
    """What keeps a cast to this format from being one fused kernel on a GPU; None when it is one."""
    return _kernel_gap(scaling.element.name, scaling.scale.name, scaling.block)


def _kernel_gap(element: str, scale: str, block: tuple[int, int]) -> str | None:
    """What of this scaling the kernel does not do; None when it does all of it."""
    if block != ROWWISE:
        return f"there is no kernel for scale blocks of {block} yet"
    if element not in ("float8_e4m3fn", "float8_e5m2"):
        return f"there is no kernel for {element} yet"
    if scale not in ("float32", "float32_pow2"):
        return f"there is no kernel for {scale} scales yet"
    return None


def _fake(
    x_hp: torch.Tensor, element: str, scale: str, block_rows: int, block_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    data = x_hp.new_empty(x_hp.shape, dtype=ELEMENT_FORMATS[element].dtype)
    shape = scale_shape(x_hp.shape, (block_rows, block_columns))
    return data, x_hp.new_empty(shape, dtype=SCALE_FORMATS[scale].dtype)


LIBRARY.impl("scaled_cast", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("scaled_cast", _cpu, "CPU")
LIBRARY.impl("scaled_cast", _cuda, "CUDA")
torch.library.register_fake("aotrain::scaled_cast", _fake, lib=LIBRARY)
