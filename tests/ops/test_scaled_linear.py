"""scaled_linear: each of the three products against the product of dequantized operands, and its edges."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from aotrain.formats import dequantize, is_mx, quantize, quantize_mx
from aotrain.ops import scaled_linear
from aotrain.ops.scaled_linear import SAVE_FOR_BACKWARD
from aotrain.recipes import RECIPES, LinearRecipe
from aotrain.testing import adversarial_matrix, assert_bitwise_equal, sqnr

# Against the high-precision layer on normal data, dB: (output, grad_input, grad_weight). The lowest of ten seeds of the
# shapes below, rounded down; e5m2 gradients have 2 mantissa bits, gw_hp's weight gradient only the input dtype's error.
SQNR_DB = {
    "float8_tensorwise": (24.0, 20.0, 20.0),
    "float8_rowwise": (24.0, 23.0, 23.0),
    "float8_rowwise_with_gw_hp": (24.0, 23.0, 45.0),
    "float8_blockwise": (27.0, 28.0, 27.0),
    "int8_rowwise": (40.0, 40.0, 41.0),
    "mxfp8": (27.0, 28.0, 27.0),
    "mxfp8_gw_hp": (27.0, 28.0, 45.0),
    "mxfp4": (14.0, 13.0, 13.0),
}
SHAPES = [(64, 128, 96), (37, 100, 65), (16, 48, 33)]


def operands(m: int, k: int, n: int, dtype: torch.dtype = torch.bfloat16):
    x = torch.randn(m, k).to(dtype).requires_grad_()
    w = (torch.randn(n, k) * k**-0.5).to(dtype).requires_grad_()
    return x, w, torch.randn(m, n).to(dtype)


def run(x, w, bias, grad, recipe):
    y = scaled_linear(x, w, bias, recipe)
    leaves = [leaf for leaf in (x, w, bias) if leaf is not None and leaf.requires_grad]
    return y, torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_error_against_high_precision(name: str, shape):
    x, w, grad = operands(*shape)
    y, (grad_input, grad_weight) = run(x, w, None, grad, RECIPES[name])
    exact = [grad.double() @ w.double(), grad.double().t() @ x.double()]
    got = [sqnr(x.double() @ w.double().t(), y), sqnr(exact[0], grad_input), sqnr(exact[1], grad_weight)]
    assert all(value >= bar for value, bar in zip(got, SQNR_DB[name], strict=True)), got
    assert (y.dtype, grad_input.dtype, grad_weight.dtype) == (torch.bfloat16,) * 3


@pytest.mark.parametrize("name", RECIPES)
def test_each_product_is_that_of_its_quantized_operands(name: str):
    """Independent of the error: the operands are cast in the recipe's formats, along the contracted dimension."""
    x, w, grad = operands(37, 100, 65, torch.float32)
    y, grads = run(x, w, None, grad, RECIPES[name])
    recipe = RECIPES[name]
    products = [(y, recipe.output, x, w), (grads[0], recipe.grad_input, grad, w.t())]
    products.append((grads[1], recipe.grad_weight, grad.t(), x.t()))
    for got, gemm, lhs, rhs in products:
        if gemm.quantized:
            lhs, rhs = (
                dequantize((quantize_mx if is_mx(s) else quantize)(op.detach().contiguous(), s))
                for op, s in ((lhs, gemm.lhs), (rhs, gemm.rhs))
            )
        assert sqnr(lhs.double() @ rhs.double().t(), got) > 110


def test_a_recipe_without_formats_is_a_plain_linear_layer():
    x, w, grad = operands(8, 32, 16)
    y, grads = run(x, w, None, grad, LinearRecipe())
    plain = F.linear(x, w)
    assert_bitwise_equal(y, plain)
    for got, want in zip(grads, torch.autograd.grad(plain, (x, w), grad), strict=True):
        assert_bitwise_equal(got, want)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(0, 32, 16), (1, 1, 1), (1, 17, 5), (3, 16, 1)], ids=str)
