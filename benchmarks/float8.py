"""Forward and backward of one float8 linear layer, ours beside bfloat16 and torchao, timed in turns.

On a CPU float8 is emulated, so a ratio above 1 to bfloat16 is the price of training there with float8 numerics.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator

import torch

from aotrain import Float8LinearConfig
from aotrain.nn import Float8Linear
from aotrain.testing import sqnr
from benchmarks.case import Case

PEER_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
RECIPES = (*PEER_RECIPES, "blockwise", "int8_rowwise")
# (tokens, K, N).
CPU_SHAPES = ((256, 1024, 1024), (1024, 1024, 4096), (512, 2048, 2048))
# Llama 3 8B and 70B at 16k tokens: query or output, key or value, and the three of the feed-forward.
GPU_SHAPES = (
    *((16384, 4096, 4096), (16384, 4096, 1024), (16384, 4096, 14336), (16384, 14336, 4096)),
    *((16384, 8192, 8192), (16384, 8192, 1024), (16384, 8192, 28672), (16384, 28672, 8192)),
)
# Of output, grad_input and grad_weight; the lowest recipe, tensorwise with e5m2 gradients, has 21 dB.
_MIN_SQNR_DB = 18.0

_Module = Callable[[torch.Tensor], torch.Tensor]


def float8_cases(device: torch.device) -> Iterator[Case]:
    """Every layer on every shape; those of a shape have the same operands and are timed in turns."""
    for tokens, k, n in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        options = {"device": device, "dtype": torch.bfloat16}
        linear = torch.nn.Linear(k, n, bias=False, **options)
        x = torch.randn(tokens, k, requires_grad=True, **options)
        grad = torch.randn(tokens, n, **options)
        for name, module in _layers(linear, device).items():
            yield _case(name, module, linear.weight, x, grad)


def _layers(linear: torch.nn.Linear, device: torch.device) -> dict[str, _Module]:
    """Name -> layer with the same weight. Compiled ones only on a GPU."""
    layers: dict[str, _Module] = {"bf16": linear}
    for recipe in RECIPES:
        # Every run stands for a training step, in which the weight is new.
        ours = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), cache_weight_casts=False)
        layers[f"aotrain-{recipe}"] = Float8Linear.from_float(linear, ours)
        if device.type == "cuda":
            layers[f"aotrain-{recipe}-compiled"] = torch.compile(layers[f"aotrain-{recipe}"])
    if importlib.util.find_spec("torchao"):
        from torchao.float8 import Float8LinearConfig as PeerConfig
        from torchao.float8.float8_linear import Float8Linear as PeerLinear

        for recipe in PEER_RECIPES:
            config = dataclasses.replace(PeerConfig.from_recipe_name(recipe), emulate=device.type != "cuda")
            layers[f"torchao-{recipe}"] = PeerLinear.from_float(linear, config)
            if device.type == "cuda":
                layers[f"torchao-{recipe}-compiled"] = torch.compile(layers[f"torchao-{recipe}"])
    return layers


def _case(name: str, module: _Module, weight: torch.nn.Parameter, x: torch.Tensor, grad: torch.Tensor) -> Case:
    def run() -> tuple[torch.Tensor, ...]:
        y = module(x)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))

    def check() -> None:
        exact = (x.float() @ weight.float().t(), grad.float() @ weight.float(), grad.float().t() @ x.float())
        got = [float(sqnr(want.detach(), value)) for want, value in zip(exact, run(), strict=True)]
        assert min(got) >= _MIN_SQNR_DB, f"SQNR {got} dB, want {_MIN_SQNR_DB}"

    (tokens, k), n = x.shape, weight.shape[0]
    shape = f"{tokens}x{k}x{n}"
    return Case(
        name=f"float8-{name}",
        shape=shape,
        run=run,
        check=check,
        # Each operand is read and each result written once.
        bytes_moved=2 * 2 * (tokens * k + n * k + tokens * n),
        flops=3 * 2 * tokens * k * n,
        group=shape,
    )
