"""mx_mm: the matrix product of two MX operands, blocks of 1 x 32 along the contracted dimension.

`output[M,N] = (a.data * a.scale)[M,K] @ (b.data * b.scale)[N,K].T`, accumulated in float32.

**Native**: `torch.nn.functional.scaled_mm` on GPUs whose tensor cores read MX. Which do is found by trying: a small
product with a known answer, once per device and pair of formats. A device on which it is refused, fails or is wrong
emulates, with one warning; so does nothing on CPU, which is never asked. K and N are padded to what it takes.

**Emulated**: multiplies the dequantized operands. An element of at most 4 significant bits times a power of two is
exact in bfloat16, which has 8 and the exponents of float32, but for what leaves its range: values above 2^128 (of scale
bytes above 245 for e4m3) are infinite, and values below 2^-126 (scale bytes below 10), where a float32 result has no
room for their products either, are subnormal numbers, rounded below 2^-133 and taken as zero by some processors.
"""

import functools

import torch

from aotrain.formats import ELEMENT_FORMATS, ScaledTensor, is_mx, pack_float4, to_blocked
from aotrain.formats.e8m0 import decode_e8m0
from aotrain.formats.scaling import BLOCKWISE_1X32
from aotrain.kernels._dispatch import warn_slow
from aotrain.kernels._library import LIBRARY
from aotrain.kernels._mm_cpu import dequantize_blocks

# What the product demands of K, whole blocks of scales, and of N.
K_ALIGNMENT, N_ALIGNMENT = 32, 16
_NATIVE_ELEMENTS = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")
_PROBE_SIZES = (48, 160, 256)  # N, M, K: several tiles of scales, one of them ragged
# Of the largest result: one rounded to bfloat16 is within 2^-8, and scales in the wrong places are off by far more.
_PROBE_TOLERANCE = 2.0**-6

LIBRARY.define(
    "mx_mm(Tensor a, Tensor a_scale, str a_element, Tensor b, Tensor b_scale, str b_element, ScalarType out_dtype,"
    " bool emulate) -> Tensor"
)


def mx_mm(a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype, *, emulate: bool = False) -> torch.Tensor:
    """`output[M,N] = a[M,K] @ b[N,K].T` of MX operands.

    Args:
        a: [M, K] with scale [M, ceil(K / 32)]; float8 or int8 data, or codes of 6 or 4 bits.
        b: [N, K] likewise; its elements may have another format.
        out_dtype: float32, bfloat16 or float16.
        emulate: use the emulated backend even where a native one exists.

    Raises:
        ValueError: an operand that is not MX, different contracted dimensions, or different Hadamard transforms.
    """
    for name, operand in (("a", a), ("b", b)):
        if not is_mx(operand.scaling):
            raise ValueError(
                f"mx_mm operand {name} is {operand.scaling}; MX goes with MX only: quantize it in blocks of 1x32 with "
                "E8M0 scales."
            )
    if a.data.shape[-1] != b.data.shape[-1] or a.scaling.hadamard != b.scaling.hadamard:
        raise ValueError(
            f"mx_mm got a of shape {tuple(a.data.shape)} in {a.scaling} and b of shape {tuple(b.data.shape)} in "
            f"{b.scaling}; the last dimensions are contracted and must be equal, and so must the transforms along them."
        )
    return torch.ops.aotrain.mx_mm(
        *(a.data, a.scale.view(torch.uint8), a.scaling.element.name),
        *(b.data, b.scale.view(torch.uint8), b.scaling.element.name),
        *(out_dtype, emulate),
    )


