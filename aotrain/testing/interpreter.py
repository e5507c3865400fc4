"""Corrected float8 and bfloat16 arithmetic for Triton's CPU interpreter.

With `TRITON_INTERPRET=1` Triton runs kernels on numpy arrays, which lets every kernel be tested without a GPU. Its
stock casts and bfloat16 arithmetic are wrong (triton 3.6 to 3.9): fp32 -> bf16 truncates, fp32 -> float8 loses carries
and wraps on overflow, infinities and NaNs of float8 become finite numbers, and `a + b` of two bfloat16 tensors adds
their bit patterns. `corrected_interpreter()` replaces the few functions that are responsible:

| replaced                                            | by                                                         |
|-----------------------------------------------------|------------------------------------------------------------|
| `_convert_float`, `InterpreterBuilder.cast_impl`    | torch's casts: nearest even; float8 saturates and has one  |
|                                                     | NaN, as `cvt.rn.satfinite` does                            |
| `binary_op`, `ternary_op`, `unary_op`               | bfloat16 operands compute in float32 and round once        |
| `create_fma`                                        | of float32 is rounded once                                 |
| `create_minnumf`, `create_maxnumf`                  | the number where one operand is NaN, as the hardware does  |
| `create_dot`                                        | bfloat16 operands are widened to float32                   |
| `ReduceScanOpInterface.check_tensor`                | reductions of bfloat16 raise: upcast first, as kernels must |
| `_patch_lang_tensor`                                | sizes passed to a kernel work in `range` (3.6.0, numpy 2.4) |

Not covered: atomics on bfloat16 and rounding modes other than nearest-even (raises).
`tests/testing/test_interpreter.py` fails when a Triton release no longer needs one of these replacements.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH_DTYPES: dict[tl.dtype, torch.dtype] = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_FLOAT8 = (tl.float8e4nv, tl.float8e5, tl.float8e4b8, tl.float8e5b16)
# What `cvt.rn.satfinite` and the CUDA headers store for a NaN, whatever its sign.
_FLOAT8_NAN_CODE = {tl.float8e4nv: 0x7F, tl.float8e5: 0x7F, tl.float8e4b8: 0x80, tl.float8e5b16: 0x80}

_STOCK_CONVERT = interpreter._convert_float


@contextlib.contextmanager
def corrected_interpreter() -> Iterator[None]:
    """Within this context, Triton's interpreter computes float8 and bfloat16 as hardware does. May be nested."""
    builder = interpreter.InterpreterBuilder
    replacements: list[tuple[Any, str, Callable[..., Any]]] = [
        (interpreter, "_convert_float", _convert_float),
        (builder, "cast_impl", _cast_impl),
        (builder, "binary_op", _in_float32(builder.binary_op, num_operands=2)),
        (builder, "ternary_op", _in_float32(builder.ternary_op, num_operands=3)),
        (builder, "unary_op", _in_float32(builder.unary_op, num_operands=1)),
        (builder, "create_fma", _in_float32(_fused_multiply_add, num_operands=3)),
        (builder, "create_minnumf", _in_float32(_numpy_operation(np.fmin), num_operands=2)),
        (builder, "create_maxnumf", _in_float32(_numpy_operation(np.fmax), num_operands=2)),
        (builder, "create_dot", _dot_in_float32(builder.create_dot)),
        (interpreter.ReduceScanOpInterface, "check_tensor", _reject_bfloat16),
        (interpreter, "_patch_lang_tensor", _with_index(interpreter._patch_lang_tensor)),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)
        with np.errstate(all="ignore"):  # a GPU divides by zero without a warning
            yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _convert_float(data: np.ndarray, input_dtype: tl.dtype, output_dtype: tl.dtype, rounding_mode: Any) -> np.ndarray:
    """Bits of `data` cast from one floating-point type to another, as unsigned integers of the output's width."""
    if input_dtype not in _TORCH_DTYPES or output_dtype not in _TORCH_DTYPES:
        return _STOCK_CONVERT(data, input_dtype, output_dtype, rounding_mode)
    if rounding_mode not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
        raise NotImplementedError(f"The corrected interpreter rounds to nearest even only, got {rounding_mode}.")
    x = _to_torch(data, input_dtype)
    if output_dtype not in _FLOAT8:
        return _to_numpy_bits(x.to(_TORCH_DTYPES[output_dtype]), output_dtype)
    target = _TORCH_DTYPES[output_dtype]
    limit = torch.finfo(target).max
    wide = x.double() if input_dtype == tl.float64 else x.float()
    codes = _to_numpy_bits(wide.clamp(-limit, limit).to(target), output_dtype)
    codes[wide.isnan().numpy()] = _FLOAT8_NAN_CODE[output_dtype]
    return codes


