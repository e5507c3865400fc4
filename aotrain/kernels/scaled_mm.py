"""scaled_mm: the matrix product of two quantized operands.

`output[M,N] = (a.data * a.scale)[M,K] @ (b.data * b.scale)[N,K].T`, accumulated in float32 (int8: in int32). Both
operands have the contracted dimension last ("nt" layout), so a scale block of (1, -1) is always "one scale per row".

Backends that give the same result up to the order of accumulation:

- **native**: `torch._scaled_mm` or `torch.nn.functional.scaled_mm` on hardware with float8 matrix units, and
  `torch._int_mm`, on CPUs too. What they cannot take is padded with zeros and the result is cut back: a pass over the
  operand, which one that was cast with `operand_multiples` does not need.
- **emulated**: float8 codes are exact in bfloat16, so a plain bfloat16 (or float32) product of the codes, scaled
  afterwards, is the same sum; with scales along K that are powers of two, so is a product of the dequantized operands.
  No rounded copy of an operand is made. On CPU, what surrounds the product is C++ (`_mm_cpu`).
"""

import functools

import torch

from aotrain.formats import (
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    ROWWISE,
    TENSORWISE,
    ScaledTensor,
    is_mx,
)
from aotrain.formats.scaling import Block
from aotrain.kernels._library import LIBRARY
from aotrain.kernels._mm_cpu import decode_elements, dequantize_blocks, scale_product
from aotrain.kernels._padding import Multiples, native_multiples, padded_shape, zero_pad
from aotrain.kernels.mx_mm import mx_mm

# 127 * 127 * 2^17 < 2^31: longer sums of int8 products could overflow.
_INT32_TERMS = 2**17

_ROW_BLOCKS = (TENSORWISE, ROWWISE)
_K_BLOCKS = (BLOCKWISE_1X128, BLOCKWISE_128X128)

LIBRARY.define(
    "scaled_mm(Tensor a, Tensor a_scale, int[2] a_block, Tensor b, Tensor b_scale, int[2] b_block, bool power_of_two,"
    " ScalarType out_dtype, bool fast_accum, bool emulate) -> Tensor"
)


def scaled_mm(
    a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype, *, fast_accum: bool = False, emulate: bool = False
) -> torch.Tensor:
    """`output[M,N] = a[M,K] @ b[N,K].T` of quantized operands.

    Args:
        a: [M, K] float8 data with scale [1, 1] (tensorwise), [M, 1] (rowwise) or [M, ceil(K / 128)] (1x128); or int8
            data, tensorwise or rowwise; or both operands are MX (`mx_mm`).
        b: [N, K] likewise, or with scale [ceil(N / 128), ceil(K / 128)] (128x128).
        out_dtype: float32, bfloat16 or float16.
        fast_accum: let the hardware accumulate in reduced precision; ignored when emulated.
        emulate: use the emulated backend even where a native one exists. float8 on CPU is always emulated.

    Raises:
        ValueError: an operand's scale blocks are none of these, or do not go together, or the contracted dimensions
            differ.
        RuntimeError: the GPU has no float8 matrix product and `emulate` is off.
    """
    if is_mx(a.scaling) or is_mx(b.scaling):
        return mx_mm(a, b, out_dtype, emulate=emulate)
    _check(a, b)
    power_of_two = a.scaling.scale.power_of_two and b.scaling.scale.power_of_two
    return torch.ops.aotrain.scaled_mm(
        *(a.data, a.scale, a.scaling.block, b.data, b.scale, b.scaling.block),
        *(power_of_two, out_dtype, fast_accum, emulate),
    )


def with_equal_depths(a: ScaledTensor, b: ScaledTensor) -> tuple[ScaledTensor, ScaledTensor]:
    """The operands [M, K] and [N, K] of a product, the one with fewer columns zero-padded to those of the other.

    For one that was cast with `operand_multiples` and one that was not: the columns differ by padding only, which adds
    no scales.
    """
    columns = a.data.shape[1], b.data.shape[1]
    if columns[0] == columns[1]:
        return a, b
    depth = max(columns)
    a, b = (ScaledTensor(zero_pad(q.data, (q.data.shape[0], depth)), q.scale, q.scaling) for q in (a, b))
    return a, b