def _emulated(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_element: str,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_element: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    # A float16 output needs the wider range.
    mm_dtype = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    lhs, rhs = (
        dequantize_blocks(data, decode_e8m0(scale), BLOCKWISE_1X32, mm_dtype, element=ELEMENT_FORMATS[element])
        for data, scale, element in ((a, a_scale, a_element), (b, b_scale, b_element))
    )
    return (lhs @ rhs.t()).to(out_dtype)


def mx_mm_problem(device: torch.device, a_element: str, b_element: str, out_dtype: torch.dtype) -> str | None:
    """Why this device cannot run MX products of these formats natively; None when it can or is not a GPU."""
    if device.type != "cuda":
        return None
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _cuda_problem(index, a_element, b_element, _native_dtype(out_dtype))


@functools.lru_cache(maxsize=64)
def _cuda_problem(index: int, a_element: str, b_element: str, mm_dtype: torch.dtype) -> str | None:
    name = torch.cuda.get_device_name(index)
    problem = _probe(torch.device("cuda", index), a_element, b_element, mm_dtype)
    return None if problem is None else f"{name} {problem}"


def _probe(device: torch.device, a_element: str, b_element: str, mm_dtype: torch.dtype) -> str | None:
    """Multiply two matrices with scales of their own per block, and compare with the emulation."""
    if not {a_element, b_element} <= set(_NATIVE_ELEMENTS):
        return f"has no MX product of {a_element} and {b_element}"
    columns, rows, contracted = _PROBE_SIZES
    operands: list[tuple[torch.Tensor, torch.Tensor, str]] = []
    for size, element, step in ((rows, a_element, 7), (columns, b_element, 11)):
        # From 0 to about 1, or 6 in e2m1: what is in the wrong place is not lost in a cancellation.
        number = torch.arange(size * contracted, device=device).view(size, contracted)
        codes = (number * step % (8 if element == "float4_e2m1fn" else 61)).to(torch.uint8)
        codes = codes.view(ELEMENT_FORMATS[element].dtype)
        block = torch.arange(size * contracted // 32, device=device).view(size, contracted // 32)
        operands.append((codes, (block * 5 % 9 + 123).to(torch.uint8), element))
    try:
        got = _native(*operands[0], *operands[1], mm_dtype)
        want = _emulated(*operands[0], *operands[1], torch.float32)
        wrong = ~((got.float() - want).abs() <= _PROBE_TOLERANCE * want.abs().amax())
        return "computes MX products wrongly" if bool(wrong.any()) else None
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"has no MX product of {a_element} and {b_element} ({str(error).splitlines()[0][:120]})"


def _native_dtype(out_dtype: torch.dtype) -> torch.dtype:
    """What the native product writes; float16 has too little range for it."""
    return torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32


def _native(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_element: str,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_element: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    columns = b.shape[0]
    lhs, rhs = _hardware_data(a, a_element, 1), _hardware_data(b, b_element, N_ALIGNMENT)
    scales = [to_blocked(scale).view(torch.float8_e8m0fnu) for scale in (a_scale, b_scale)]
    kind, swizzle = torch.nn.functional.ScalingType.BlockWise1x32, torch.nn.functional.SwizzleType.SWIZZLE_32_4_4
    output = torch.nn.functional.scaled_mm(
        *(lhs, rhs.t(), scales[0], kind, scales[1], kind, swizzle, swizzle), output_dtype=_native_dtype(out_dtype)
    )
    if output.shape[1] != columns:
        output = output.narrow(1, 0, columns).clone(memory_format=torch.contiguous_format)
    return output.to(out_dtype)


def _hardware_data(data: torch.Tensor, element: str, row_multiple: int) -> torch.Tensor:
    """[R, K] data with K and R padded to multiples, codes of 4 bits in pairs. Code 0 is zero in all formats."""
    padding = (0, -data.shape[1] % K_ALIGNMENT, 0, -data.shape[0] % row_multiple)
    if any(padding):
        data = torch.nn.functional.pad(data.view(torch.uint8), padding).view(data.dtype)
    return pack_float4(data).view(torch.float4_e2m1fn_x2) if element == "float4_e2m1fn" else data


def _mx_mm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_element: str,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_element: str,
    out_dtype: torch.dtype,
    emulate: bool,
) -> torch.Tensor:
    if min(a.shape[0], a.shape[1], b.shape[0]) == 0:
        return a.new_zeros((a.shape[0], b.shape[0]), dtype=out_dtype)
    operands = (a, a_scale, a_element, b, b_scale, b_element)
    if a.is_cuda and not emulate:
        problem = mx_mm_problem(a.device, a_element, b_element, out_dtype)
        if problem is None:
            return _native(*operands, out_dtype)
        warn_slow("mx_mm", problem)
    return _emulated(*operands, out_dtype)


def _fake(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_element: str,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_element: str,
    out_dtype: torch.dtype,
    emulate: bool,
) -> torch.Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


LIBRARY.impl("mx_mm", _mx_mm, "CompositeExplicitAutograd")
torch.library.register_fake("aotrain::mx_mm", _fake, lib=LIBRARY)
