"""scaled_grouped_mm: bit for bit one scaled_linear per group, for groups of any size; and bad arguments."""

import pytest
import torch

from aotrain.formats import BLOCKWISE_128X128, FLOAT8_E4M3, Scaling
from aotrain.ops import scaled_grouped_mm, scaled_linear
from aotrain.recipes import RECIPES as ALL_RECIPES
from aotrain.recipes import GemmRecipe, LinearRecipe
from aotrain.testing import assert_bitwise_equal, sqnr

HIGH_PRECISION_RECIPE = LinearRecipe()
# Those of linear layers but for stochastic rounding and random transforms, which the end of this file expects to raise.
RECIPES = {
    name: recipe
    for name, recipe in ALL_RECIPES.items()
    if all(
        gemm.lhs is None or gemm.lhs.rounding == "nearest"
        for gemm in (recipe.output, recipe.grad_input, recipe.grad_weight)
    )
}
# Group sizes; the rows beyond their sum belong to no group.
GROUPS = {
    "aligned": ([32, 64, 128], 224),
    "ragged": ([5, 0, 37, 1], 43),
    "tail": ([17, 3, 20], 64),
    "one-has-all": ([0, 45, 0, 0], 45),
    "empty": ([0, 0], 9),
    "no-rows": ([0, 0, 0], 0),
    "long": ([130, 257], 390),
}


def operands(sizes: list[int], rows: int, k: int, n: int, dtype: torch.dtype = torch.bfloat16):
    """x [M, K], a weight [E, K, N] that is the view of an [E, N, K] parameter, offsets, and an output gradient."""
    x = torch.randn(rows, k).to(dtype).requires_grad_()
    parameter = (torch.randn(len(sizes), n, k) * k**-0.5).to(dtype)
    offsets = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return x, parameter.mT.requires_grad_(), offsets, torch.randn(rows, n).to(dtype)


def run(x, weight, offsets, grad, recipe, bias=None):
    y = scaled_grouped_mm(x, weight, offsets, recipe, bias=bias, emulate=True)
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    return [y, *torch.autograd.grad(y, leaves, grad)]


def one_layer_per_group(x, weight, offsets, grad, recipe, bias=None):
    """The definition: what `run` returns, from a scaled_linear per group."""
    starts = [0, *offsets.tolist()]
    results: list[list[torch.Tensor]] = []
    for group in range(weight.shape[0]):
        rows = slice(starts[group], starts[group + 1])
        leaves = [x[rows].detach().requires_grad_(), weight[group].detach().t().requires_grad_()]
        if bias is not None:
            leaves.append(bias[group].detach().requires_grad_())
        y = scaled_linear(leaves[0], leaves[1], leaves[2] if bias is not None else None, recipe, emulate=True)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad[rows])])
    tail = x.shape[0] - starts[-1]
    y = torch.cat([*(r[0] for r in results), grad.new_zeros(tail, weight.shape[2], dtype=x.dtype)])
    grad_x = torch.cat([*(r[1] for r in results), x.new_zeros(tail, x.shape[1])])
    stacked = [torch.stack([r[i] for r in results]) for i in range(2, len(results[0]))]
    return [y, grad_x, stacked[0].mT, *stacked[1:]]


def assert_equal(got, want):
    for name, a, b in zip(("output", "grad_x", "grad_weight", "grad_bias"), got, want, strict=False):
        assert_bitwise_equal(a, b, what=name)
    assert len(got) == len(want)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", [*RECIPES, "high_precision"])
