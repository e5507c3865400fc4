"""The Triton kernels of nvfp4_cast against the definition, bit for bit, under the interpreter; GPU twins at the end."""

import math

import pytest
import torch

from aotrain.formats import FLOAT4_E2M1, decode_elements, hadamard_signs
from aotrain.kernels.nvfp4_cast import _cuda, _reference
from aotrain.kernels.triton import nvfp4_cast as kernels
from aotrain.testing import adversarial_matrix, all_bfloat16_values, all_codes, assert_bitwise_equal

SIGNS = tuple(int(sign) for sign in hadamard_signs(2).tolist())
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# (block rows, as is, transposed, signs, seed, blocked)
CASTS = {
    "rows": (1, True, False, (), None, False),
    "rows-stochastic": (1, True, False, (), 3, False),
    "transposed": (1, False, True, (), None, False),
    "squares": (16, True, True, (), None, False),
    "squares-blocked": (16, True, True, (), None, True),
    "transformed": (1, False, True, SIGNS, None, False),
    "both-stochastic": (1, True, True, SIGNS, -7, False),
    "both-blocked": (1, True, True, SIGNS, 2**40, True),
}
NAMES = ("data", "scale", "global scale", "data of t", "scale of t", "global scale of t")


def _assert_casts(x: torch.Tensor, cast: str, device: str = "cpu") -> None:
    want = _reference(x, *CASTS[cast])
    for name, actual, expected in zip(NAMES, _cuda(x.to(device), *CASTS[cast]), want, strict=True):
        assert_bitwise_equal(actual.cpu(), expected, what=f"{name} of {cast}")


def _ties() -> torch.Tensor:
    """Codes and their midpoints, and the neighbours of these, in blocks whose amax is 6: of scale 448."""
    codes = decode_elements(all_codes(FLOAT4_E2M1)[:8], torch.float32, FLOAT4_E2M1)
    values = torch.cat([codes, (codes[:-1] + codes[1:]) / 2])
    values = torch.cat([values, *(values.nextafter(torch.tensor(sign * math.inf)) for sign in (-1, 1))]).clamp(max=6)
    rows = torch.stack([values, -values], 1).flatten().split(15)
    return torch.stack([torch.nn.functional.pad(row, (1, 15 - len(row)), value=6.0) for row in rows]) * 448 / 512


@pytest.mark.usefixtures("interpreter")
class TestInterpreted:
    @pytest.mark.parametrize("cast", CASTS)
    def test_every_cast(self, cast: str) -> None:
        _assert_casts(adversarial_matrix(37, 50), cast)

    @pytest.mark.parametrize("cast", ["squares", "both-stochastic"])
    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    def test_dtypes(self, dtype: torch.dtype, cast: str) -> None:
        _assert_casts(adversarial_matrix(37, 50, dtype), cast)

    @pytest.mark.parametrize(
        ("shape", "cast"),
        [((1, 1), "both-stochastic"), ((33, 17), "both-blocked"), ((129, 65), "transformed"), ((31, 130), "squares")],
        ids=str,
    )
    def test_tails(self, shape: tuple[int, int], cast: str) -> None:
        _assert_casts(torch.randn(shape).bfloat16(), cast)

    @pytest.mark.parametrize("cast", ["squares", "transformed"])
    @pytest.mark.parametrize(
        "view",
        [lambda x: x.t(), lambda x: x[::2, ::3], lambda x: x[5:, 7:], lambda x: x[:1].expand(9, -1)],
        ids=["transposed", "strided", "offset", "expanded"],
    )
    def test_strides(self, view, cast: str) -> None:
        _assert_casts(view(adversarial_matrix(50, 60)), cast)

    @pytest.mark.parametrize("cast", ["rows-stochastic", "transformed", "squares"])
    @pytest.mark.parametrize("bad", [(math.inf,), (-math.inf, -math.nan, math.inf)], ids=str)
    def test_values_that_are_not_finite(self, bad: tuple[float, ...], cast: str) -> None:
        x = torch.randn(40, 50)
        for i, value in enumerate(bad):
            x[3 + i, 5 + 16 * i] = value
        _assert_casts(x, cast)

    @pytest.mark.parametrize("cast", ["rows", "rows-stochastic", "transposed"])
    @pytest.mark.parametrize("largest", [3e38, 1e-38])
    def test_every_bfloat16_value(self, largest: float, cast: str) -> None:
        values = all_bfloat16_values()
        values = values[values.isfinite()].view(-1, 2).t().flatten()  # neighbours apart
        values = values[values.abs() <= largest]
        _assert_casts(torch.nn.functional.pad(values, (0, -len(values) % 512)).view(512, -1), cast)

    @pytest.mark.parametrize("cast", ["rows", "rows-stochastic", "squares"])
    def test_ties(self, cast: str) -> None:
        _assert_casts(_ties(), cast)
        _assert_casts(_ties().t(), cast)

    @pytest.mark.parametrize("cast", ["both-stochastic", "squares"])
    def test_zeros(self, cast: str) -> None:
        _assert_casts(torch.zeros(20, 40), cast)

    @pytest.mark.parametrize("shape", [(0, 32), (32, 0)], ids=str)
    def test_empty(self, shape: tuple[int, int]) -> None:
        for cast in CASTS:
            _assert_casts(torch.empty(shape), cast)


def test_tiles_hold_whole_blocks_and_counters() -> None:
    rows, columns, _ = kernels.ALONG_TILE
    assert rows % 16 == 0
    assert columns % 32 == 0
    assert kernels.ACROSS_TILE[1] % 16 == 0


@pytest.mark.gpu
class TestCompiled:
    @pytest.mark.parametrize("cast", CASTS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, dtype: torch.dtype, cast: str) -> None:
        for shape in ((37, 100), (320, 272), (4096, 1040)):
            _assert_casts(adversarial_matrix(*shape, dtype), cast, "cuda")

    @pytest.mark.parametrize("cast", CASTS)
    def test_every_bfloat16_value(self, cast: str) -> None:
        values = all_bfloat16_values()
        _assert_casts(values[values.isfinite()].view(-1, 255), cast, "cuda")

    @pytest.mark.parametrize("cast", CASTS)
    def test_values_that_are_not_finite(self, cast: str) -> None:
        for bad in (math.inf, math.nan, -math.nan):
            x = torch.randn(40, 50)
            x[3, 5] = bad
            _assert_casts(x, cast, "cuda")

    @pytest.mark.parametrize("cast", ["rows", "rows-stochastic", "squares", "transposed"])
    def test_ties(self, cast: str) -> None:
        _assert_casts(_ties(), cast, "cuda")
        _assert_casts(_ties().t(), cast, "cuda")
