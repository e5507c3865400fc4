"""State layout: what is quantized, shapes and dtypes, bytes per parameter, rounding error of the moments."""

import pytest
import torch
from torch import nn

from aotrain.optim import AdamW4bit, AdamW8bit, AdamWFp8
from aotrain.optim.state import (
    Dynamic4bitMoment,
    Dynamic8bitMoment,
    Float8Moment,
    Float32Moment,
    adam_moments,
    check_bits,
    is_quantized,
)
from aotrain.testing import assert_bitwise_equal, sqnr


@pytest.mark.parametrize(
    ("shape", "quantized"),
    [
        ((64, 64), True),
        ((63, 65), False),  # 4095 elements
        ((4096,), False),
        ((4096, 1), False),
        ((128, 32), False),  # rows below 64
        ((16, 3, 9, 11), True),
        ((), False),
    ],
)
def test_which_parameters_are_quantized(shape, quantized: bool):
    assert is_quantized(torch.empty(shape, device="meta")) is quantized


MOMENTS = [Dynamic8bitMoment, Dynamic4bitMoment, Float8Moment]
# dB on normal data (first moment) and its square (second), per block of 64; measured 38.4 / 39.4, 17.7 / 17.2 and
# 31.8 / 31.7 for rows of 200.
SQNR_DB = {Dynamic8bitMoment: 34.0, Dynamic4bitMoment: 14.0, Float8Moment: 28.0}


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize(("shape", "block", "blocks"), [((64, 100), 32, 4), ((64, 128), 256, 1), ((8, 4, 161), 256, 3)])
def test_blocks_lie_along_rows_with_a_ragged_tail(kind, shape, block: int, blocks: int):
    state = kind("exp_avg", True, block).init(torch.zeros(shape))
    rows = shape[1] * (shape[2] if len(shape) == 3 else 1)
    assert state["exp_avg_codes"].shape == ((shape[0], (rows + 1) // 2) if kind is Dynamic4bitMoment else shape)
    assert state["exp_avg_codes"].dtype == torch.uint8
    assert state["exp_avg_scale"].shape == (shape[0], blocks)
    assert state["exp_avg_scale"].dtype == torch.float32


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("signed", [True, False])
def test_write_then_read(kind, signed: bool):
    moment = kind("m", signed, 64)
    value = torch.randn(32, 201)
    value = value if signed else value.square()
    state = moment.init(value)
    assert bool((moment.read(state, value).abs() <= 1e-12).all())
    moment.write(state, value)
    decoded = moment.read(state, value)
    assert sqnr(value, decoded) > SQNR_DB[kind]
    for row in range(32):
        for start in range(0, 201, 64):
            amax = value[row, start : start + 64].abs().max()
            want = amax / torch.tensor(448.0) if kind is Float8Moment else amax
            assert state["m_scale"][row, start // 64] == want
    if not signed and kind is not Float8Moment:
        # The signed maps have no code for -1, so a block whose largest magnitude is negative shrinks.
        moment.write(state, decoded)
        assert_bitwise_equal(moment.read(state, value), decoded)


@pytest.mark.parametrize("kind", MOMENTS)
def test_splitting_rows_splits_state(kind):
    moment, value = kind("m", True, 64), torch.randn(33, 151)
    whole = moment.init(value)
    moment.write(whole, value)
    for rows in (slice(0, 7), slice(7, 33)):
        part = moment.init(value[rows])
        moment.write(part, value[rows])
        for key in part:
            assert_bitwise_equal(part[key], whole[key][rows])


@pytest.mark.parametrize("kind", MOMENTS)
def test_a_non_finite_value_makes_its_block_visibly_bad_and_no_other(kind):
    moment = kind("m", True, 64)
    value = torch.randn(4, 128)
    value[1, 70] = torch.nan
    value[2, 3] = torch.inf
    state = moment.init(value)
    moment.write(state, value)
    decoded = moment.read(state, value)
    for row, columns in ((1, slice(64, 128)), (2, slice(0, 64))):
        assert not bool(decoded[row, columns].isfinite().any())
    bad = torch.zeros(4, 128, dtype=torch.bool)
    bad[1, 64:], bad[2, :64] = True, True
    assert bool(decoded[~bad].isfinite().all())


def test_layout_is_the_flat_one_where_blocks_divide_rows():
    moment, value = Dynamic8bitMoment("m", True, 64), torch.randn(16, 256)
    rows, flat = moment.init(value), Dynamic8bitMoment("m", True, 64).init(value.view(64, 64))
    moment.write(rows, value)
    moment.write(flat, value.view(64, 64))
    assert_bitwise_equal(rows["m_codes"].flatten(), flat["m_codes"].flatten())
    assert_bitwise_equal(rows["m_scale"].flatten(), flat["m_scale"].flatten())


def test_moments_of_adam():
    small, large = torch.zeros(8, 8), torch.zeros(128, 128)
    assert adam_moments(small, block_size=256, amsgrad=False) == (Float32Moment("exp_avg"), Float32Moment("exp_avg_sq"))
    moments = adam_moments(large, block_size=256, amsgrad=True)
    assert [(m.name, m.signed) for m in moments] == [
        ("exp_avg", True),
        ("exp_avg_sq", False),
        ("max_exp_avg_sq", False),
    ]


def test_bits_accept_numbers_and_strings():
    assert [check_bits(value) for value in (8, "8", 4, "4", "fp8", 32, "32")] == [8, 8, 4, 4, "fp8", 32, 32]
    for wrong in (16, "int8", None, 8.5):
        with pytest.raises(ValueError, match="want one of 8, 4, 'fp8', 32"):
            check_bits(wrong)


def bytes_per_parameter(optimizer_class, shapes, **options) -> float:
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = optimizer_class(weights, **options)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    state_bytes = sum(
        value.numel() * value.element_size()
        for weight in weights
        for key, value in optimizer.state[weight].items()
        if key != "step"
    )
    return state_bytes / sum(weight.numel() for weight in weights)


def test_bytes_per_quantized_parameter_of_the_demo_model():
    """Rows of 128, half a block: 1 byte of code and 4/128 of scale per moment."""
    shapes = ((320, 128), (128, 128), (352, 128), (128, 352))
    assert bytes_per_parameter(AdamW8bit, shapes) <= 2.1


# A Llama 3 layer with its embedding and norms, at an eighth of the width of the 8B model.
LLAMA = [(2003, 512), *4 * [(512, 512)], (128, 512), (128, 512), (1792, 512), (512, 1792), (1792, 512), (512,), (512,)]


@pytest.mark.parametrize(("kind", "bound"), [(AdamW8bit, 2.04), (AdamW4bit, 1.07), (AdamWFp8, 2.04)])
def test_bytes_per_parameter_of_a_llama(kind, bound: float):
    assert bytes_per_parameter(kind, LLAMA) <= bound
