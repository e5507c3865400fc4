"""NVFP4 against its formulas in exact arithmetic, its special values, and its error."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from aotrain.formats import (
    BLOCKWISE_1X16,
    BLOCKWISE_16X16,
    ELEMENT_FORMATS,
    FLOAT4_E2M1,
    FLOAT8_E4M3,
    SCALE_FORMATS,
    Nvfp4Tensor,
    Scaling,
    decode_elements,
    dequantize_nvfp4,
    fake_quantize,
    nvfp4_global_scale,
    philox_bits16,
    quantize_nvfp4,
    scale_shape,
)
from aotrain.formats.scaling import expand_blocks
from aotrain.testing import adversarial_matrix, all_bfloat16_values, assert_bitwise_equal, sqnr
from tests.formats.reference import finite_values, nearest_even

BLOCKS = [BLOCKWISE_1X16, BLOCKWISE_16X16]
# Measured on three normal matrices 130 x 200: nearest 20.5 dB (1x16), 19.0-19.1 (16x16); stochastic 17.3-17.4, 16.0.
SQNR_DB = {BLOCKWISE_1X16: 20.0, BLOCKWISE_16X16: 18.5}
SQNR_DB_STOCHASTIC = {BLOCKWISE_1X16: 16.8, BLOCKWISE_16X16: 15.5}


def reference(x: torch.Tensor, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """(values, scales, global scale) by the formulas of docs/numerics.md, block by block in numpy's float32."""
    x_np = x.float().numpy()
    one = np.float32(1)
    global_scale = np.float32(max(float(np.abs(x_np).max()), 1e-12) / 2688)
    values, scales = np.zeros_like(x_np), np.zeros(scale_shape(x.shape, block), dtype=np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            relative = np.abs(x_np[at]).max() / np.float32(6) / global_scale
            scales[i, j] = max(nearest_even(np.array([relative]), FLOAT8_E4M3)[0], 2.0**-9)
            values[at] = nearest_even(x_np[at] * (one / global_scale / scales[i, j]), FLOAT4_E2M1)
    return values, scales, global_scale


def assert_follows_the_formulas(x: torch.Tensor, block: tuple[int, int]) -> None:
    q = quantize_nvfp4(x, block=block)
    values, scales, global_scale = reference(x, block)
    assert q.global_scale.shape == (1, 1)
    assert q.global_scale.item() == global_scale
    np.testing.assert_array_equal(q.scale.float().numpy(), scales)
    np.testing.assert_array_equal(decode_elements(q.data, torch.float32, FLOAT4_E2M1).numpy(), values)
    expanded = expand_blocks(torch.from_numpy(scales), x.shape, block).numpy()
    np.testing.assert_array_equal(dequantize_nvfp4(q).numpy(), (values * expanded) * global_scale)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (32, 48), (37, 100), (5, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_follows_the_formulas(dtype: torch.dtype, shape: tuple[int, int], block: tuple[int, int]):
    assert_follows_the_formulas(torch.randn(shape).to(dtype), block)
    assert_follows_the_formulas(
        (torch.randn(shape) * torch.exp2(torch.randint(-12, 1, shape).float())).to(dtype), block
    )
    assert_follows_the_formulas(adversarial_matrix(*shape, dtype), block)


def test_every_bfloat16_value_as_a_block_of_a_matrix():
    """The maxima of the blocks are all finite bfloat16 values: scales from the lower bound up to 448."""
    values = all_bfloat16_values()
    values = values[values.isfinite()]
    for largest in (1.0, 2.0**-100, torch.finfo(torch.bfloat16).max):
        amax = values[values.float().abs() <= largest].float()
        x = amax[:, None] * torch.tensor([1.0, -0.7, 0.3, 0.0])
        x[0, 0] = largest
        q = quantize_nvfp4(x)
        relative = x.abs().amax(1).numpy() / np.float32(6) / q.global_scale.numpy()[0]
        want = np.maximum(nearest_even(relative, FLOAT8_E4M3), 2.0**-9)
        np.testing.assert_array_equal(q.scale.float().numpy()[:, 0], want)
        inverse = np.float32(1) / q.global_scale.numpy() / want.astype(np.float32)[:, None]
        decoded = decode_elements(q.data, torch.float32, FLOAT4_E2M1).numpy()
        np.testing.assert_array_equal(decoded, nearest_even(x.numpy() * inverse, FLOAT4_E2M1))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_error_of_a_normal_matrix(block: tuple[int, int]):
    x = torch.randn(130, 200)
    q = quantize_nvfp4(x, block=block)
    assert q.data.dtype == torch.uint8
    assert q.data.shape == x.shape
    assert q.scale.shape == scale_shape(x.shape, block)
    assert q.scale.dtype == torch.float8_e4m3fn
    assert sqnr(x, dequantize_nvfp4(q)) >= SQNR_DB[block]
    noise = philox_bits16(1, torch.arange(x.numel())).view(x.shape)
    assert sqnr(x, dequantize_nvfp4(quantize_nvfp4(x, block=block, noise=noise))) >= SQNR_DB_STOCHASTIC[block]


def test_is_better_than_mxfp4():
    x = torch.randn(64, 256)
    mxfp4 = Scaling(element=ELEMENT_FORMATS["float4_e2m1fn"], scale=SCALE_FORMATS["e8m0_rceil"], block=(1, 32))
    assert sqnr(x, dequantize_nvfp4(quantize_nvfp4(x))) > sqnr(x, fake_quantize(x, mxfp4)) + 1


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_requantizing_with_the_same_scales_changes_nothing(block: tuple[int, int], seed: int):
    for x in (adversarial_matrix(37, 100, torch.float32, seed), torch.randn(40, 64)):
        q = quantize_nvfp4(x, block=block)
        again = quantize_nvfp4(dequantize_nvfp4(q), block=block, scale=q.scale, global_scale=q.global_scale)
        assert_bitwise_equal(again.data, q.data)
        noise = philox_bits16(seed, torch.arange(x.numel())).view(x.shape)
        given_scales = quantize_nvfp4(x, block=block, scale=q.scale, global_scale=q.global_scale)
        assert_bitwise_equal(given_scales.data, q.data)
        noisy = quantize_nvfp4(x, block=block, noise=noise)
        assert_bitwise_equal(noisy.scale.view(torch.uint8), q.scale.view(torch.uint8))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_zeros_stay_zeros_and_scales_are_positive(block: tuple[int, int]):
    q = quantize_nvfp4(torch.zeros(20, 40), block=block)
    assert not dequantize_nvfp4(q).any()
    assert q.global_scale.item() > 0
    assert bool((q.scale.float() > 0).all())
    tiny = torch.ones(1, 48)
    tiny[0, 16:32] *= 2.0**-30  # rounds to a scale of zero
    tiny[0, 32:] = 0
    q = quantize_nvfp4(tiny)
    assert q.scale.float().tolist()[0] == [448.0, 2.0**-9, 2.0**-9]
    assert dequantize_nvfp4(q)[0, 16:].tolist() == [0.0] * 32


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_non_finite_value_shows_in_the_matrix_or_under_a_given_scale_in_its_block(bad: float):
    x = torch.randn(2, 3, 64)
    clean = quantize_nvfp4(x)
    x[1, 1, 20] = bad
    own = quantize_nvfp4(x)
    assert bool(dequantize_nvfp4(own)[1].isnan().all())
    assert_bitwise_equal(own.data[0], clean.data[0])
    q = quantize_nvfp4(x, global_scale=clean.global_scale)
    is_nan = dequantize_nvfp4(q).isnan()
    assert bool(is_nan[1, 1, 16:32].all())
    assert is_nan.sum() == 16
    assert q.scale.view(torch.uint8)[1, 1, 1] == 0x7F
    assert torch.equal(q.data[~is_nan], clean.data[~is_nan])


def test_a_given_scale_saturates():
    x = torch.tensor([[math.inf, -math.inf, 100.0, math.nan, 1.0, 0.2]])
    q = quantize_nvfp4(x, scale=torch.ones(1, 1).to(torch.float8_e4m3fn), global_scale=torch.ones(1, 1))
    assert dequantize_nvfp4(q)[0].tolist() == [6.0, -6.0, 6.0, 0.0, 1.0, 0.0]


def test_one_global_scale_per_matrix_of_a_batch_or_one_for_all():
    x = torch.randn(3, 20, 40) * torch.tensor([1.0, 100.0, 1e-3])[:, None, None]
    q = quantize_nvfp4(x, block=BLOCKWISE_16X16)
    assert q.global_scale.shape == (3, 1, 1)
    for i in range(3):
        one = quantize_nvfp4(x[i], block=BLOCKWISE_16X16)
        assert_bitwise_equal(q.data[i], one.data)
        assert_bitwise_equal(q.global_scale[i], one.global_scale)
    shared = quantize_nvfp4(x, global_scale=nvfp4_global_scale(x.abs().max()))
    assert shared.global_scale.unique().numel() == 1
    assert shared.scale.float().max() == 448


def test_a_weight_and_its_transpose_have_the_same_codes():
    w = torch.randn(50, 70)
    q, q_t = (quantize_nvfp4(matrix, block=BLOCKWISE_16X16) for matrix in (w, w.t()))
    assert_bitwise_equal(q_t.data, q.data.t().contiguous())
    assert_bitwise_equal(q_t.scale, q.scale.t().contiguous())
    # What a product reads: the scale of a row and 16 columns.
    per_row = expand_blocks(q.scale.view(torch.uint8), (50, 5), (16, 1)).view(torch.float8_e4m3fn)
    as_rows = Nvfp4Tensor(q.data, per_row, q.global_scale, BLOCKWISE_1X16)
    assert_bitwise_equal(dequantize_nvfp4(as_rows), dequantize_nvfp4(q))


@pytest.mark.parametrize("shape", [(0, 32), (32, 0), (0, 0), (0, 4, 32)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_empty(shape: tuple[int, ...], block: tuple[int, int]):
    q = quantize_nvfp4(torch.empty(shape), block=block)
    assert q.data.shape == shape
    assert q.scale.shape == scale_shape(shape, block)
    assert dequantize_nvfp4(q).shape == shape


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_stochastic_rounding_takes_the_neighbour_that_the_noise_says(block: tuple[int, int]):
    x = torch.cat([torch.randn(37, 100), adversarial_matrix(37, 100, torch.float32)])
    q = quantize_nvfp4(x, block=block)
    inv_scale = np.float32(1) / q.global_scale.numpy() / expand_blocks(q.scale.float(), x.shape, block).numpy()
    scaled = np.minimum(np.abs(x.numpy() * inv_scale), np.float32(6))
    values = finite_values(FLOAT4_E2M1)
    values = values[values >= 0]
    low = np.searchsorted(values, scaled, side="right") - 1
    step = np.append(np.diff(values), 1.0)[low]
    for noise in (0, 0x3FFF, 0x8000, 0xFFFF):
        up = (scaled.astype(np.float64) - values[low]) / step + noise / 2**16 >= 1
        noisy = quantize_nvfp4(x, block=block, noise=torch.full(x.shape, noise))
        got = decode_elements(noisy.data, torch.float32, FLOAT4_E2M1).numpy()
        np.testing.assert_array_equal(np.abs(got), values[low + up])
        np.testing.assert_array_equal(np.signbit(got), np.signbit(x.numpy()))


def test_compiles_into_one_graph_with_equal_bits_and_runs_on_fake_tensors():
    x = adversarial_matrix(37, 100)
    compiled = torch.compile(lambda x: tuple(quantize_nvfp4(x)[:3]), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x), quantize_nvfp4(x)[:3], strict=True):
        assert_bitwise_equal(actual, expected)
    with FakeTensorMode() as mode:
        assert dequantize_nvfp4(quantize_nvfp4(mode.from_tensor(x))).shape == x.shape


def test_stochastic_rounding_is_unbiased_within_the_range():
    x = torch.rand(1, 64) * 2 - 1
    x[0, ::16] = 1.0  # the block scales are 448 exactly: nothing saturates
    many = x.repeat(4000, 1)
    noise = philox_bits16(7, torch.arange(many.numel())).view(many.shape)
    mean = dequantize_nvfp4(quantize_nvfp4(many, noise=noise)).double().mean(0)
    # 4000 draws leave 1/sqrt(4000) of the error of one, 36 dB less than 17 dB.
    assert sqnr(x[0].double(), mean) > SQNR_DB_STOCHASTIC[BLOCKWISE_1X16] + 30


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    exponent=st.integers(-30, 60),
    block=st.sampled_from(BLOCKS),
)
def test_error_is_at_most_a_step_of_the_block_maximum(rows: int, columns: int, exponent: int, block: tuple[int, int]):
    x = torch.randn(rows, columns) * 2.0**exponent
    q = quantize_nvfp4(x, block=block)
    amax = expand_blocks(torch.nn.functional.max_pool2d(x.abs()[None], block, ceil_mode=True)[0], x.shape, block)
    # Half a step of 2 at 6 is amax / 6; the scale is off by up to 1/17, and by half of 2^-9 where it is subnormal.
    bound = amax * (1 / 6 * 17 / 16 + 1 / 16) + 6 * 2.0**-10 * q.global_scale
    assert bool(((x - dequantize_nvfp4(q)).abs() <= bound).all())


def test_bad_arguments_say_what_to_do():
    x = torch.ones(4, 32)
    q = quantize_nvfp4(x)
    with pytest.raises(TypeError, match="cast the tensor first"):
        quantize_nvfp4(x.int())
    with pytest.raises(ValueError, match="without a global scale"):
        quantize_nvfp4(x, scale=q.scale)
    with pytest.raises(ValueError, match=r"want shape \(4, 2\)"):
        quantize_nvfp4(x, scale=q.scale[:, :1], global_scale=q.global_scale)
    with pytest.raises(ValueError, match="want one float32 value"):
        quantize_nvfp4(x, global_scale=torch.ones(4, 1))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        quantize_nvfp4(torch.ones(16))
