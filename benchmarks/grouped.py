"""Forward and backward of all experts of one mixture-of-experts layer, ours beside torch._grouped_mm, timed in turns.

On a CPU float8 is emulated, so a ratio above 1 to bfloat16 is the price of training there with float8 numerics.
"""

from collections.abc import Callable, Iterator

import torch

from aotrain.ops import scaled_grouped_mm
from aotrain.recipes import RECIPES
from aotrain.testing import sqnr
from benchmarks.case import Case

GROUPED_RECIPES = ("float8_rowwise", "float8_rowwise_with_gw_hp", "float8_blockwise")
# (tokens, experts, K, N); experts get numbers of tokens as a router that is not balanced would give.
CPU_SHAPES = ((1024, 8, 1024, 1024), (2048, 16, 1024, 512))
# Gate or up projection: of DeepSeek-V3 on 8 GPUs, of Qwen3 30B-A3B, and of Llama 4 Scout, at 16k tokens per GPU.
GPU_SHAPES = ((131072, 32, 7168, 2048), (131072, 128, 2048, 768), (16384, 16, 5120, 8192))
# Of output, grad_input and grad_weight.
_MIN_SQNR_DB = 25.0

_Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def grouped_cases(device: torch.device) -> Iterator[Case]:
    """Every product on every shape; those of a shape have the same operands and are timed in turns."""
    for tokens, experts, k, n in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        options = {"device": device, "dtype": torch.bfloat16}
        x = torch.randn(tokens, k, requires_grad=True, **options)
        weight = torch.randn(experts, n, k, **options).mT.requires_grad_()
        grad = torch.randn(tokens, n, **options)
        offsets = _unbalanced(tokens, experts).to(device)
        for name, product in _products().items():
            yield _case(name, product, x, weight, grad, offsets)


def _products() -> dict[str, _Product]:
    """Name -> product of x, weight and offsets."""
    products: dict[str, _Product] = {"bf16": lambda x, weight, offsets: torch._grouped_mm(x, weight, offs=offsets)}
    for name in GROUPED_RECIPES:
        products[f"aotrain-{name.removeprefix('float8_')}"] = lambda x, weight, offsets, name=name: scaled_grouped_mm(
            x, weight, offsets, RECIPES[name]
        )
    return products


def _unbalanced(tokens: int, experts: int) -> torch.Tensor:
    """End offsets of groups whose sizes differ by about a factor of two; every token is in a group."""
    shares = torch.rand(experts, generator=torch.Generator().manual_seed(0)) + 0.5
    return (shares.cumsum(0) / shares.sum() * tokens).round().int()


def _case(
    name: str,
    product: _Product,
    x: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    offsets: torch.Tensor,
) -> Case:
    def run() -> tuple[torch.Tensor, ...]:
        y = product(x, weight, offsets)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))

    def check() -> None:
        rows = slice(0, int(offsets[0]))  # of the first expert
        exact = (
            x[rows].float() @ weight[0].float(),
            grad[rows].float() @ weight[0].float().t(),
            x[rows].float().t() @ grad[rows].float(),
        )
        y, grad_x, grad_weight = run()
        values = (y[rows], grad_x[rows], grad_weight[0])
        got = [float(sqnr(want.detach(), value)) for want, value in zip(exact, values, strict=True)]
        assert min(got) >= _MIN_SQNR_DB, f"SQNR {got} dB, want {_MIN_SQNR_DB}"

    (tokens, k), (experts, _, n) = x.shape, weight.shape
    shape = f"{tokens}x{k}x{n}-{experts}-experts"
    return Case(
        name=f"grouped-{name}",
        shape=shape,
        run=run,
        check=check,
        # Each operand is read and each result written once.
        bytes_moved=2 * 2 * (tokens * k + experts * n * k + tokens * n),
        flops=3 * 2 * tokens * k * n,
        group=shape,
    )
