"""nvfp4_mm: the matrix product of two NVFP4 operands.

`output[M,N] = a[M,K] @ b[N,K].T` with `a ~= (data * scale) * global_scale`, both operands with K last, as
`nvfp4_cast` makes them. `data * scale` has at most 6 significant bits (2 of e2m1 times 4 of e4m3) and a magnitude
between 2^-10 and 2688, so it is exact in bfloat16: the emulation multiplies the two decoded matrices in bfloat16 (or
float32) with float32 sums and applies the two global scales to the result. No rounded copy of an operand is made.
"""

import torch

from aotrain.formats import from_blocked
from aotrain.kernels._library import LIBRARY
from aotrain.kernels._mm_cpu import scale_product
from aotrain.kernels._nvfp4_cpu import decode_operand
from aotrain.kernels.nvfp4_cast import BLOCK_SIZE, Nvfp4Operand

LIBRARY.define(
    "nvfp4_mm(Tensor a, Tensor a_scale, Tensor a_global, Tensor b, Tensor b_scale, Tensor b_global,"
    " ScalarType out_dtype, bool emulate) -> Tensor"
)


def nvfp4_mm(a: Nvfp4Operand, b: Nvfp4Operand, out_dtype: torch.dtype, *, emulate: bool = False) -> torch.Tensor:
    """`output[M,N] = a[M,K] @ b[N,K].T`.

    Args:
        a: data [M, K / 2].
        b: data [N, K / 2].
        out_dtype: float32, bfloat16 or float16.
        emulate: use the emulation even where the device multiplies NVFP4. On CPU it is always used.

    Raises:
        ValueError: the contracted dimensions differ.
    """
    if a.data.shape[1] != b.data.shape[1]:
        raise ValueError(
            f"nvfp4_mm got data of shapes {tuple(a.data.shape)} and {tuple(b.data.shape)}; the last dimensions are "
            "contracted and must be equal."
        )
    return torch.ops.aotrain.nvfp4_mm(*a, *b, out_dtype, emulate)


def _nvfp4_mm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_global: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_global: torch.Tensor,
    out_dtype: torch.dtype,
    emulate: bool,
) -> torch.Tensor:
    if min(a.shape[0], a.shape[1], b.shape[0]) == 0:
        return a.new_zeros((a.shape[0], b.shape[0]), dtype=out_dtype)
    # A float16 result needs the product in a wider range: sums before the global scales exceed 65504.
    mm_dtype = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    product = _decode(a, a_scale, mm_dtype) @ _decode(b, b_scale, mm_dtype).t()
    return scale_product(product, a_global, b_global, out_dtype)


def _decode(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """data * scale, exactly."""
    if scale.dim() == 1:
        scale = from_blocked(scale, data.shape[0], 2 * data.shape[1] // BLOCK_SIZE)
    return decode_operand(data, scale, dtype)


def _fake(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_global: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_global: torch.Tensor,
    out_dtype: torch.dtype,
    emulate: bool,
) -> torch.Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


LIBRARY.impl("nvfp4_mm", _nvfp4_mm, "CompositeExplicitAutograd")
torch.library.register_fake("aotrain::nvfp4_mm", _fake, lib=LIBRARY)
