"""mx_mm: the matrix product of two MX operands, blocks of 1 x 32 along the contracted dimension.

`output[M,N] = (a.data * a.scale)[M,K] @ (b.data * b.scale)[N,K].T`, accumulated in float32.

The emulation multiplies the dequantized operands. An element of at most 4 significant bits times a power of two is
exact in bfloat16, which has 8 and the exponents of float32, but for what leaves its range: values above 2^128 (of scale
bytes above 245 for e4m3) are infinite, and values below 2^-126 (scale bytes below 10), where a float32 result has no
room for their products either, are subnormal numbers, rounded below 2^-133 and taken as zero by some processors.
"""

import torch

from aotrain.formats import ELEMENT_FORMATS, ScaledTensor, is_mx
from aotrain.formats.e8m0 import decode_e8m0
from aotrain.formats.scaling import BLOCKWISE_1X32
from aotrain.kernels._library import LIBRARY
from aotrain.kernels._mm_cpu import dequantize_blocks

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
    return _emulated(a, a_scale, a_element, b, b_scale, b_element, out_dtype)


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
