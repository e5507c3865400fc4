"""The Triton kernels of nvfp4_grouped_cast against a cast per group, bit for bit, under the interpreter; GPU twins."""

import pytest
import torch

from aotrain.formats import hadamard_signs
from aotrain.kernels import nvfp4_grouped_cast as op
from aotrain.kernels.groups import group_layout
from aotrain.testing import adversarial_matrix, assert_bitwise_equal

SIGNS = tuple(int(sign) for sign in hadamard_signs(2).tolist())
# (as is, transposed, signs, seed)
CASTS = {
    "rows": (True, False, (), None),
    "rows-stochastic": (True, False, (), 3),
    "transposed": (False, True, (), None),
    "transformed": (False, True, SIGNS, None),
    "both-stochastic": (True, True, SIGNS, -7),
    "both-plain": (True, True, (), 2**40),
}
# Group sizes and rows.
GROUPS = {"ragged": ([5, 0, 37, 1], 47), "first-empty": ([0, 33], 33), "all-empty": ([0, 0], 9), "one": ([32], 32)}
NAMES = ("data", "scale", "global scale", "data of t", "scale of t", "global scale of t")


def _assert_casts(x: torch.Tensor, sizes: list[int], cast: str, device: str = "cpu") -> None:
    layout = group_layout(torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32), x.shape[0], 32)
    want = op._reference(x, layout.ends, layout.padded_ends, *CASTS[cast])
    got = op._cuda(x.to(device), layout.ends.to(device), layout.padded_ends.to(device), *CASTS[cast])
    for name, actual, expected in zip(NAMES, got, want, strict=True):
        assert_bitwise_equal(actual.cpu(), expected, what=f"{name} of {cast}")


@pytest.mark.usefixtures("interpreter")
class TestInterpreted:
    @pytest.mark.parametrize("cast", CASTS)
    def test_every_cast(self, cast: str) -> None:
        _assert_casts(adversarial_matrix(47, 50), GROUPS["ragged"][0], cast)

    @pytest.mark.parametrize("cast", ["both-stochastic", "both-plain"])
    @pytest.mark.parametrize("groups", GROUPS)
    def test_groups(self, groups: str, cast: str) -> None:
        sizes, rows = GROUPS[groups]
        x = torch.randn(rows, 33).bfloat16()
        x[sum(sizes) :] = torch.nan  # of no group
        _assert_casts(x, sizes, cast)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        _assert_casts(adversarial_matrix(47, 50, dtype), [20, 7], "both-stochastic")

    @pytest.mark.parametrize("columns", [1, 31, 130])
    def test_tails(self, columns: int) -> None:
        _assert_casts(torch.randn(40, columns).bfloat16(), [17, 20], "both-stochastic")

    @pytest.mark.parametrize("view", [lambda x: x.t(), lambda x: x[::2, ::3], lambda x: x[:1].expand(30, -1)])
    def test_strides(self, view) -> None:
        x = view(adversarial_matrix(50, 60))
        _assert_casts(x, [9, x.shape[0] - 11], "both-stochastic")

    @pytest.mark.parametrize("bad", [torch.inf, -torch.nan])
    def test_values_that_are_not_finite_stay_in_their_group(self, bad: float) -> None:
        x = torch.randn(40, 50)
        x[17, 20] = bad
        for cast in ("both-stochastic", "transformed"):
            _assert_casts(x, [16, 4, 20], cast)

    def test_many_groups_meet_in_one_program(self) -> None:
        _assert_casts(torch.randn(60, 40).bfloat16(), [3, 0, 0, 9, 1, 40], "both-stochastic")


@pytest.mark.gpu
class TestCompiled:
    @pytest.mark.parametrize("cast", CASTS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_every_cast(self, dtype: torch.dtype, cast: str) -> None:
        sizes = [300, 0, 1, 700, 33]
        _assert_casts(torch.randn(1100, 1000).to(dtype), sizes, cast, "cuda")
