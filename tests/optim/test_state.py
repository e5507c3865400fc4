"""State layout: what is quantized, shapes and dtypes, bytes per parameter, rounding error of the moments."""

import pytest
import torch
from torch import nn

from aotrain.optim import AdamW8bit
from aotrain.optim.state import Dynamic8bitMoment, Float32Moment, adam_moments, is_quantized
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


@pytest.mark.parametrize(("shape", "block", "blocks"), [((64, 100), 32, 4), ((64, 128), 256, 1), ((8, 4, 160), 256, 3)])
def test_blocks_lie_along_rows_with_a_ragged_tail(shape, block: int, blocks: int):
    state = Dynamic8bitMoment("exp_avg", True, block).init(torch.zeros(shape))
    assert state["exp_avg_codes"].shape == shape
    assert state["exp_avg_codes"].dtype == torch.uint8
    assert state["exp_avg_scale"].shape == (shape[0], blocks)
    assert state["exp_avg_scale"].dtype == torch.float32


@pytest.mark.parametrize("signed", [True, False])
def test_write_then_read(signed: bool):
    """7 decades with 2 to 3 significant digits at the top: 38 dB measured on normal data, both signs."""
    moment = Dynamic8bitMoment("m", signed, 64)
    value = torch.randn(32, 200)
    value = value if signed else value.square()
    state = moment.init(value)
    assert not moment.read(state, value).any()
    moment.write(state, value)
    decoded = moment.read(state, value)
    assert sqnr(value, decoded) > 34
    for row in range(32):
        for start in range(0, 200, 64):
            block = slice(start, start + 64)
            assert state["m_scale"][row, start // 64] == value[row, block].abs().max()
    if not signed:  # the signed map has no code for -1, so a block whose largest magnitude is negative shrinks
        moment.write(state, decoded)
        assert_bitwise_equal(moment.read(state, value), decoded)


def test_splitting_rows_splits_state():
    moment, value = Dynamic8bitMoment("m", True, 64), torch.randn(33, 150)
    whole = moment.init(value)
    moment.write(whole, value)
    for rows in (slice(0, 7), slice(7, 33)):
        part = moment.init(value[rows])
        moment.write(part, value[rows])
        for key in part:
            assert_bitwise_equal(part[key], whole[key][rows])


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


def test_bytes_per_quantized_parameter():
    """Rows of 128, half a block, as in the demo model: 1 byte of code and 4/128 of scale per moment."""
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((320, 128), (128, 128), (352, 128), (128, 352))]
    optimizer = AdamW8bit(weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    state_bytes = sum(
        value.numel() * value.element_size()
        for weight in weights
        for key, value in optimizer.state[weight].items()
        if key != "step"
    )
    assert state_bytes / sum(weight.numel() for weight in weights) <= 2.1