def test_each_group_is_a_linear_layer_of_its_own(name: str, groups: str):
    recipe = RECIPES.get(name, HIGH_PRECISION_RECIPE)
    sizes, rows = GROUPS[groups]
    x, weight, offsets, grad = operands(sizes, rows, 48, 33)
    bias = torch.randn(len(sizes), 33, dtype=torch.bfloat16, requires_grad=True)
    assert_equal(
        run(x, weight, offsets, grad, recipe, bias), one_layer_per_group(x, weight, offsets, grad, recipe, bias)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_dtypes_and_dimensions_beyond_a_block(name: str, dtype: torch.dtype):
    x, weight, offsets, grad = operands([131, 0, 20], 160, 150, 260, dtype)
    assert_equal(
        run(x, weight, offsets, grad, RECIPES[name]), one_layer_per_group(x, weight, offsets, grad, RECIPES[name])
    )


@pytest.mark.parametrize("name", ["float8_rowwise", "float8_tensorwise", "high_precision"])
def test_a_weight_of_another_dtype_gets_a_gradient_of_its_own(name: str):
    recipe = RECIPES.get(name, HIGH_PRECISION_RECIPE)
    x, weight, offsets, grad = operands([7, 21], 30, 32, 16)
    weight = weight.detach().float().requires_grad_()
    got = run(x, weight, offsets, grad, recipe)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert_equal(got, one_layer_per_group(x, weight, offsets, grad, recipe))


@pytest.mark.parametrize("name", ["float8_rowwise", "float8_blockwise", "high_precision"])
def test_strides_do_not_matter(name: str):
    recipe = RECIPES.get(name, HIGH_PRECISION_RECIPE)
    x, weight, offsets, grad = operands([7, 21, 0], 30, 32, 16)
    want = run(x, weight, offsets, grad, recipe)
    strided = x.detach().t().contiguous().t().requires_grad_()
    wide = torch.cat([weight.detach(), weight.detach()], dim=2)[:, :, :16].requires_grad_()
    for other_x, other_weight in ((strided, weight), (x, weight.detach().contiguous().requires_grad_()), (x, wide)):
        got = run(other_x, other_weight, offsets, grad, recipe)
        if name == "high_precision":  # a product of other strides may sum in another order
            assert all(sqnr(b, a) > 50 for a, b in zip(got, want, strict=True))
        else:
            assert_equal(got, want)


@pytest.mark.parametrize("name", [*RECIPES, "high_precision"])
def test_the_gradient_of_a_sum_which_is_expanded(name: str):
    recipe = RECIPES.get(name, HIGH_PRECISION_RECIPE)
    x, weight, offsets, _ = operands([7, 21, 0], 30, 32, 16)
    expanded = torch.ones((), dtype=torch.bfloat16).expand(30, 16)
    got = run(x, weight, offsets, expanded, recipe)
    assert_equal(got, one_layer_per_group(x, weight, offsets, expanded, recipe))
    y = scaled_grouped_mm(x, weight, offsets, recipe)
    y.sum().backward()
    assert_bitwise_equal(weight.grad, got[2])


@pytest.mark.parametrize("name", [*RECIPES, "high_precision"])
def test_rows_of_no_group_are_zero_and_reach_nothing(name: str):
    recipe = RECIPES.get(name, HIGH_PRECISION_RECIPE)
    x, weight, offsets, grad = operands([20, 5], 40, 32, 16)
    bias = torch.randn(16, dtype=torch.bfloat16, requires_grad=True)
    clean = run(x, weight, offsets, grad, recipe, bias)
    with torch.no_grad():
        x[25:], grad[25:] = float("nan"), float("inf")
    got = run(x, weight, offsets, grad, recipe, bias)
    assert_equal(got, clean)
    assert not got[0][25:].any()
    assert not got[1][25:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", RECIPES)
def test_a_value_that_is_not_finite_stays_in_its_group(name: str, bad: float):
    x, weight, offsets, grad = operands([20, 5, 7], 32, 32, 16)
    clean = run(x, weight, offsets, grad, RECIPES[name])
    with torch.no_grad():
        x[22, 3] = bad
    y, grad_x, grad_weight = run(x, weight, offsets, grad, RECIPES[name])
    assert y[22].isnan().all()
    assert not grad_weight[1].isfinite().all()
    for group in (slice(0, 20), slice(25, 32)):
        assert_bitwise_equal(y[group], clean[0][group])
    assert_bitwise_equal(grad_x, clean[1])
    assert_bitwise_equal(grad_weight[[0, 2]], clean[2][[0, 2]])


def test_one_bias_for_all_groups():
    x, weight, offsets, grad = operands([20, 0, 5], 30, 32, 16)
    bias = torch.randn(16, dtype=torch.bfloat16, requires_grad=True)
    per_group = bias.detach().expand(3, 16).clone().requires_grad_()
    y, *_, grad_bias = run(x, weight, offsets, grad, RECIPES["float8_rowwise"], bias)
    assert_bitwise_equal(y, run(x, weight, offsets, grad, RECIPES["float8_rowwise"], per_group)[0])
    assert_bitwise_equal(grad_bias, grad[:25].sum(0))


def test_the_gradient_of_a_group_without_rows_is_zero():
    for name in RECIPES:
        x, weight, offsets, grad = operands([0, 9, 0], 9, 32, 16)
        _, _, grad_weight = run(x, weight, offsets, grad, RECIPES[name])
        assert not grad_weight[[0, 2]].any()
        assert grad_weight[1].any()


@pytest.mark.parametrize("name", ["float8_rowwise", "high_precision"])
def test_only_the_needed_gradients(name: str):
    recipe = RECIPES.get(name, HIGH_PRECISION_RECIPE)
    x, weight, offsets, grad = operands([20, 5], 25, 32, 16)
    want = run(x, weight, offsets, grad, recipe)
    for kept, leaf in ((1, x), (2, weight)):
        inputs = [t if t is leaf else t.detach() for t in (x, weight)]
        y = scaled_grouped_mm(*inputs, offsets, recipe)
        saved = [t for t in y.grad_fn.saved_tensors if t is not None]
        assert len(saved) == 3  # with the layout of the groups
        assert saved[0].data_ptr() == inputs[2 - kept].data_ptr()
        assert_bitwise_equal(torch.autograd.grad(y, leaf, grad)[0], want[kept])


def test_autocast_casts_the_input():
    x, weight, offsets, _ = operands([20, 5], 25, 32, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = scaled_grouped_mm(x, weight, offsets, RECIPES["float8_rowwise"])
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.sum(), weight)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([4, 3, 8], "group 1 ends at row 3 but it starts at row 4; want end offsets in order"),
        ([4, 6, 9], "group 2 ends at row 9 but there are 8 rows"),
        ([-1, 6, 8], "group 0 ends at row -1 but it starts at row 0"),
    ],
    ids=["decreasing", "past-the-end", "negative"],
)
@pytest.mark.parametrize("name", ["float8_rowwise", "float8_tensorwise", "high_precision"])
def test_offsets_out_of_order_name_the_group(name: str, offsets: list[int], message: str):
    x, weight, *_ = operands([3, 3, 2], 8, 32, 16)
    with pytest.raises(ValueError, match=message):
        scaled_grouped_mm(x, weight, torch.tensor(offsets, dtype=torch.int32), RECIPES.get(name, HIGH_PRECISION_RECIPE))


