"""What scaled_grouped_mm runs on a GPU, all of it under the interpreter: fused casts, Triton products, no waiting."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aotrain.kernels import _grouped_mm_cuda, grouped_cast, groups, scaled_grouped_mm
from aotrain.recipes import RECIPES
from aotrain.testing import assert_bitwise_equal, sqnr
from tests.ops.test_scaled_grouped_mm import operands, run

# The products are summed in another order and rounded to bfloat16: 50 dB and more. A code or a scale in a wrong place
# costs much more than that.
SQNR_DB = 48.0
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "group_layout": groups._cuda_group_layout,
    "group_sum": groups._cuda_group_sum,
    "grouped_cast": grouped_cast._cuda,
    "grouped_cast_t": grouped_cast._cuda_t,
    "grouped_cast_both": grouped_cast._cuda_both,
    "scaled_grouped_mm": scaled_grouped_mm._cuda,
    "scaled_grouped_mm_contracted": scaled_grouped_mm._cuda_contracted,
    "grouped_mm": scaled_grouped_mm._cuda_grouped_mm,
    "grouped_mm_contracted": scaled_grouped_mm._cuda_grouped_mm_contracted,
}


@pytest.fixture
def like_a_gpu(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the CUDA implementations of the grouped ops, and nobody may read the offsets."""
    for name, implementation in IMPLEMENTATIONS.items():
        monkeypatch.setattr(torch.ops.aotrain, name, implementation)
    monkeypatch.setattr(_grouped_mm_cuda, "_way", lambda *arguments: "triton")
    for module in (groups, grouped_cast, scaled_grouped_mm):
        monkeypatch.setattr(module, "group_bounds", lambda *arguments: pytest.fail("the offsets were read"))


def results(name: str, sizes: list[int], rows: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x, weight, offsets, grad = operands(sizes, rows, 144, 80)
    bias = torch.randn(len(sizes), 80, dtype=torch.bfloat16, requires_grad=True)
    return run(x, weight, offsets, grad, RECIPES[name], bias)


@pytest.mark.parametrize(("sizes", "rows"), [([5, 0, 130, 1], 140), ([0, 0], 9)], ids=str)
@pytest.mark.parametrize("name", ["float8_rowwise", "float8_rowwise_with_gw_hp", "float8_blockwise", "int8_rowwise"])
def test_gives_what_the_definition_gives_without_a_wait(name: str, sizes, rows, request: pytest.FixtureRequest):
    want = results(name, sizes, rows)
    request.getfixturevalue("like_a_gpu")
    got = results(name, sizes, rows)
    for what, a, b in zip(("output", "grad_x", "grad_weight", "grad_bias"), got, want, strict=True):
        assert not a[b == 0].any(), what
        assert not b.any() or sqnr(b, a) >= SQNR_DB, what


@pytest.mark.usefixtures("like_a_gpu")
def test_two_runs_are_bit_equal():
    for a, b in zip(*(results("float8_rowwise", [5, 0, 30], 40) for _ in range(2)), strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.usefixtures("like_a_gpu")
def test_offsets_out_of_order_are_made_safe():
    x, weight, _, grad = operands([40, 0, 20], 60, 64, 48)
    bad, safe = (torch.tensor(ends, dtype=torch.int32) for ends in ([40, 30, 200], [40, 40, 60]))
    for a, b in zip(
        run(x, weight, bad, grad, RECIPES["float8_rowwise"]),
        run(x, weight, safe, grad, RECIPES["float8_rowwise"]),
        strict=True,
    ):
        assert_bitwise_equal(a, b)