def test_awkward_and_empty_shapes(name: str, shape):
    m, k, n = shape
    x, w, grad = operands(m, k, n)
    bias = torch.zeros(n, dtype=torch.bfloat16, requires_grad=True)
    y, grads = run(x, w, bias, grad, RECIPES[name])
    assert y.shape == (m, n)
    assert [g.shape for g in grads] == [x.shape, w.shape, bias.shape]
    assert all(bool(g.isfinite().all()) for g in grads)
    if m == 0:
        assert not grads[1].any()


@pytest.mark.parametrize("name", RECIPES)
def test_leading_dimensions_strides_and_bias(name: str):
    recipe = RECIPES[name]
    x, w, _ = operands(30, 48, 32)
    bias = torch.randn(32, dtype=torch.bfloat16, requires_grad=True)
    flat, flat_grads = run(x, w, bias, torch.ones(30, 32, dtype=torch.bfloat16), recipe)
    deep = x.detach().view(2, 3, 5, 48).requires_grad_()
    y, grads = run(deep, w, bias, torch.ones(2, 3, 5, 32, dtype=torch.bfloat16), recipe)
    assert_bitwise_equal(y.reshape(30, 32), flat)
    for got, want in zip(grads, flat_grads, strict=True):
        assert_bitwise_equal(got.reshape(want.shape), want)
    strided = x.detach().t().contiguous().t().requires_grad_()
    assert_bitwise_equal(run(strided, w, bias, torch.ones(30, 32, dtype=torch.bfloat16), recipe)[0], flat)
    vector = scaled_linear(x[3], w, bias, recipe)
    assert vector.shape == (32,)


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_needed_gradients_are_computed(name: str, monkeypatch):
    # import_module: the package's attribute of this name is the function.
    module = import_module("aotrain.ops.scaled_linear")
    products = []
    original = module._product
    monkeypatch.setattr(module, "_product", lambda *args: products.append(args[2]) or original(*args))
    recipe = RECIPES[name]
    x, w, grad = operands(8, 32, 16)
    run(x.detach(), w, None, grad, recipe)
    assert products == [gemm for gemm in (recipe.output, recipe.grad_weight) if gemm.quantized]
    products.clear()
    run(x, w.detach(), None, grad, recipe)
    assert products == [gemm for gemm in (recipe.output, recipe.grad_input) if gemm.quantized]


