"""The Triton casts by tiles against formats.quantize, bit for bit, under the interpreter; GPU twins at the end."""

from itertools import product

import pytest
import torch

from aotrain.formats import (
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    COLWISE,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    INT8,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    ElementFormat,
    Scaling,
    quantize,
    scale_shape,
)
from aotrain.formats.scaling import Block
from aotrain.kernels.triton import scaled_cast_amax
from aotrain.kernels.triton import scaled_cast_tiles as kernels
from aotrain.testing import adversarial_matrix, all_bfloat16_values, assert_bitwise_equal

PAIRS = [pair for pair in product((None, *kernels.TILE_BLOCKS), repeat=2) if any(pair)]
# One pair for each way of getting maxima; together every block, as it is and transposed.
WAYS = [
    (TENSORWISE, TENSORWISE),
    (ROWWISE, ROWWISE),
    (COLWISE, TENSORWISE),
    (BLOCKWISE_1X128, BLOCKWISE_1X128),
    (BLOCKWISE_128X128, BLOCKWISE_128X128),
    ((128, 1), (128, 1)),
    (None, COLWISE),
]
FORMATS = list(product((FLOAT8_E4M3, FLOAT8_E5M2, INT8), ("float32", "float32_pow2")))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (37, 100), (128, 64), (129, 257), (300, 31), (2, 515)]


def _name(value: object) -> str:
    if isinstance(value, ElementFormat):
        return value.name
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _assert_equals_reference(
    x: torch.Tensor,
    block: Block | None,
    block_t: Block | None,
    element: ElementFormat = FLOAT8_E4M3,
    scale: str = "float32_pow2",
    device: str = "cpu",
) -> None:
    got = kernels.scaled_cast_tiles(x.to(device), block, block_t, element, SCALE_FORMATS[scale])
    for operand, wanted, data, scales in ((x, block, *got[:2]), (x.mT, block_t, *got[2:])):
        if wanted is None:
            assert data.numel() == scales.numel() == 0
            continue
        scaling = Scaling(element=element, scale=SCALE_FORMATS[scale], block=wanted)
        expected = quantize(operand.contiguous(), scaling)
        assert_bitwise_equal(scales.cpu(), expected.scale, what=f"scale of {wanted}")
        assert_bitwise_equal(data.cpu(), expected.data, what=f"data of {wanted}")
        assert data.is_contiguous()
        assert scales.is_contiguous()


def _assert_uses_given(
    x: torch.Tensor, block: Block, element: ElementFormat = FLOAT8_E4M3, scale: str = "float32", device: str = "cpu"
) -> None:
    """As it is and transposed, with maxima below and above x's own and with none, an infinity and a NaN among them."""
    scaling = Scaling(element=element, scale=SCALE_FORMATS[scale], block=block)
    for transposed in (False, True):
        operand = x.mT if transposed else x
        amax = torch.rand(scale_shape(operand.shape, block)) * 8
        amax.view(-1)[1:5] = torch.tensor([0.0, torch.inf, torch.nan, -torch.nan])[: amax.numel() - 1]
        blocks = (None, block) if transposed else (block, None)
        got = kernels.scaled_cast_tiles(x.to(device), *blocks, element, scaling.scale, amax.to(device))
        expected = quantize(operand.contiguous(), scaling, amax=amax)
        assert_bitwise_equal(got[2 * transposed + 1].cpu(), expected.scale, what=f"scale of {block}")
        assert_bitwise_equal(got[2 * transposed].cpu(), expected.data, what=f"data of {block}")


def _non_finite_matrix(dtype: torch.dtype) -> torch.Tensor:
    """Four squares of 128: with a NaN, with an infinity, with both of either sign, and without."""
    x = torch.randn(208, 160)
    x[3, 5], x[150, 7], x[4, 140], x[5, 141] = torch.nan, -torch.inf, torch.inf, -torch.nan
    x[6, 130:140] = -torch.inf
    return x.to(dtype)[None]


