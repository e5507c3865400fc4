"""What can be measured: one entry per benchmark, each yielding cases with inputs, a check and a count of bytes.

A case is only timed after its check has passed on the device at hand.
"""

import math
from collections.abc import Callable, Iterator

import torch

from aotrain.formats import (
    BLOCKWISE_1X32,
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    FLOAT8_E4M3,
    INT8,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    ScaledTensor,
    Scaling,
    quantize,
    scale_shape,
)
from aotrain.kernels import _mx_cuda, scaled_cast, scaled_cast_both
from aotrain.testing import assert_bitwise_equal
from benchmarks.case import Case
from benchmarks.float8 import float8_cases
from benchmarks.moe import moe_cases
from benchmarks.nvfp4 import nvfp4_cases
from benchmarks.optim import optim_cases
from benchmarks.qat import qat_cases
from benchmarks.routing import routing_cases

# The scalings of the recipes, from which each cast of their linear layers is made.
CASTS: dict[str, Scaling] = {
    "tensorwise": Scaling(element=FLOAT8_E4M3, block=TENSORWISE),
    "rowwise": Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["float32_pow2"], block=ROWWISE),
    "1x128": Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["float32_pow2"], block=BLOCKWISE_1X128),
    "128x128": Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["float32_pow2"], block=BLOCKWISE_128X128),
    "mxfp8": Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["e8m0_rceil"], block=BLOCKWISE_1X32),
    "int8-rowwise": Scaling(element=INT8, block=ROWWISE),
}
# Rows x columns of activations and weights: Llama 3 8B and 70B at 16k tokens. A CPU gets the same aspect at less cost.
GPU_SHAPES = ((16384, 4096), (16384, 14336), (14336, 4096), (16384, 8192), (16384, 28672), (28672, 8192))
CPU_SHAPES = ((2048, 1024), (2048, 4096))


def scaled_cast_cases(device: torch.device) -> Iterator[Case]:
    """Every cast of a linear layer in each recipe, of a bfloat16 matrix, beside torch's copy of as many bytes.

    "-of-t" is the cast of the transposition of a row-major matrix, "-both" that of the matrix and its transposition.
    The bytes are those that a perfect implementation moves: of 16-bit elements two per read, and a second read where a
    scale depends on more than one program can hold.
    """
    for rows, columns in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        x = torch.randn(rows, columns, device=device).bfloat16()
        for name, scaling in CASTS.items():
            yield _cast_case(name, x, scaling, None)
            yield _cast_case(f"{name}-of-t", x, None, scaling)
            yield _cast_case(f"{name}-both", x, scaling, scaling)
        mx = CASTS["mxfp8"]
        if _mx_cuda.problem(x, mx.element.name, "rceil") is None:
            for way, scaling, scaling_t in (("", mx, None), ("-of-t", None, mx), ("-both", mx, mx)):
                yield _cast_case(f"mxfp8-cuda{way}", x, scaling, scaling_t, _cuda_casts)
        yield _copy(x)


def _casts(x: torch.Tensor, scaling: Scaling | None, scaling_t: Scaling | None) -> tuple[ScaledTensor, ...]:
    if scaling is not None and scaling_t is not None:
        return scaled_cast_both(x, scaling, scaling_t)
    return (scaled_cast(x, scaling) if scaling is not None else scaled_cast(x.t(), scaling_t),)


def _cuda_casts(x: torch.Tensor, scaling: Scaling | None, scaling_t: Scaling | None) -> tuple[ScaledTensor, ...]:
    """The CUDA C++ kernel, which no op uses until it has been measured beside Triton's."""
    wanted = [(s, block) for s, block in ((scaling, (1, 32)), (scaling_t, (32, 1))) if s is not None]
    blocks = [block for _, block in wanted]
    results = _mx_cuda.mx_cast_cuda(x, wanted[0][0].element.name, "rceil", *blocks, blocked=False)
    return tuple(ScaledTensor(*results[2 * i : 2 * i + 2], s) for i, (s, _) in enumerate(wanted))


def _cast_case(
    name: str,
    x: torch.Tensor,
    scaling: Scaling | None,
    scaling_t: Scaling | None,
    casts: Callable[..., tuple[ScaledTensor, ...]] = _casts,
) -> Case:
    """The cast of x, of its transposition, or of both."""

    def run() -> tuple[ScaledTensor, ...]:
        return casts(x, scaling, scaling_t)

    wanted = [(operand, s) for operand, s in ((x, scaling), (x.t(), scaling_t)) if s is not None]

    def check() -> None:
        # By the definition on the same device: on a CPU the largest shape would take a minute per case.
        for got, (operand, s) in zip(run(), wanted, strict=True):
            want = quantize(operand.contiguous(), s)
            assert_bitwise_equal(got.data, want.data)
            assert_bitwise_equal(got.scale, want.scale)

    # Rows as they lie in memory fit a program; tensors, columns, and rows of a transposition do not.
    one_read = all(s.block in (BLOCKWISE_1X32, BLOCKWISE_1X128, BLOCKWISE_128X128) for _, s in wanted) or (
        scaling_t is None and scaling is not None and scaling.block == ROWWISE
    )
    moved = x.numel() * ((2 if one_read else 4) + len(wanted))
    moved += sum(s.scale.dtype.itemsize * math.prod(scale_shape(operand.shape, s.block)) for operand, s in wanted)
    shape = f"{x.shape[0]}x{x.shape[1]}"
    return Case(name=f"scaled_cast-{name}", shape=shape, run=run, check=check, bytes_moved=moved)


def _copy(x: torch.Tensor) -> Case:
    """The bandwidth ceiling: one read and one write of x."""
    target = torch.empty_like(x)

    def check() -> None:
        target.copy_(x)
        assert_bitwise_equal(target, x)

    shape = f"{x.shape[0]}x{x.shape[1]}"
    return Case(name="copy", shape=shape, run=lambda: target.copy_(x), check=check, bytes_moved=4 * x.numel())


BENCHMARKS: dict[str, Callable[[torch.device], Iterator[Case]]] = {
    "scaled_cast": scaled_cast_cases,
    "float8": float8_cases,
    "moe": moe_cases,
    "nvfp4": nvfp4_cases,
    "optim": optim_cases,
    "qat": qat_cases,
    "routing": routing_cases,
}
