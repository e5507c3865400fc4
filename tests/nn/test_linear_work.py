"""The list of casts that a plan counts against those that a real forward and backward make."""

import importlib
from typing import Any

import pytest
import torch

from aotrain.formats import ScaledTensor, Scaling
from aotrain.nn.linear_work import Cast, linear_casts, linear_gemms
from aotrain.ops import scaled_linear
from aotrain.ops.scaled_linear import SAVE_FOR_BACKWARD
from aotrain.recipes import RECIPES

module = importlib.import_module("aotrain.ops.scaled_linear")
M, N, K = 48, 32, 16


class Recorder:
    """Stands in for what scaled_linear calls, and writes its calls down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.casts: list[Cast] = []
        self.products: list[tuple[int, int, int]] = []
        self._real = {name: getattr(module, name) for name in ("scaled_cast", "scaled_cast_both", "scaled_mm")}
        for name in self._real:
            monkeypatch.setattr(module, name, getattr(self, name))

    def scaled_cast(self, x: torch.Tensor, scaling: Scaling, **pads: Any) -> ScaledTensor:
        self.casts.append(Cast(*x.shape, scaling, not x.is_contiguous()))
        return self._real["scaled_cast"](x, scaling, **pads)

    def scaled_mm(self, a: ScaledTensor, b: ScaledTensor, *args: object, **options: object) -> torch.Tensor:
        self.products.append((a.data.shape[0], b.data.shape[0], a.data.shape[1]))
        return self._real["scaled_mm"](a, b, *args, **options)

    def scaled_cast_both(
        self, x: torch.Tensor, scaling: Scaling, scaling_t: Scaling, **pads: Any
    ) -> tuple[ScaledTensor, ...]:
        self.casts.append(Cast(*x.shape, scaling, not x.is_contiguous(), scaling_t))
        return self._real["scaled_cast_both"](x, scaling, scaling_t, **pads)


@pytest.mark.parametrize("save_for_backward", SAVE_FOR_BACKWARD)
@pytest.mark.parametrize("recipe", RECIPES)
def test_casts_and_products_are_those_of_scaled_linear(monkeypatch, recipe, save_for_backward):
    recorder = Recorder(monkeypatch)
    x = torch.randn(M, K, requires_grad=True)
    weight = torch.randn(N, K, requires_grad=True)
    output = scaled_linear(x, weight, None, RECIPES[recipe], save_for_backward=save_for_backward)
    output.backward(torch.randn(M, N))
    assert recorder.casts == list(linear_casts(M, N, K, RECIPES[recipe], save_for_backward))
    planned = []
    for gemm in linear_gemms(M, N, K, RECIPES[recipe]):
        if gemm.recipe.lhs is not None:
            whole = gemm.recipe.lhs.hadamard or 1  # a transform fills its last block
            planned.append((gemm.rows, gemm.columns, -(-gemm.contracted // whole) * whole))
    assert recorder.products == planned


def test_a_layer_in_high_precision_has_three_products():
    gemms = linear_gemms(M, N, K, None)
    assert [(g.rows, g.columns, g.contracted) for g in gemms] == [(M, N, K), (M, K, N), (N, K, M)]
    assert not any(g.recipe.quantized for g in gemms)