def _check(a: ScaledTensor, b: ScaledTensor) -> None:
    for name, operand in (("a", a), ("b", b)):
        block = operand.scaling.block
        if operand.scaling.element.stored_as_codes:
            raise ValueError(
                f"scaled_mm operand {name} is {operand.scaling.element.name}; want float8 or int8. Multiply what "
                "`dequantize` returns."
            )
        if block not in (*_ROW_BLOCKS, *_K_BLOCKS) or (block in _K_BLOCKS and operand.data.dtype == torch.int8):
            raise ValueError(
                f"scaled_mm operand {name} is {operand.data.dtype} with scale blocks {block}; want tensorwise "
                f"{TENSORWISE}, rowwise {ROWWISE} or, for float8, {BLOCKWISE_1X128} or {BLOCKWISE_128X128}. Quantize "
                "it with one of these blocks."
            )
    if (a.data.dtype == torch.int8) != (b.data.dtype == torch.int8):
        raise ValueError(f"scaled_mm got {a.data.dtype} and {b.data.dtype}; int8 goes with int8 only.")
    blocks = a.scaling.block, b.scaling.block
    if (blocks[0] in _K_BLOCKS) != (blocks[1] in _K_BLOCKS) or blocks[0] == BLOCKWISE_128X128:
        raise ValueError(
            f"scaled_mm got scale blocks {blocks[0]} and {blocks[1]}; blocks along the contracted dimension go with "
            f"each other only, {BLOCKWISE_1X128} on the left."
        )
    if a.data.shape[-1] != b.data.shape[-1]:
        raise ValueError(
            f"scaled_mm got a of shape {tuple(a.data.shape)} and b of shape {tuple(b.data.shape)}; the last dimensions "
            "are contracted and must be equal."
        )


def native_scaled_mm_problem(device: torch.device, block: Block) -> str | None:
    """Why this device cannot run float8 products with such scales natively; None when it can or is not a GPU."""
    if device.type != "cuda":
        return None
    return _cuda_problem(device.index if device.index is not None else torch.cuda.current_device(), block)


@functools.lru_cache(maxsize=64)
def _cuda_problem(index: int, block: Block) -> str | None:
    gfx = torch.cuda.get_device_properties(index).gcnArchName if torch.version.hip is not None else ""
    return float8_problem(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), gfx, block)


def float8_problem(name: str, capability: tuple[int, int], gfx: str, block: Block) -> str | None:
    """Why a GPU cannot run float8 products with such scales natively; None when it can.

    Args:
        name: of the GPU, for the message.
        capability: CUDA compute capability; any for AMD.
        gfx: AMD architecture, empty for NVIDIA.
        block: scale block of the operands.
    """
    if gfx:
        if block in _ROW_BLOCKS and "gfx94" in gfx:
            return None
        return f"{name} is not an MI300-class GPU" if block in _ROW_BLOCKS else f"{name} has none for blocks of {block}"
    if block in _K_BLOCKS:
        # cuBLAS has them for Hopper only.
        return None if capability == (9, 0) else f"{name} has no product with a scale per 128 elements, Hopper has"
    # Ada has tensorwise float8; row scales need Hopper's kernels.
    need = (8, 9) if block == TENSORWISE else (9, 0)
    if capability >= need:
        return None
    return f"{name} has compute capability {capability[0]}.{capability[1]}, float8 needs {need[0]}.{need[1]}"


def _runs_natively(device: torch.device, block: Block) -> bool:
    """Whether to use the device's float8 units; a GPU without them is an error rather than a silent slow path."""
    problem = native_scaled_mm_problem(device, block)
    if problem is not None:
        raise RuntimeError(
            f"float8 matrix product: {problem}. Set emulate=True to run it in bfloat16 arithmetic with float8 numerics "
            "(no speed-up), train with recipe int8_rowwise, or in bfloat16 on this GPU."
        )
    return device.type == "cuda"


