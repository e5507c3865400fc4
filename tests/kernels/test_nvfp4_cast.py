"""The nvfp4_cast op: operands by definition, padding, the transform, noise, schema, and awkward inputs."""

import math

import pytest
import torch

from aotrain.formats import (
    BLOCKWISE_1X16,
    BLOCKWISE_16X16,
    Nvfp4Tensor,
    data_key,
    dequantize_nvfp4,
    from_blocked,
    hadamard_signs,
    hadamard_transform,
    philox_bits16,
    quantize_nvfp4,
    unpack_float4,
)
from aotrain.kernels.nvfp4_cast import Nvfp4Operand, nvfp4_cast, nvfp4_cast_both, padded_columns
from aotrain.testing import adversarial_matrix, assert_bitwise_equal, sqnr

SIGNS = tuple(int(sign) for sign in hadamard_signs(3).tolist())
SHAPES = [(32, 64), (37, 100), (1, 1), (16, 31), (33, 17)]
BLOCKS = [BLOCKWISE_1X16, BLOCKWISE_16X16]


def padded(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape[0], -(-x.shape[1] // 32) * 32, dtype=x.dtype)
    out[:, : x.shape[1]] = x
    return out


def assert_operand(got: Nvfp4Operand, want: Nvfp4Tensor) -> None:
    assert_bitwise_equal(unpack_float4(got.data, want.data.shape[1]), want.data, what="data")
    rows = want.scale if want.block == BLOCKWISE_1X16 else _rows_of_squares(want)
    assert_bitwise_equal(got.scale, rows, what="scale")
    assert_bitwise_equal(got.global_scale, want.global_scale, what="global scale")
    assert all(part.is_contiguous() for part in got)


def _rows_of_squares(q: Nvfp4Tensor) -> torch.Tensor:
    at = torch.arange(q.data.shape[0]) // 16
    return q.scale.view(torch.uint8)[at].view(torch.float8_e4m3fn)


def noise_of(x: torch.Tensor, shape: torch.Size, seed: int) -> torch.Tensor:
    return philox_bits16(data_key(seed, x), torch.arange(shape.numel())).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_quantized_padded_matrix(shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype) -> None:
    for x in (torch.randn(shape).to(dtype), adversarial_matrix(*shape, dtype)):
        for transposed in (False, True):
            operand = padded(x.t() if transposed else x)
            got = nvfp4_cast(x, block=block, transposed=transposed)
            assert_operand(got, quantize_nvfp4(operand, block=block))
        both = nvfp4_cast_both(x, block=block)
        for got, operand in zip(both, (x, x.t()), strict=True):
            assert_operand(got, quantize_nvfp4(padded(operand), block=block))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_transposition_is_transformed_before_anything_is_measured(shape: tuple[int, int]) -> None:
    x = torch.randn(shape).bfloat16()
    x[0, 0] = 100.0
    transformed = hadamard_transform(padded(x.t()), torch.tensor(SIGNS).float())
    want = quantize_nvfp4(transformed)
    assert_operand(nvfp4_cast(x, transposed=True, signs=SIGNS), want)
    as_is, got = nvfp4_cast_both(x, signs=SIGNS)
    assert_operand(got, want)
    assert_operand(as_is, quantize_nvfp4(padded(x)))
    assert got.global_scale < as_is.global_scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stochastic_rounding_takes_its_noise_from_seed_and_data(shape: tuple[int, int]) -> None:
    x = torch.randn(shape).bfloat16()
    transformed = hadamard_transform(padded(x.t()), torch.tensor(SIGNS).float())
    as_is, got_t = nvfp4_cast_both(x, signs=SIGNS, seed=5)
    assert_operand(as_is, quantize_nvfp4(padded(x), noise=noise_of(x, padded(x).shape, 10)))
    assert_operand(got_t, quantize_nvfp4(transformed, noise=noise_of(x, transformed.shape, 11)))
    for alone, both in ((nvfp4_cast(x, seed=5), as_is), (nvfp4_cast(x, transposed=True, signs=SIGNS, seed=5), got_t)):
        assert_bitwise_equal(alone.data, both.data)


def test_other_seeds_and_other_data_have_other_noise() -> None:
    x = torch.rand(64, 64) + 0.5
    base = nvfp4_cast(x, seed=0).data
    assert torch.equal(nvfp4_cast(x.clone(), seed=0).data, base)
    assert torch.equal(nvfp4_cast(x.t().contiguous().t(), seed=0).data, base)
    # Half of the noise or so decides otherwise: far more codes differ than of a cast to nearest and one changed value.
    assert (nvfp4_cast(x, seed=1).data != base).float().mean() > 0.2
    changed = x.clone()
    changed[5, 7] += 2.0**-20
    assert (nvfp4_cast(changed, seed=0).data != base).float().mean() > 0.2
    assert (nvfp4_cast(changed).data != nvfp4_cast(x).data).sum() <= 1


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["as-is", "transposed"])
def test_blocked_scales_are_the_same_scales_in_tiles(transposed: bool, block: tuple[int, int]) -> None:
    x = torch.randn(150, 330)
    plain, tiled = (nvfp4_cast(x, block=block, transposed=transposed, blocked=blocked) for blocked in (False, True))
    assert_bitwise_equal(from_blocked(tiled.scale, *plain.scale.shape), plain.scale)
    assert_bitwise_equal(tiled.data, plain.data)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_makes_the_matrix_nan(bad: float) -> None:
    x = torch.randn(40, 50)
    x[3, 5] = bad
    for transposed, signs in ((False, ()), (True, ()), (True, SIGNS)):
        got = nvfp4_cast(x, transposed=transposed, signs=signs, seed=1)
        codes = unpack_float4(got.data, 2 * got.data.shape[1])
        assert bool(dequantize_nvfp4(Nvfp4Tensor(codes, got.scale, got.global_scale, BLOCKWISE_1X16)).isnan().all())


@pytest.mark.parametrize("shape", [(0, 32), (32, 0), (0, 0)], ids=str)
def test_empty(shape: tuple[int, int]) -> None:
    x = torch.empty(shape)
    for got, (rows, columns) in zip(nvfp4_cast_both(x, signs=SIGNS, seed=1), (shape, shape[::-1]), strict=True):
        assert got.data.shape == (rows, padded_columns(columns) // 2)
        assert got.scale.shape == (rows, padded_columns(columns) // 16)
        assert got.global_scale.shape == (1, 1)
        assert not got.data.any()


def test_zeros_stay_zeros() -> None:
    got = nvfp4_cast(torch.zeros(20, 40), seed=1)
    assert not got.data.any()
    assert bool((got.scale.float() == 2.0**-9).all())
    assert got.global_scale > 0


def test_strides_do_not_matter() -> None:
    x = adversarial_matrix(64, 48)
    for view in (x.t(), x[::2], x[:, 5:], x[:1].expand(4, -1)):
        for got, want in zip(nvfp4_cast_both(view, seed=2), nvfp4_cast_both(view.contiguous(), seed=2), strict=True):
            for a, b in zip(got, want, strict=True):
                assert_bitwise_equal(a, b)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.t()], ids=["contiguous", "transposed"])
@pytest.mark.parametrize(
    "args",
    [
        (1, True, False, (), None, False),
        (16, False, True, (), None, True),
        (1, True, True, SIGNS, 7, False),
        (1, True, True, SIGNS, None, True),
    ],
    ids=["rows", "squares-transposed", "both", "both-blocked"],
)
def test_opcheck(args: tuple, view) -> None:
    torch.library.opcheck(torch.ops.aotrain.nvfp4_cast, (view(torch.randn(37, 100)), *args))


def test_compiles_into_one_graph_with_equal_bits() -> None:
    x = torch.randn(37, 100)
    compiled = torch.compile(lambda x: [*nvfp4_cast_both(x, signs=SIGNS, seed=1)], fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x), nvfp4_cast_both(x, signs=SIGNS, seed=1), strict=True):
        for a, b in zip(got, want, strict=True):
            assert_bitwise_equal(a, b)