def test_without_groups_all_rows_belong_to_none():
    x, weight, offsets, grad = operands([], 8, 32, 16)
    for recipe in (RECIPES["float8_rowwise"], HIGH_PRECISION_RECIPE):
        y, grad_x, grad_weight = run(x, weight, offsets, grad, recipe, torch.ones(16).requires_grad_())[:3]
        assert not y.any()
        assert not grad_x.any()
        assert grad_weight.shape == (0, 32, 16)


def test_compiles_without_a_graph_break():
    x, weight, offsets, grad = operands([20, 0, 5], 30, 32, 16)
    bias = torch.randn(3, 16, dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(scaled_grouped_mm, backend="aot_eager", fullgraph=True)
    for name in ("float8_rowwise", "float8_rowwise_with_gw_hp"):
        y = compiled(x, weight, offsets, RECIPES[name], bias=bias)
        got = [y, *torch.autograd.grad(y, (x, weight, bias), grad)]
        assert_equal(got, run(x, weight, offsets, grad, RECIPES[name], bias))


def test_wrong_arguments_say_what_is_wanted():
    x, weight, offsets, _ = operands([3, 3, 2], 8, 32, 16)
    recipe = RECIPES["float8_rowwise"]
    with pytest.raises(ValueError, match=r"transposed view `weight.mT`"):
        scaled_grouped_mm(x, weight.mT, offsets, recipe)
    with pytest.raises(TypeError, match="want int32"):
        scaled_grouped_mm(x, weight, offsets.long(), recipe)
    with pytest.raises(ValueError, match="end offset of each of the 3 groups"):
        scaled_grouped_mm(x, weight, offsets[:2], recipe)
    with pytest.raises(ValueError, match=r"want \(16,\), or \(3, 16\)"):
        scaled_grouped_mm(x, weight, offsets, recipe, bias=torch.zeros(3))


# Against the high-precision product on normal data, dB: (output, grad_input, grad_weight). The lowest of ten seeds of
# the shape below, rounded down; experts of 1024 x 512 with up to 256 tokens have the same values.
SQNR_DB = {
    "float8_tensorwise": (28.0, 24.0, 24.0),
    "float8_rowwise": (28.0, 28.0, 28.0),
    "float8_rowwise_with_gw_hp": (28.0, 28.0, 55.0),
    "float8_blockwise": (28.0, 28.0, 28.0),
    "int8_rowwise": (40.0, 40.0, 41.0),
}


@pytest.mark.parametrize("name", SQNR_DB)
def test_error_against_high_precision(name: str):
    x, weight, offsets, grad = operands([64, 0, 37, 91], 192, 128, 96)
    got = run(x, weight, offsets, grad, RECIPES[name])
    want = run(*(t.detach().double().requires_grad_() for t in (x, weight)), offsets, grad.double(), LinearRecipe())
    values = [sqnr(a, b) for a, b in zip(want, got, strict=True)]
    assert all(value >= bar for value, bar in zip(values, SQNR_DB[name], strict=True)), values


@pytest.mark.parametrize("name", RECIPES)
def test_two_runs_are_bit_equal(name: str):
    x, weight, offsets, grad = operands([20, 5], 30, 32, 16)
    assert_equal(*(run(x, weight, offsets, grad, RECIPES[name]) for _ in range(2)))


@pytest.mark.parametrize(
    "scaling",
    [Scaling(element=FLOAT8_E4M3, rounding="stochastic"), Scaling(element=FLOAT8_E4M3, block=BLOCKWISE_128X128)],
)
@pytest.mark.parametrize("product", ["output", "grad_input", "grad_weight"])
def test_a_recipe_that_groups_cannot_have_raises_in_forward(product: str, scaling: Scaling):
    x, weight, offsets, _ = operands([3, 3, 2], 8, 32, 16)
    recipe = LinearRecipe(**{product: GemmRecipe(lhs=scaling, rhs=Scaling(element=FLOAT8_E4M3))})
    with pytest.raises(ValueError, match=f"for {product}, which groups of rows cannot: .*want"):
        scaled_grouped_mm(x, weight, offsets, recipe)


def test_recipes_of_linear_layers_that_are_left_out():
    x, weight, offsets, _ = operands([3, 3, 2], 8, 32, 16)
    for recipe in (recipe for name, recipe in ALL_RECIPES.items() if name not in RECIPES):
        with pytest.raises(ValueError, match="want rounding to nearest"):
            scaled_grouped_mm(x, weight, offsets, recipe)


@pytest.mark.gpu
class TestOnGPU:
    @pytest.mark.parametrize("groups", ["aligned", "ragged", "tail", "one-has-all", "empty", "long"])
    @pytest.mark.parametrize(
        "name", ["float8_rowwise", "float8_rowwise_with_gw_hp", "float8_blockwise", "int8_rowwise"]
    )
    def test_is_close_to_the_definition(self, name: str, groups: str):
        sizes, rows = GROUPS[groups]
        x, weight, offsets, grad = operands(sizes, rows, 64, 48)
        want = run(x, weight, offsets, grad, RECIPES[name])
        moved = [t.detach().cuda() for t in (x, weight, offsets, grad)]
        x, weight = (t.requires_grad_() for t in moved[:2])
        y = scaled_grouped_mm(x, weight, moved[2], RECIPES[name])
        for a, b in zip([y, *torch.autograd.grad(y, (x, weight), moved[3])], want, strict=True):
            assert not a.cpu()[b == 0].any()
            # Codes and scales are equal; Hopper sums float8 products with 14 bits or so of them.
            assert not b.any() or sqnr(b, a.cpu()) >= 30

    @pytest.mark.parametrize("name", ["float8_rowwise", "float8_rowwise_with_gw_hp", "float8_blockwise"])
    def test_a_graph_replays_with_other_groups(self, name: str):
        """Nothing waits for the GPU, so a step is captured once and replayed for any routing of as many tokens."""
        x, weight, offsets, grad = (t.detach().cuda() for t in operands([40, 0, 56], 96, 64, 48))
        x, weight = x.requires_grad_(), weight.requires_grad_()
        bias = torch.randn(3, 48, device="cuda", dtype=torch.bfloat16, requires_grad=True)

        def step() -> list[torch.Tensor]:
            y = scaled_grouped_mm(x, weight, offsets, RECIPES[name], bias=bias)
            return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad)]

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for sizes in ([1, 90, 5], [0, 0, 17], [96, 0, 0]):
            offsets.copy_(torch.tensor(sizes).cumsum(0))
            graph.replay()
            for a, b in zip(captured, step(), strict=True):
                assert_bitwise_equal(a, b)

    def test_offsets_out_of_order_are_made_safe(self):
        x, weight, _, grad = (t.detach().cuda() for t in operands([40, 0, 56], 96, 64, 48))
        results = []
        for offsets in ([40, 30, 200], [40, 40, 96]):
            ends = torch.tensor(offsets, dtype=torch.int32, device="cuda")
            results.append(run(x.requires_grad_(), weight.requires_grad_(), ends, grad, RECIPES["float8_rowwise"]))
        assert_equal(*results)


@pytest.mark.parametrize("recipe", ["float8_blockwise", "mxfp8"])
def test_only_small_elements_tell_scales_apart(recipe: str) -> None:
    """e4m3 under any power-of-two scale rounds to four significant bits: blocks matter to subnormals only.

    So these recipes are one function of operands within 2^10 of each other. Measured: no bit differs; the bound allows
    another order of sums.
    """
    x, weight, offsets, grad = operands([40, 0, 90], 130, 256, 128)
    near = [t.detach().sign() * t.detach().abs().clamp(2.0**-8, 2.0) for t in (x, weight, grad)]
    leaves = [near[0].requires_grad_(), near[1].requires_grad_(), offsets, near[2]]
    wants, gots = (run(*leaves, RECIPES[name]) for name in ("float8_rowwise", recipe))
    for want, got in zip(wants, gots, strict=True):
        assert sqnr(want, got) > 60
