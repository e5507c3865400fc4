"""Forward and backward of one NVFP4 linear layer beside bfloat16, timed in turns.

Without hardware that multiplies NVFP4 the products are emulated, so a ratio above 1 to bfloat16 is the price of
training there with NVFP4 numerics.
"""

from collections.abc import Iterator

import torch

from aotrain.nn import NVFP4Linear, NVFP4TrainingConfig
from aotrain.ops import Nvfp4Recipe
from aotrain.testing import sqnr
from benchmarks.case import Case
from benchmarks.float8 import CPU_SHAPES, GPU_SHAPES

LAYERS = {
    "paper": NVFP4TrainingConfig(),
    "quantized-input": NVFP4TrainingConfig(save_for_backward="quantized"),
    "plain": NVFP4TrainingConfig(recipe=Nvfp4Recipe(hadamard=False, stochastic_rounding=False)),
}
# Of output, grad_input and grad_weight; tests/ops/test_nvfp4_linear.py has the thresholds of each.
_MIN_SQNR_DB = 14.0


def nvfp4_cases(device: torch.device) -> Iterator[Case]:
    """Every layer on every shape; those of a shape have the same operands and are timed in turns."""
    for tokens, k, n in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        options = {"device": device, "dtype": torch.bfloat16}
        linear = torch.nn.Linear(k, n, bias=False, **options)
        x = torch.randn(tokens, k, requires_grad=True, **options)
        grad = torch.randn(tokens, n, **options)
        yield _case("bf16", linear, x, grad)
        for name, config in LAYERS.items():
            yield _case(name, NVFP4Linear.from_float(linear, config), x, grad)


def _case(name: str, layer: torch.nn.Linear, x: torch.Tensor, grad: torch.Tensor) -> Case:
    weight = layer.weight

    def run() -> tuple[torch.Tensor, ...]:
        y = layer(x)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))

    def check() -> None:
        exact = (x.float() @ weight.float().t(), grad.float() @ weight.float(), grad.float().t() @ x.float())
        got = [float(sqnr(want.detach(), value)) for want, value in zip(exact, run(), strict=True)]
        assert min(got) >= _MIN_SQNR_DB, f"SQNR {got} dB, want {_MIN_SQNR_DB}"

    (tokens, k), n = x.shape, weight.shape[0]
    shape = f"{tokens}x{k}x{n}"
    return Case(
        name=f"nvfp4-{name}",
        shape=shape,
        run=run,
        check=check,
        # Each operand is read and each result written once.
        bytes_moved=2 * 2 * (tokens * k + n * k + tokens * n),
        flops=3 * 2 * tokens * k * n,
        group=shape,
    )
