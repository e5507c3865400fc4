"""scaled_mm: the matrix product of two quantized operands.

`output[M,N] = (a.data * a.scale)[M,K] @ (b.data * b.scale)[N,K].T`, accumulated in float32. Both operands have the
contracted dimension last ("nt" layout), so a scale block of (1, -1) is always "one scale per row".

Two backends give the same result up to the order of accumulation:

- **native**: `torch._scaled_mm` on hardware with float8 matrix units. K and N that it cannot take are zero-padded to
  multiples of 16 and the result is cut back.
- **emulated**: the codes are exact in bfloat16, so a plain bfloat16 (or float32) product of the codes, scaled
  afterwards, is the same sum. No dequantized copy of an operand is rounded.
"""

import functools

import torch

from aotrain.formats import ROWWISE, TENSORWISE, ScaledTensor, decode_elements
from aotrain.kernels._library import LIBRARY

# What cuBLASLt demands of the leading dimensions of float8 operands.
NATIVE_ALIGNMENT = 16

LIBRARY.define(
    "scaled_mm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, ScalarType out_dtype, bool fast_accum, bool emulate)"
    " -> Tensor"
)


def scaled_mm(
    a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype, *, fast_accum: bool = False, emulate: bool = False
) -> torch.Tensor:
    """`output[M,N] = a[M,K] @ b[N,K].T` of quantized operands.

    Args:
        a: [M, K] float8 data, scale [1, 1] (tensorwise) or [M, 1] (rowwise).
        b: [N, K] float8 data, scale [1, 1] or [N, 1].
        out_dtype: float32, bfloat16 or float16.
        fast_accum: let the hardware accumulate in reduced precision; ignored when emulated.
        emulate: use the emulated backend even where a native one exists. CPU tensors are always emulated.

    Raises:
        ValueError: an operand's scale is neither tensorwise nor rowwise, or the contracted dimensions differ.
        RuntimeError: the GPU has no float8 matrix product and `emulate` is off.
    """
    for name, operand in (("a", a), ("b", b)):
        if operand.scaling.block not in (TENSORWISE, ROWWISE):
            raise ValueError(
                f"scaled_mm operand {name} has scale blocks {operand.scaling.block}; want tensorwise {TENSORWISE} or "
                f"rowwise {ROWWISE}. Quantize it with one of these blocks."
            )
    if a.data.shape[-1] != b.data.shape[-1]:
        raise ValueError(
            f"scaled_mm got a of shape {tuple(a.data.shape)} and b of shape {tuple(b.data.shape)}; the last dimensions "
            "are contracted and must be equal."
        )
    return torch.ops.aotrain.scaled_mm(a.data, a.scale, b.data, b.scale, out_dtype, fast_accum, emulate)


def native_scaled_mm_problem(device: torch.device, *, rowwise: bool) -> str | None:
    """Why this device cannot run float8 products natively; None when it can or when it is not a GPU."""
    if device.type != "cuda":
        return None
    return _cuda_problem(device.index if device.index is not None else torch.cuda.current_device(), rowwise)


@functools.lru_cache(maxsize=64)
def _cuda_problem(index: int, rowwise: bool) -> str | None:
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    if torch.version.hip is not None:
        if "gfx94" in torch.cuda.get_device_properties(index).gcnArchName:
            return None
        return f"{name} is not an MI300-class GPU"
    # Ada has tensorwise float8; row scales need Hopper's kernels.
    need = (9, 0) if rowwise else (8, 9)
    if capability >= need:
        return None
    return f"{name} has compute capability {capability[0]}.{capability[1]}, float8 needs {need[0]}.{need[1]}"


def _runs_natively(device: torch.device, rowwise: bool) -> bool:
    """Whether to use the device's float8 units; a GPU without them is an error rather than a silent slow path."""
    problem = native_scaled_mm_problem(device, rowwise=rowwise)
    if problem is not None:
        raise RuntimeError(
            f"float8 matrix product: {problem}. Set emulate=True to run it in bfloat16 arithmetic with float8 numerics "
            "(no speed-up), or train in bfloat16 on this GPU."
        )
    return device.type == "cuda"


def _emulated(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    # A float16 output needs the product in a wider range: sums of unscaled codes exceed 65504.
    mm_dtype = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    product = decode_elements(a, mm_dtype) @ decode_elements(b, mm_dtype).t()
    return (product.float() * a_scale * b_scale.t()).to(out_dtype)


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
    a, b = _pad(a, 0, NATIVE_ALIGNMENT), _pad(b, NATIVE_ALIGNMENT, NATIVE_ALIGNMENT)
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


def _pad(data: torch.Tensor, row_multiple: int, column_multiple: int) -> torch.Tensor:
    """Zero-pad [R, C] float8 data up to multiples; 0 leaves a dimension alone. Code 0 is zero in all float8 formats."""
    pad_rows = -data.shape[0] % row_multiple if row_multiple else 0
    pad_columns = -data.shape[1] % column_multiple if column_multiple else 0
    if not (pad_rows or pad_columns):
        return data
    return torch.nn.functional.pad(data.view(torch.uint8), (0, pad_columns, 0, pad_rows)).view(data.dtype)


def _scaled_mm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    emulate: bool,
) -> torch.Tensor:
    if min(a.shape[0], a.shape[1], b.shape[0]) == 0:
        return a.new_zeros((a.shape[0], b.shape[0]), dtype=out_dtype)
    rowwise = a_scale.numel() > 1 or b_scale.numel() > 1
    if emulate or not _runs_natively(a.device, rowwise):
        return _emulated(a, a_scale, b, b_scale, out_dtype)
    return _native(a, a_scale, b, b_scale, out_dtype, fast_accum)


def _fake(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    emulate: bool,
) -> torch.Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


LIBRARY.impl("scaled_mm", _scaled_mm, "CompositeExplicitAutograd")
torch.library.register_fake("aotrain::scaled_mm", _fake, lib=LIBRARY)