def test_rows_of_very_different_scale_keep_their_accuracy_rowwise():
    x = adversarial_matrix(35, 64, torch.float32)
    w = torch.randn(32, 64)
    y = scaled_linear(x, w, None, RECIPES["float8_rowwise"])
    for row in range(35):
        want = x[row].double() @ w.double().t()
        if x[row].abs().amax() > 1e-10 and bool(want.float().isfinite().all()):
            assert sqnr(want, y[row]) > 20, row
    assert bool((y[x.abs().amax(1) == 0] == 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows_stay_visible_and_contained(bad: float):
    x, w, _ = operands(8, 32, 16)
    clean = scaled_linear(x, w, None, RECIPES["float8_rowwise"])
    poisoned = x.detach().clone()
    poisoned[2, 5] = bad
    y = scaled_linear(poisoned, w, None, RECIPES["float8_rowwise"])
    assert bool(y[2].isnan().all())
    keep = torch.arange(8) != 2
    assert_bitwise_equal(y[keep], clean[keep])
    assert bool(scaled_linear(poisoned, w, None, RECIPES["float8_tensorwise"]).isnan().all())


def test_autocast_casts_the_input_like_a_linear_layer():
    x, w, _ = operands(8, 32, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = scaled_linear(x, w, None, RECIPES["float8_rowwise"])
        y.sum().backward()
    assert y.dtype == F.linear(x.bfloat16(), w.bfloat16()).dtype
    assert w.grad is not None
    assert w.grad.dtype == torch.float32


def test_wrong_inner_dimension_says_what_is_wanted():
    with pytest.raises(ValueError, match="want the last dimension of x to be 32"):
        scaled_linear(torch.ones(4, 31), torch.ones(8, 32), None, RECIPES["float8_rowwise"])


@pytest.mark.parametrize("name", RECIPES)
def test_two_runs_are_bit_equal(name: str):
    x, w, grad = operands(37, 100, 65)
    first, second = (run(x, w, None, grad, RECIPES[name]) for _ in range(2))
    assert_bitwise_equal(first[0], second[0])
    for a, b in zip(first[1], second[1], strict=True):
        assert_bitwise_equal(a, b)


def saved_tensors(run_forward) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run_forward()
    return kept


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_kept_for_backward_changes_no_bit(name: str, shape):
    results = []
    for mode in SAVE_FOR_BACKWARD:
        torch.manual_seed(3)
        x, w, grad = operands(*shape)
        y = scaled_linear(x, w, None, RECIPES[name], save_for_backward=mode)
        results.append((y, *torch.autograd.grad(y, (x, w), grad)))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert_bitwise_equal(first, second)


@pytest.mark.parametrize("name", RECIPES)
def test_bytes_kept_for_backward(name: str):
    x, w, _ = operands(512, 1024, 256)

    def kept_of_x(mode: str, weight: torch.Tensor) -> int:
        tensors = saved_tensors(lambda: scaled_linear(x, weight, None, RECIPES[name], save_for_backward=mode))
        return sum(t.numel() * t.element_size() for t in tensors if t.data_ptr() != weight.data_ptr())

    assert kept_of_x("high_precision", w) == kept_of_x("recompute", w) == 2 * x.numel()
    # Scales: at most 4 bytes per 128 elements. A high-precision product needs the input as it is.
    codes = RECIPES[name].grad_weight.quantized
    assert kept_of_x("quantized", w) <= (1.04 if codes else 2) * x.numel()
    assert kept_of_x("quantized", w.detach()) == 0
    assert kept_of_x("high_precision", w.detach()) == kept_of_x("recompute", w.detach()) == 0


def test_unknown_choice_of_what_to_keep():
    x, w, _ = operands(4, 32, 8)
    with pytest.raises(
        ValueError, match="save_for_backward got 'fp8'; want one of 'high_precision', 'quantized', 'recompute'"
    ):
        scaled_linear(x, w, None, RECIPES["float8_rowwise"], save_for_backward="fp8")


def test_operands_that_both_products_need_are_read_once(monkeypatch):
    module = import_module("aotrain.ops.scaled_linear")
    casts = []

    def recording(name: str, original):
        return lambda x, *scalings, **pads: casts.append((name, tuple(x.shape))) or original(x, *scalings, **pads)

    for name in ("scaled_cast", "scaled_cast_both"):
        monkeypatch.setattr(module, name, recording(name, getattr(module, name)))
    x, w, grad = operands(6, 32, 16)
    weights = [("scaled_cast", (16, 32)), ("scaled_cast", (32, 16))]  # as it is and transposed: nothing keeps its codes
    for recipe in ("float8_tensorwise", "float8_rowwise", "float8_blockwise", "int8_rowwise"):
        kept = {"quantized": "scaled_cast_both", "high_precision": "scaled_cast", "recompute": "scaled_cast"}
        for mode, of_x in kept.items():
            casts.clear()
            y = scaled_linear(x, w, None, RECIPES[recipe], save_for_backward=mode)
            torch.autograd.grad(y, (x, w), grad)
            expected = [(of_x, (6, 32)), weights[0], ("scaled_cast_both", (6, 16)), weights[1]]
            assert casts == expected + ([("scaled_cast", (32, 6))] if mode != "quantized" else [])
    # The gradient of one operand only needs the output's gradient one way.
    for needed in ((x, w.detach()), (x.detach(), w)):
        casts.clear()
        y = scaled_linear(*needed, None, RECIPES["float8_rowwise"], save_for_backward="quantized")
        torch.autograd.grad(y, [t for t in needed if t.requires_grad], grad)
        assert [name for name, shape in casts if sorted(shape) == [6, 16]] == ["scaled_cast"]
