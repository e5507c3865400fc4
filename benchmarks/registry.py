"""What can be measured: one entry per benchmark, each yielding cases with inputs, a check and a count of bytes.

A case is only timed after its check has passed on the device at hand.
"""

from collections.abc import Callable, Iterator

import torch

from aotrain.formats import quantize
from aotrain.kernels import scaled_cast
from aotrain.recipes import RECIPES
from aotrain.testing import assert_bitwise_equal
from benchmarks.case import Case
from benchmarks.float8 import float8_cases
from benchmarks.optim import optim_cases

# Rows x columns of activations and weights: Llama 3 8B and 70B at 16k tokens. A CPU gets the same aspect at less cost.
GPU_SHAPES = ((16384, 4096), (16384, 14336), (14336, 4096), (16384, 8192), (16384, 28672), (28672, 8192))
CPU_SHAPES = ((2048, 1024), (2048, 4096))


def scaled_cast_cases(device: torch.device) -> Iterator[Case]:
    """The rowwise cast of bfloat16, row-major and transposed, beside torch's copy of as many bytes."""
    scaling = RECIPES["float8_rowwise"].output.lhs
    assert scaling is not None
    for rows, columns in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        x = torch.randn(rows, columns, device=device).bfloat16()
        for label, operand in (("rowwise", x), ("rowwise-transposed", x.t())):

            def run(operand: torch.Tensor = operand) -> object:
                return scaled_cast(operand, scaling)

            def check(operand: torch.Tensor = operand) -> None:
                got, want = scaled_cast(operand, scaling), quantize(operand.cpu().contiguous(), scaling)
                assert_bitwise_equal(got.data.cpu(), want.data)
                assert_bitwise_equal(got.scale.cpu(), want.scale)

            moved = 3 * x.numel() + 4 * operand.shape[0]
            yield Case(name=f"scaled_cast-{label}", shape=f"{rows}x{columns}", run=run, check=check, bytes_moved=moved)
        yield _copy(x)


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
    "optim": optim_cases,
}
