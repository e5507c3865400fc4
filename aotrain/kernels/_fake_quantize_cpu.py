"""`aotrain::fake_quantize_affine` and its backward on CPU: csrc/cpu/fake_quantize.cpp, called through ctypes."""

import ctypes
import functools
from array import array

import torch

from aotrain.formats import AffineFormat, MappingType, ZeroPointDomain
from aotrain.formats.scale_gradient import constant_below
from aotrain.kernels._buffers import empty
from aotrain.kernels._fake_quantize_table import Table, lookup_table
from aotrain.kernels._native import native_library

# Enums Isa, Input and Mapping of csrc/cpu/{isa,fake_quantize}.h.
ISAS = {"scalar": 0, "avx2": 1, "avx512": 2}
_INPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAPPINGS = {MappingType.SYMMETRIC: 0, MappingType.SYMMETRIC_NO_CLIPPING_ERR: 1, MappingType.ASYMMETRIC: 2}


@functools.lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """(the compiled kernel, None) or (None, why it is not there)."""
    found, reason = native_library("fake_quantize")
    if found is not None:
        for function in (found.aotrain_fake_quantize, found.aotrain_fake_quantize_clear):
            function.restype, function.argtypes = None, (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    return found, reason


def problem(x: torch.Tensor) -> str | None:
    """Why the kernel cannot take this tensor, whatever the format; None when it can."""
    found, reason = library()
    if found is None:
        return reason
    if x.dtype not in _INPUTS or x.numel() == 0 or x.layout != torch.strided:
        return "the tensor is empty, sparse or of another dtype"
    return None


def fake_quantize(
    x: torch.Tensor,
    form: AffineFormat,
    grad: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    saturated: torch.Tensor | None = None,
    with_scales: bool = False,
    isa: str | None = None,
) -> torch.Tensor:
    """Values of x's codes, or the gradient of x from theirs, for a tensor without `problem`.

    Args:
        x: [..., K], a multiple of the group size.
        form: a format that `fake_quantize.kernel_gap` has nothing against.
        grad: gradient of the values, in x's shape and dtype.
        out: contiguous; default a new tensor. May be grad.
        saturated: contiguous int32 in the shape of `fake_quantize_marked.saturated_shape`, written with the values.
        with_scales: whether the gradient is also that of scales, for a format whose scales follow the maximum.
        isa: instruction set; default the fastest. Tests choose.
    """
    x = x.contiguous()
    grad = None if grad is None else grad.contiguous()
    out = empty(x.shape, x.dtype) if out is None else out
    size = x.shape[-1] if form.group_size is None else form.group_size
    pointers = (x.data_ptr(), 0 if grad is None else grad.data_ptr(), out.data_ptr())
    marks = 0 if saturated is None else saturated.data_ptr()
    constants, _ = _constants(form, x.dtype)
    sizes = (x.numel() // size, size)
    _call("aotrain_fake_quantize", (*pointers, *sizes, *constants, int(with_scales), marks), isa)
    return out


def clear_saturated_(
    grad: torch.Tensor, saturated: torch.Tensor, group_size: int | None, isa: str | None = None
) -> None:
    """Zeros in a contiguous gradient, of 2 or 4 bytes an element, where bits that `fake_quantize` wrote are set."""
    size = grad.shape[-1] if group_size is None else group_size
    table = (grad.data_ptr(), saturated.data_ptr(), grad.numel() // size, size, grad.element_size())
    _call("aotrain_fake_quantize_clear", table, isa)


def _call(name: str, table: tuple[int, ...], isa: str | None) -> None:
    found, reason = library()
    if found is None:
        raise RuntimeError(f"The C++ kernel of aotrain::fake_quantize_affine cannot run: {reason}.")
    packed = array("q", table)
    level = _fastest_isa() if isa is None else ISAS[isa]
    getattr(found, name)(packed.buffer_info()[0], level, torch.get_num_threads())


@functools.lru_cache(maxsize=1)
def _fastest_isa() -> int:
    found, _ = library()
    return 0 if found is None else found.aotrain_fake_quantize_isa()


@functools.lru_cache(maxsize=256)
def _constants(form: AffineFormat, dtype: torch.dtype) -> tuple[tuple[int, ...], Table | None]:
    """Fields of a call, and the table that they point to, which lives as long as they do."""
    compute = form.compute_dtype or dtype
    zero_point = 0 if form.domain is ZeroPointDomain.NONE else form.center
    table = lookup_table(form, dtype)
    numbers = (
        *(form.quant_min, form.quant_max, zero_point, _MAPPINGS[form.mapping]),
        *(_INPUTS[dtype], _INPUTS[form.scale_dtype or dtype], int(compute == torch.float32)),
        _bits(form.smallest_scale(compute)),
        *((0,) * 6 if table is None else (table.rows.data_ptr(), *table[1:])),
        _bits(constant_below(form, dtype)),
    )
    return numbers, table


def _bits(x: float) -> int:
    return int(torch.tensor(x, dtype=torch.float32, device="cpu").view(torch.int32))
