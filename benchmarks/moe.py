"""Forward and backward of one grouped product of a mixture of experts, ours beside bfloat16 and torchao, in turns.

Shapes are (tokens, K, N, experts): x [tokens, K] sorted by expert times weights [experts, K, N]. The sizes of the
groups are uneven; they are multiples of 32, because torchao's products take no others. On a CPU low precision is
emulated, so a ratio above 1 to bfloat16 is the price of training there with its numerics.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch

from aotrain.ops import scaled_grouped_mm
from aotrain.recipes import RECIPES
from aotrain.testing import sqnr
from benchmarks.case import Case

MOE_RECIPES = ("float8_rowwise", "float8_rowwise_with_gw_hp", "float8_blockwise", "mxfp8", "mxfp8_gw_hp")
CPU_SHAPES = ((1024, 1024, 768, 8), (2048, 512, 1024, 4))
# Llama 4 Scout and DeepSeek-V3 at 128k tokens with 1 to 8 experts per GPU, then the small experts of a DeepSeek-V3 of
# 16 B and of Qwen3 30B-A3B.
GPU_SHAPES = (
    *((131072, 5120, 8192, experts) for experts in (8, 4, 2, 1)),
    *((131072, 7168, 2048, experts) for experts in (8, 4, 2, 1)),
    *((131072, 2048, 1408, 64), (131072, 2048, 768, 128)),
)
# Of output, grad_input and grad_weight.
_MIN_SQNR_DB = 22.0
_GROUP_MULTIPLE = 32

_Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def moe_cases(device: torch.device) -> Iterator[Case]:
    """Every product on every shape; those of a shape have the same operands and are timed in turns."""
    for tokens, k, n, experts in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        options = {"device": device, "dtype": torch.bfloat16}
        x = torch.randn(tokens, k, requires_grad=True, **options)
        parameter = torch.randn(experts, n, k, **options).mul_(k**-0.5).requires_grad_()
        grad = torch.randn(tokens, n, **options)
        offsets = uneven_offsets(tokens, experts, device)
        for name, product in _products(device).items():
            yield _case(name, product, x, parameter, grad, offsets)


def uneven_offsets(tokens: int, experts: int, device: torch.device) -> torch.Tensor:
    """End offsets, int32 [experts], of random groups that share all tokens in multiples of 32."""
    generator = torch.Generator().manual_seed(experts)
    units = tokens // _GROUP_MULTIPLE
    cuts = torch.randperm(units - 1, generator=generator)[: experts - 1].sort().values + 1
    return (torch.cat([cuts, torch.tensor([units])]) * _GROUP_MULTIPLE).to(device, torch.int32)


def _products(device: torch.device) -> dict[str, _Product]:
    products: dict[str, _Product] = {"bf16": lambda x, w, offsets: torch._grouped_mm(x, w, offs=offsets)}
    for name in MOE_RECIPES:
        products[f"aotrain-{name}"] = functools.partial(scaled_grouped_mm, recipe=RECIPES[name])
    if importlib.util.find_spec("torchao"):
        from torchao.prototype.moe_training.config import (
            Float8TrainingOpConfig,
            MXFP8TrainingOpConfig,
            MXFP8TrainingRecipe,
        )
        from torchao.prototype.moe_training.utils import _quantize_then_scaled_grouped_mm

        emulated = MXFP8TrainingOpConfig.from_recipe(MXFP8TrainingRecipe.MXFP8_EMULATED_RCEIL)
        # Its float8 products need a GPU, its native MX products a Blackwell one.
        peers = {"float8_rowwise": Float8TrainingOpConfig()} if device.type == "cuda" else {"mxfp8": emulated}
        for name, config in peers.items():
            products[f"torchao-{name}"] = lambda x, w, offsets, config=config: _quantize_then_scaled_grouped_mm(
                x, w, config=config, offs=offsets
            )
    return products


def _case(
    name: str,
    product: _Product,
    x: torch.Tensor,
    parameter: torch.Tensor,
    grad: torch.Tensor,
    offsets: torch.Tensor,
) -> Case:
    def run() -> tuple[torch.Tensor, ...]:
        y = product(x, parameter.mT, offsets)
        return (y.detach(), *torch.autograd.grad(y, (x, parameter), grad))

    def check() -> None:
        got = [float(sqnr(want, value)) for want, value in zip(_exact(x, parameter, grad, offsets), run(), strict=True)]
        assert min(got) >= _MIN_SQNR_DB, f"SQNR {got} dB, want {_MIN_SQNR_DB}"

    (tokens, k), (experts, n, _) = x.shape, parameter.shape
    shape = f"{tokens}x{k}x{n}x{experts}"
    return Case(
        name=f"moe-{name}",
        shape=shape,
        run=run,
        check=check,
        # Each operand is read and each result written once.
        bytes_moved=2 * 2 * (tokens * k + experts * n * k + tokens * n),
        flops=3 * 2 * tokens * k * n,
        group=shape,
    )


def _exact(
    x: torch.Tensor, parameter: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, grad_input and grad_weight in float32, group by group."""
    output = torch.empty_like(grad, dtype=torch.float32)
    grad_x = torch.empty_like(x, dtype=torch.float32)
    grad_w = torch.empty_like(parameter, dtype=torch.float32)
    start = 0
    for e, end in enumerate(offsets.tolist()):
        rows, g, w = x[start:end].detach().float(), grad[start:end].float(), parameter[e].detach().float()
        output[start:end], grad_x[start:end], grad_w[e] = rows @ w.t(), g @ w, g.t() @ rows
        start = end
    return output, grad_x, grad_w
