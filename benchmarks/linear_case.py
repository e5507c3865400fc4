"""Forward and backward of one linear layer: operands, the work, and what its results must be close to."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from aotrain.testing import sqnr
from benchmarks.case import Case

# (tokens, K, N).
CPU_SHAPES = ((256, 1024, 1024), (1024, 1024, 4096), (512, 2048, 2048))
# Llama 3 8B and 70B at 16k tokens: query or output, key or value, and the three of the feed-forward.
GPU_SHAPES = (
    *((16384, 4096, 4096), (16384, 4096, 1024), (16384, 4096, 14336), (16384, 14336, 4096)),
    *((16384, 8192, 8192), (16384, 8192, 1024), (16384, 8192, 28672), (16384, 28672, 8192)),
)

Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearOperands:
    """What every layer of a comparison multiplies.

    Attributes:
        linear: the bfloat16 layer [N, K], without bias.
        x: its input [tokens, K], which wants a gradient.
        grad: gradient of the output [tokens, N].
    """

    linear: torch.nn.Linear
    x: torch.Tensor
    grad: torch.Tensor

    @property
    def shape(self) -> str:
        """As results print it: tokens x K x N."""
        return f"{self.x.shape[0]}x{self.linear.in_features}x{self.linear.out_features}"


def linear_operands(device: torch.device) -> Iterator[LinearOperands]:
    """Normal bfloat16 operands of every shape of a device, one at a time."""
    for tokens, k, n in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        options = {"device": device, "dtype": torch.bfloat16}
        yield LinearOperands(
            linear=torch.nn.Linear(k, n, bias=False, **options),
            x=torch.randn(tokens, k, requires_grad=True, **options),
            grad=torch.randn(tokens, n, **options),
        )


def linear_case(name: str, layer: Layer, operands: LinearOperands, *, min_sqnr_db: float) -> Case:
    """Forward and both gradients of a layer with the operands' weight, timed in turns with others of their shape.

    Args:
        name: as results print it.
        layer: multiplies by `operands.linear.weight`, quantized in whatever way.
        operands: input, weight and gradient.
        min_sqnr_db: least signal to quantization noise ratio of output, grad_input and grad_weight.
    """
    x, weight, grad = operands.x, operands.linear.weight, operands.grad

    def run() -> tuple[torch.Tensor, ...]:
        y = layer(x)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))

    def check() -> None:
        exact = (x.float() @ weight.float().t(), grad.float() @ weight.float(), grad.float().t() @ x.float())
        got = [float(sqnr(want.detach(), value)) for want, value in zip(exact, run(), strict=True)]
        assert min(got) >= min_sqnr_db, f"SQNR {got} dB, want {min_sqnr_db}"

    (tokens, k), n = x.shape, weight.shape[0]
    return Case(
        name=name,
        shape=operands.shape,
        run=run,
        check=check,
        # Each operand is read and each result written once.
        bytes_moved=2 * 2 * (tokens * k + n * k + tokens * n),
        flops=3 * 2 * tokens * k * n,
        group=operands.shape,
    )