def test_error_of_each_operand() -> None:
    # 20.5 dB to nearest and 17.3 stochastically, as of quantize_nvfp4 (tests/formats/test_nvfp4.py).
    x = torch.randn(128, 192)
    for seed, bar in ((None, 20.0), (1, 16.8)):
        got = nvfp4_cast(x, seed=seed)
        codes = unpack_float4(got.data, 192)
        assert sqnr(x, dequantize_nvfp4(Nvfp4Tensor(codes, got.scale, got.global_scale, BLOCKWISE_1X16))) >= bar


def test_bad_arguments_say_what_is_wanted() -> None:
    x = torch.ones(4, 32)
    with pytest.raises(ValueError, match="want a matrix"):
        nvfp4_cast(x[0])
    with pytest.raises(TypeError, match="cast the tensor first"):
        nvfp4_cast(x.int())
    with pytest.raises(ValueError, match="only the transposition is transformed"):
        nvfp4_cast(x, signs=SIGNS)
    with pytest.raises(ValueError, match="without signs"):
        nvfp4_cast(x, transposed=True, signs=SIGNS, block=BLOCKWISE_16X16)
    with pytest.raises(ValueError, match=r"blocks of \(1, 32\)"):
        nvfp4_cast(x, block=(1, 32))
    with pytest.raises(ValueError, match="want 16 of 1 and -1"):
        nvfp4_cast(x, transposed=True, signs=SIGNS[:8])