@pytest.mark.usefixtures("interpreter")
class TestInterpreted:
    @pytest.mark.parametrize(("block", "block_t"), PAIRS, ids=_name)
    def test_every_pair_of_blocks(self, block: Block | None, block_t: Block | None) -> None:
        _assert_equals_reference(adversarial_matrix(131, 150)[None], block, block_t)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("element", "scale"), FORMATS, ids=_name)
    def test_formats_and_dtypes(self, element: ElementFormat, scale: str, dtype: torch.dtype) -> None:
        for block, block_t in WAYS:
            _assert_equals_reference(adversarial_matrix(37, 100, dtype)[None], block, block_t, element, scale)

    @pytest.mark.parametrize("shape", SHAPES, ids=_name)
    def test_tails(self, shape: tuple[int, int]) -> None:
        for block, block_t in WAYS:
            _assert_equals_reference(adversarial_matrix(*shape)[None], block, block_t)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("element", "scale"), FORMATS, ids=_name)
    def test_nan_and_inf_stay_in_their_blocks(self, element: ElementFormat, scale: str, dtype: torch.dtype) -> None:
        for block, block_t in WAYS[:5]:
            _assert_equals_reference(_non_finite_matrix(dtype), block, block_t, element, scale)

    @pytest.mark.parametrize(("element", "scale"), FORMATS, ids=_name)
    def test_every_bfloat16_value(self, element: ElementFormat, scale: str) -> None:
        # In order: a row has values of at most two exponents, which all round visibly.
        values = all_bfloat16_values().view(1, 512, 128)
        _assert_equals_reference(values, ROWWISE, BLOCKWISE_1X128, element, scale)
        _assert_equals_reference(values.mT, BLOCKWISE_1X128, ROWWISE, element, scale)

    @pytest.mark.parametrize("element", [FLOAT8_E4M3, FLOAT8_E5M2, INT8], ids=_name)
    def test_ties_round_to_even(self, element: ElementFormat) -> None:
        # With the maximum in each block the scale is 1; the other values lie halfway between codes and beside that.
        steps = (
            torch.arange(-160, 160) * 0.25 if element is INT8 else torch.arange(-160, 160) * element.min_subnormal / 2
        )
        x = torch.cat([steps, steps.nextafter(torch.ones(())), -steps.nextafter(torch.ones(()))])[None, :, None]
        x = torch.cat([x, torch.full_like(x, element.max)], dim=-1)
        _assert_equals_reference(x, ROWWISE, COLWISE, element, "float32")
        _assert_equals_reference(x, TENSORWISE, TENSORWISE, element, "float32_pow2")

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x.mT,
            lambda x: x[:, ::2],
            lambda x: x[:, :, ::3],
            lambda x: x[:, 5:, 7:],
            lambda x: x[:, :1].expand(-1, 9, -1),
            lambda x: x[:1].expand(3, -1, -1),
        ],
        ids=["transposed", "rows", "columns", "offset", "expanded-rows", "expanded-batch"],
    )
    def test_strides(self, view) -> None:
        x = view(torch.stack([adversarial_matrix(140, 133, seed=seed) for seed in range(2)]))
        for block, block_t in WAYS:
            _assert_equals_reference(x, block, block_t)

    def test_each_matrix_of_a_batch_has_its_own_scales(self) -> None:
        x = torch.randn(3, 130, 70) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
        for block, block_t in PAIRS[::5]:
            _assert_equals_reference(x, block, block_t, scale="float32")

    @pytest.mark.parametrize("shape", [(1, 700, 70), (2, 33, 300), (1, 3001, 3)], ids=_name)
    def test_maxima_over_several_steps_of_a_program(self, shape, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scaled_cast_amax, "ENOUGH_PROGRAMS", 1)
        x = torch.randn(shape)
        x[:, -1, -1] = 1e4
        for block in (TENSORWISE, ROWWISE, COLWISE):
            _assert_equals_reference(x, block, block)
        _assert_equals_reference(x, ROWWISE, ROWWISE)

    def test_long_offsets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (kernels, scaled_cast_amax):
            monkeypatch.setattr(module, "long_offsets", lambda x, tile: True)
        for block, block_t in WAYS:
            _assert_equals_reference(adversarial_matrix(131, 70)[None].mT, block, block_t)

    @pytest.mark.parametrize("block", kernels.TILE_BLOCKS, ids=_name)
    def test_given_maxima(self, block: Block) -> None:
        x = torch.stack([adversarial_matrix(130, 131, seed=seed) for seed in range(2)])
        for view in (x, x[:1, :37, :100], x[:1, :, :70].mT):
            _assert_uses_given(view, block)

    @pytest.mark.parametrize(("element", "scale"), FORMATS, ids=_name)
    def test_given_maxima_of_formats(self, element: ElementFormat, scale: str) -> None:
        for block in (TENSORWISE, ROWWISE, BLOCKWISE_1X128):
            _assert_uses_given(_non_finite_matrix(torch.bfloat16)[:, :40], block, element, scale)

    def test_two_runs_are_equal(self) -> None:
        x = adversarial_matrix(140, 150)[None]
        for block, block_t in WAYS[:5]:
            runs = [kernels.scaled_cast_tiles(x, block, block_t, INT8, SCALE_FORMATS["float32"]) for _ in range(2)]
            for first, second in zip(*runs, strict=True):
                assert_bitwise_equal(first, second)


