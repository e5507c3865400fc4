"""The error of the MX recipes on normal data and with outliers, and that gradients of 4 bits have no bias."""

import pytest
import torch

from aotrain.ops import scaled_linear
from aotrain.recipes import RECIPES
from aotrain.testing import sqnr

M, K, N = 256, 384, 192
# (output, grad_input, grad_weight) against the high-precision layer, dB: the lowest of ten seeds, rounded down. With
# outliers, one column in 64 of x and one row in 64 of g is 30 times larger: channels and tokens that stand out.
SQNR_DB = {
    ("mxfp8", "normal"): (28.0, 28.0, 28.0),
    ("mxfp8_gw_hp", "normal"): (28.0, 28.0, 55.0),
    ("mxfp4", "normal"): (15.0, 13.5, 13.5),
    ("mxfp8", "outliers"): (28.0, 28.0, 27.0),
    ("mxfp8_gw_hp", "outliers"): (28.0, 28.0, 55.0),
    ("mxfp4", "outliers"): (14.0, 13.0, 13.0),
}


def operands(kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w, g = (torch.randn(shape, generator=generator) for shape in ((M, K), (N, K), (M, N)))
    if kind == "outliers":
        x[:, ::64] *= 30
        g[::64] *= 30
    return x.bfloat16().requires_grad_(), (w * K**-0.5).bfloat16().requires_grad_(), g.bfloat16()


def errors(recipe: str, kind: str, seed: int = 0) -> list[float]:
    x, w, g = operands(kind, seed)
    y = scaled_linear(x, w, None, RECIPES[recipe])
    grad_input, grad_weight = torch.autograd.grad(y, (x, w), g)
    exact = x.double() @ w.double().t(), g.double() @ w.double(), g.double().t() @ x.double()
    return [sqnr(want, got) for want, got in zip(exact, (y, grad_input, grad_weight), strict=True)]


@pytest.mark.parametrize(("recipe", "kind"), SQNR_DB, ids="-".join)
def test_error_of_the_three_products(recipe: str, kind: str):
    got = errors(recipe, kind)
    assert all(value >= bar for value, bar in zip(got, SQNR_DB[recipe, kind], strict=True)), got


def test_the_mean_of_gradients_of_4_bits_approaches_that_of_the_rounded_operands():
    """Stochastic rounding has no bias: over many gradients that differ by a bit, the error averages out."""
    generator = torch.Generator().manual_seed(0)
    w = torch.eye(32, requires_grad=True)  # exact in e2m1: what is left is the gradient's own rounding
    g = torch.randn(64, 32, generator=generator)
    x = torch.zeros(64, 32, requires_grad=True)
    draws, total = 256, torch.zeros(64, 32, dtype=torch.float64)
    for draw in range(draws):
        nudged = g.clone()
        nudged[0, 0] *= 1 + draw * 2.0**-23  # another key
        y = scaled_linear(x, w, None, RECIPES["mxfp4"])
        total += torch.autograd.grad(y, x, nudged)[0].double()
    one = sqnr(g.double(), torch.autograd.grad(scaled_linear(x, w, None, RECIPES["mxfp4"]), x, g)[0])
    mean = sqnr(g.double(), total / draws)
    assert mean > one + 20, (one, mean)  # 24 dB for 256 independent draws