def _cast_impl(self: Any, src: Any, dst_type: tl.dtype) -> Any:
    """Casts between integers and 16- to 64-bit floats, where bfloat16 is stored as its bits in uint16.

    Numpy's own casts are right except for bfloat16; float64 -> bfloat16 rounds twice, as the hardware does.
    """
    src_dtype, dst_dtype = src.dtype.scalar, dst_type.scalar
    np_dtype = interpreter._get_np_dtype(dst_type)
    if src_dtype == dst_dtype:
        return interpreter.TensorHandle(src.data, dst_dtype)
    if dst_dtype == tl.bfloat16:
        data = _convert_float(_widen(src).data.astype(np.float32), tl.float32, tl.bfloat16, None)
    else:
        with np.errstate(over="ignore"):  # infinity, as on hardware
            data = _widen(src).data.astype(np_dtype)
    return interpreter.TensorHandle(data, dst_dtype)


def _in_float32(stock: Callable[..., Any], num_operands: int) -> Callable[..., Any]:
    """The operation with bfloat16 operands widened and a floating-point result rounded back to bfloat16."""

    def operation(self: Any, *args: Any) -> Any:
        operands, rest = args[:num_operands], args[num_operands:]
        if not any(_is_bfloat16(operand) for operand in operands):
            return stock(self, *args)
        result = stock(self, *(_widen(operand) for operand in operands), *rest)
        if result.data.dtype == np.float32:  # not a comparison
            data = _convert_float(result.data, tl.float32, tl.bfloat16, None)
            return interpreter.TensorHandle(data, tl.bfloat16)
        return result

    return operation


def _fused_multiply_add(self: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z rounded once. The product of two float32 is exact in float64, the sum is rounded to odd there.

    Source: Boldo & Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd",
    2008, theorem 3: rounding to odd with two extra bits or more, then to nearest, rounds as once.
    """
    if x.dtype.scalar != tl.float32:
        return interpreter.TensorHandle(x.data * y.data + z.data, x.dtype.scalar)
    product, addend = x.data.astype(np.float64) * y.data.astype(np.float64), z.data.astype(np.float64)
    total = product + addend
    # What the addition lost (Knuth's two-sum); its sign says on which side of `total` the exact sum lies.
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    bits = np.asarray(total).view(np.int64)
    inexact = np.isfinite(total) & np.isfinite(lost) & (lost != 0)
    toward_zero = np.where((lost < 0) == (total > 0), bits - 1, bits)  # the sum truncated
    odd = np.where(inexact, toward_zero | 1, bits).view(np.float64)
    return interpreter.TensorHandle(odd.astype(np.float32), tl.float32)


def _numpy_operation(function: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, x: Any, y: Any) -> Any:
        return interpreter.TensorHandle(function(x.data, y.data), x.dtype.scalar)

    return operation


def _dot_in_float32(stock: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        return stock(self, _widen(a), _widen(b), accumulator, *options)

    return create_dot


def _reject_bfloat16(self: Any, inputs: tuple[Any, ...]) -> None:
    for x in inputs:
        if x.dtype.scalar == tl.bfloat16:
            raise ValueError("The interpreter cannot reduce or scan bfloat16: convert the tensor to float32 first.")
        self.check_axis(x.shape, self.axis)


def _with_index(stock: Callable[..., None]) -> Callable[..., None]:
    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        stock(tensor, scope)
        # Triton 3.6.0 calls int() on an array of one dimension, an error since numpy 2.4.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch_lang_tensor


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    """A bfloat16 handle as float32; any other handle unchanged."""
    if not _is_bfloat16(handle):
        return handle
    data = _convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


def _to_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    bits = np.array(data, order="C").view(f"int{dtype.primitive_bitwidth}")  # a copy: torch wants writable memory
    return torch.from_numpy(bits).view(_TORCH_DTYPES[dtype])


def _to_numpy_bits(x: torch.Tensor, dtype: tl.dtype) -> np.ndarray:
    bits = x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    return bits.numpy().view(f"uint{dtype.primitive_bitwidth}")