def test_tiles_hold_whole_blocks() -> None:
    assert kernels.select_tile(BLOCKWISE_1X128, (0, 0)) == kernels.SQUARE_TILE
    assert kernels.select_tile((0, 0), (128, 1)) == kernels.SQUARE_TILE
    assert kernels.select_tile(ROWWISE, COLWISE) == kernels.WIDE_TILE
    assert kernels.SQUARE_TILE[:2] == (128, 128)
    ragged = kernels.select_tile(ROWWISE, ROWWISE, vectors=False)
    assert ragged[:2] == kernels.WIDE_TILE[:2]
    assert ragged.num_warps > kernels.WIDE_TILE.num_warps


def test_offsets_are_long_where_a_tile_spans_2_to_the_31() -> None:
    def is_long(*shape: int) -> bool:
        return scaled_cast_amax.long_offsets(torch.empty(shape, device="meta"), kernels.WIDE_TILE)

    assert not is_long(2, 2**20, 2**20)
    assert not is_long(1, 16, 2**23)
    assert is_long(1, 16, 2**24)
    assert is_long(1, 2**24, 16)  # the transposition's rows


@pytest.mark.gpu
class TestCompiled:
    @pytest.mark.parametrize(("block", "block_t"), PAIRS, ids=_name)
    def test_every_pair_of_blocks(self, block: Block | None, block_t: Block | None) -> None:
        for shape in ((131, 150), (256, 384)):
            _assert_equals_reference(adversarial_matrix(*shape)[None], block, block_t, device="cuda")

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("element", "scale"), FORMATS, ids=_name)
    def test_formats_and_dtypes(self, element: ElementFormat, scale: str, dtype: torch.dtype) -> None:
        for block, block_t in WAYS[:5]:
            _assert_equals_reference(adversarial_matrix(320, 272, dtype)[None], block, block_t, element, scale, "cuda")
            _assert_equals_reference(_non_finite_matrix(dtype), block, block_t, element, scale, "cuda")

    @pytest.mark.parametrize(("element", "scale"), FORMATS, ids=_name)
    def test_every_bfloat16_value(self, element: ElementFormat, scale: str) -> None:
        values = all_bfloat16_values().view(1, 512, 128)
        _assert_equals_reference(values, ROWWISE, BLOCKWISE_1X128, element, scale, "cuda")

    @pytest.mark.parametrize("block", kernels.TILE_BLOCKS, ids=_name)
    def test_given_maxima(self, block: Block) -> None:
        for shape in ((131, 150), (256, 384)):
            _assert_uses_given(adversarial_matrix(*shape)[None], block, device="cuda")

    def test_many_programs(self) -> None:
        x = torch.randn(1, 4096, 4160).bfloat16()
        for block, block_t in WAYS:
            _assert_equals_reference(x, block, block_t, device="cuda")

    def test_column_major(self) -> None:
        x = adversarial_matrix(512, 320).cuda().t()[None]
        assert x.stride(-2) == 1
        got = kernels.scaled_cast_tiles(x, ROWWISE, ROWWISE, FLOAT8_E4M3, SCALE_FORMATS["float32"])
        expected = quantize(x.cpu().contiguous(), Scaling(element=FLOAT8_E4M3, block=ROWWISE))
        assert_bitwise_equal(got[0].cpu(), expected.data)