def _emulated(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    # A float16 output needs the product in a wider range: sums of unscaled codes exceed 65504.
    mm_dtype = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    product = decode_elements(a, mm_dtype) @ decode_elements(b, mm_dtype).t()
    return scale_product(product, a_scale, b_scale, out_dtype)


def _emulated_blocks(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_block: Block,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_block: Block,
    power_of_two: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    # A code of 4 bits times a power of two is exact in bfloat16; times any other scale it needs float32.
    mm_dtype = torch.bfloat16 if out_dtype == torch.bfloat16 and power_of_two else torch.float32
    lhs, rhs = (
        dequantize_blocks(data, scale, block, mm_dtype)
        for data, scale, block in ((a, a_scale, a_block), (b, b_scale, b_block))
    )
    return (lhs @ rhs.t()).to(out_dtype)


def _int8(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    rows, columns = a.shape[0], b.shape[0]
    if a.is_cuda:
        a = _pad(a, native_multiples(rows, True, ROWWISE, "lhs"))
        b = _pad(b, native_multiples(columns, True, ROWWISE, "rhs"))
    product: torch.Tensor | None = None
    for start in range(0, a.shape[1], _INT32_TERMS):
        terms = min(_INT32_TERMS, a.shape[1] - start)
        part = torch._int_mm(a.narrow(1, start, terms), b.narrow(1, start, terms).t())
        product = part if product is None else product.float() + part
    assert product is not None
    return scale_product(product.narrow(0, 0, rows).narrow(1, 0, columns), a_scale, b_scale, out_dtype)


def _native(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> torch.Tensor:
    rows, columns = a.shape[0], b.shape[0]
    rowwise = a_scale.numel() > 1 or b_scale.numel() > 1
    if rowwise:  # both operands must then be rowwise
        a_scale = a_scale if a_scale.shape[0] == rows else a_scale.repeat(rows, 1)
        b_scale = b_scale if b_scale.shape[0] == columns else b_scale.repeat(columns, 1)
    a = _pad(a, native_multiples(rows, False, ROWWISE, "lhs"))
    b = _pad(b, native_multiples(columns, False, ROWWISE, "rhs"))
    if rowwise:
        b_scale = torch.nn.functional.pad(b_scale, (0, 0, 0, b.shape[0] - columns), value=1.0)
    # Row-scaled kernels only write bfloat16.
    mm_dtype = torch.bfloat16 if rowwise else out_dtype
    output = torch._scaled_mm(
        a,
        b.t(),
        scale_a=a_scale,
        scale_b=b_scale.t(),
        out_dtype=mm_dtype,
        use_fast_accum=fast_accum,
    )
    if output.shape[1] != columns:
        output = output.narrow(1, 0, columns).clone(memory_format=torch.contiguous_format)
    return output.to(out_dtype)


def _native_blocks(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_block: Block,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Scales per 128 elements along K, with K, M and N padded to what cuBLASLt takes; bfloat16 or float32 output."""
    rows, columns = a.shape[0], b.shape[0]
    square = b_block == BLOCKWISE_128X128
    a = _pad(a, native_multiples(rows, False, BLOCKWISE_1X128, "lhs"))
    b = _pad(b, native_multiples(columns, False, b_block, "rhs"))
    a_scale = _by_columns(a_scale, a.shape[0])
    if square:  # down its columns: [ceil(K / 128) padded to 4, N / 128]
        b_scale = torch.nn.functional.pad(b_scale, (0, -b_scale.shape[1] % 4), value=1.0).t()
    else:
        b_scale = _by_columns(b_scale, b.shape[0])
    kinds = torch.nn.functional.ScalingType
    mm_dtype = torch.float32 if out_dtype == torch.float32 else torch.bfloat16
    output = torch.nn.functional.scaled_mm(
        a,
        b.t(),
        a_scale,
        kinds.BlockWise1x128,
        b_scale,
        kinds.BlockWise128x128 if square else kinds.BlockWise1x128,
        output_dtype=mm_dtype,
    )
    if output.shape != (rows, columns):
        output = output.narrow(0, 0, rows).narrow(1, 0, columns).clone(memory_format=torch.contiguous_format)
    return output.to(out_dtype)


def _by_columns(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """Row scales [R, C] padded to `rows` rows, in column-major memory."""
    padded = torch.nn.functional.pad(scale, (0, 0, 0, rows - scale.shape[0]), value=1.0)
    return padded.t().clone(memory_format=torch.contiguous_format).t()


def _pad(data: torch.Tensor, multiples: Multiples) -> torch.Tensor:
    """Zero-pad [R, C] 8-bit data up to multiples; an operand that was cast with them stays as it is."""
    return zero_pad(data, padded_shape(data.shape, multiples))


def _scaled_mm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_block: Block,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_block: Block,
    power_of_two: bool,
    out_dtype: torch.dtype,
    fast_accum: bool,
    emulate: bool,
) -> torch.Tensor:
    if min(a.shape[0], a.shape[1], b.shape[0]) == 0:
        return a.new_zeros((a.shape[0], b.shape[0]), dtype=out_dtype)
    a_block, b_block = (a_block[0], a_block[1]), (b_block[0], b_block[1])
    if a.dtype == torch.int8:
        if emulate:
            return _emulated(a, a_scale, b, b_scale, torch.float32).to(out_dtype)
        return _int8(a, a_scale, b, b_scale, out_dtype)
    if a_block in _K_BLOCKS:
        if emulate or not _runs_natively(a.device, a_block):
            return _emulated_blocks(a, a_scale, a_block, b, b_scale, b_block, power_of_two, out_dtype)
        return _native_blocks(a, a_scale, b, b_scale, b_block, out_dtype)
    rowwise = a_scale.numel() > 1 or b_scale.numel() > 1
    if emulate or not _runs_natively(a.device, ROWWISE if rowwise else TENSORWISE):
        return _emulated(a, a_scale, b, b_scale, out_dtype)
    return _native(a, a_scale, b, b_scale, out_dtype, fast_accum)


def _fake(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_block: Block,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_block: Block,
    power_of_two: bool,
    out_dtype: torch.dtype,
    fast_accum: bool,
    emulate: bool,
) -> torch.Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


LIBRARY.impl("scaled_mm", _scaled_mm, "CompositeExplicitAutograd")
torch.library.register_fake("aotrain::scaled_mm", _fake, lib=LIBRARY)
