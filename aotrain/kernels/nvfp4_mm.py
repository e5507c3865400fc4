"""nvfp4_mm: the matrix product of two NVFP4 operands.

`output[M,N] = a[M,K] @ b[N,K].T` with `a ~= (data * scale) * global_scale`, both operands with K last, as
`nvfp4_cast` makes them. Backends that give the same result up to the order of accumulation:

- **native**: `torch.nn.functional.scaled_mm` on a GPU where a small product with a known result comes out right. What
  a GPU can do is asked of the GPU, once per device and process: architecture numbers of new ones are not known here,
  and an older library may refuse, or misread the layout of the scales.
- **emulated**: `data * scale` has at most 6 significant bits (2 of e2m1 times 4 of e4m3) and a magnitude between 2^-10
  and 2688, so it is exact in bfloat16. The two decoded matrices are multiplied in bfloat16 (or float32) with float32
  sums, and the two global scales applied to the result. No rounded copy of an operand is made.
"""

import functools

import torch

from aotrain.formats import from_blocked, to_blocked
from aotrain.kernels._dispatch import warn_slow
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
        emulate: use the emulation even where the device multiplies NVFP4. It is always used on CPU and, with a warning,
            on a GPU without such products.

    Raises:
        ValueError: the contracted dimensions differ.
    """
    if a.data.shape[1] != b.data.shape[1]:
        raise ValueError(
            f"nvfp4_mm got data of shapes {tuple(a.data.shape)} and {tuple(b.data.shape)}; the last dimensions are "
            "contracted and must be equal."
        )
    return torch.ops.aotrain.nvfp4_mm(*a, *b, out_dtype, emulate)


def native_nvfp4_problem(device: torch.device) -> str | None:
    """Why this device does not multiply NVFP4 natively; None where it does. Asks a GPU by a small product, once."""
    if device.type != "cuda":
        return f"{device.type} has no NVFP4 products"
    return _probe(device.index if device.index is not None else torch.cuda.current_device())


@functools.lru_cache(maxsize=64)
def _probe(index: int) -> str | None:
    device, name = torch.device("cuda", index), torch.cuda.get_device_name(index)
    lhs, rhs = _probe_operand(40, device), _probe_operand(24, device)
    want = _emulated(*lhs, *rhs, torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        try:
            got = _native(*lhs, *rhs, dtype).float()
        except (RuntimeError, ValueError, NotImplementedError) as error:  # which one depends on the torch release
            return f"{name} does not run torch's NVFP4 product: {str(error).strip().splitlines()[0]}"
        if not bool((got - want).norm() <= 0.01 * want.norm()):
            return f"{name} gives a wrong result for an NVFP4 product with {dtype} output"
    return None


def _probe_operand(rows: int, device: torch.device) -> Nvfp4Operand:
    """[rows, 96] in which every row, block and half of a byte has another value, so that any mistaken order shows."""
    at = torch.arange(rows * 48, device=device)
    data = ((at * 37 + at // 48 * 11) % 256).to(torch.uint8).view(rows, 48)
    scale = (0x28 + torch.arange(rows * 6, device=device) * 29 % 40).to(torch.uint8).view(rows, 6)
    level = torch.full((1, 1), 0.75, device=device)
    return Nvfp4Operand(data, scale.view(torch.float8_e4m3fn), level)


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
    if a.is_cuda and not emulate:
        problem = native_nvfp4_problem(a.device)
        if problem is None:
            return _native(a, a_scale, a_global, b, b_scale, b_global, out_dtype)
        warn_slow("nvfp4_mm", problem)
    return _emulated(a, a_scale, a_global, b, b_scale, b_global, out_dtype)


def _native(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_global: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_global: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Scales in tiles of 128 x 4; N padded to a multiple of 16, which does not change the number of tiles."""
    columns = b.shape[0]
    b = torch.nn.functional.pad(b, (0, 0, 0, -columns % 16))
    scales = [scale if scale.dim() == 1 else to_blocked(scale) for scale in (a_scale, b_scale)]
    kinds, orders = torch.nn.functional.ScalingType, torch.nn.functional.SwizzleType
    levels, swizzles = [kinds.BlockWise1x16, kinds.TensorWise], [orders.SWIZZLE_32_4_4, orders.NO_SWIZZLE]
    output = torch.nn.functional.scaled_mm(
        a.view(torch.float4_e2m1fn_x2),
        b.view(torch.float4_e2m1fn_x2).t(),
        [scales[0], a_global.view(1)],
        levels,
        [scales[1], b_global.view(1)],
        levels,
        swizzle_a=swizzles,
        swizzle_b=swizzles,
        output_dtype=torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32,
    )
    if output.shape[1] != columns:
        output = output.narrow(1, 0, columns).clone(memory_format=torch.contiguous_format)
    return output.to(out_dtype)


def _emulated(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_global: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_global: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
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
