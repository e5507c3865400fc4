"""The 8-bit and 4-bit maps: published construction, order, nearest rule by brute force, packing."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from aotrain.formats.codebook import (
    decode_dynamic,
    dynamic_codebook,
    encode_dynamic,
    pack_nibbles,
    unpack_nibbles,
)
from aotrain.testing import assert_bitwise_equal

CPU = torch.device("cpu")


def published_map(signed: bool) -> torch.Tensor:
    """Construction of section 2.2 of the paper, decade by decade in float64."""
    values = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float64)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += means.tolist()
        if signed:
            values += (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float64)


@pytest.mark.parametrize("signed", [True, False])
def test_values_are_the_published_map_to_float32_rounding(signed: bool):
    values = dynamic_codebook(signed, CPU)
    want = published_map(signed)
    assert values.shape == want.shape == (256,)
    assert bool((values.diff() > 0).all())
    assert bool(((values - want).abs() <= want.abs() * 2.0**-22).all())
    assert 0.0 in values
    assert values[-1] == 1.0


@pytest.mark.parametrize("signed", [True, False])
def test_codes_round_trip(signed: bool):
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(encode_dynamic(decode_dynamic(codes, signed), signed), codes)


@pytest.mark.parametrize("signed", [True, False])
def test_encode_is_the_nearest_code(signed: bool):
    values = dynamic_codebook(signed, CPU).double()
    x = torch.cat([torch.randn(5000) * 0.3, torch.randn(5000) * 1e-4, torch.tensor([-2.0, 2.0, 0.0, 1.0])])
    x = x if signed else x.abs()
    chosen = values[encode_dynamic(x, signed).long()]
    best = (x.double()[:, None] - values).abs().amin(dim=1)
    # Equal up to the rounding of the float32 midpoint.
    assert bool(((x.double() - chosen).abs() <= best + x.double().abs() * 2.0**-23).all())


def test_four_bit_maps_are_the_published_ones():
    signed = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    want = [-value for value in reversed(signed)] + [0.0, *signed, 1.0]
    assert dynamic_codebook(True, CPU, 4).tolist() == pytest.approx(want, rel=2.0**-22)
    assert dynamic_codebook(False, CPU, 4).tolist() == [k / 16 for k in range(1, 17)]


@pytest.mark.parametrize("signed", [True, False])
def test_four_bit_encode_is_the_nearest_code(signed: bool):
    values = dynamic_codebook(signed, CPU, 4).double()
    x = torch.cat([torch.linspace(-1.1, 1.1, 5001), torch.randn(5000) * 0.05])
    x = x if signed else x.abs()
    codes = encode_dynamic(x, signed, bits=4)
    assert codes.max() <= 15
    best = (x.double()[:, None] - values).abs().amin(dim=1)
    assert bool(((x.double() - values[codes.long()]).abs() <= best + x.double().abs() * 2.0**-23).all())
    assert torch.equal(encode_dynamic(decode_dynamic(codes, signed, bits=4), signed, bits=4), codes)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 64])
def test_nibbles_round_trip_with_the_even_element_on_top(length: int):
    codes = torch.randint(0, 16, (3, length), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (3, (length + 1) // 2)
    assert_bitwise_equal(unpack_nibbles(packed, length), codes)
    if length > 1:
        assert packed[0, 0] == codes[0, 0] * 16 + codes[0, 1]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [True, False])
def test_encode_is_the_search_over_midpoints_at_and_beside_every_one(signed: bool, bits: int):
    values = dynamic_codebook(signed, CPU, bits)
    midpoints = (values[:-1] + values[1:]) * 0.5
    x = [midpoints, midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0))]
    x += [torch.randn(100_000) * scale for scale in (1.0, 1e-2, 1e-6, 1e-38)]
    x += [torch.tensor([0.0, -0.0, 1.0, -1.0, 5.0, -5.0, torch.inf, -torch.inf, torch.nan, -torch.nan])]
    x = torch.cat(x)
    want = torch.bucketize(x, midpoints, right=True).to(torch.uint8)
    assert_bitwise_equal(encode_dynamic(x, signed, bits), want)


def test_ties_go_up():
    values = dynamic_codebook(False, CPU)
    midpoint = (values[200] + values[201]) * 0.5
    assert encode_dynamic(midpoint.reshape(1), False).item() == 201


def test_tables_built_under_fake_tensors_are_not_kept():
    values = torch.rand(100)
    want = decode_dynamic(encode_dynamic(values, True), True)
    with FakeTensorMode():
        for bits in (8, 4):
            fake = encode_dynamic(torch.rand(100), signed=True, bits=bits)
            assert decode_dynamic(fake, signed=True, bits=bits).shape == (100,)
    assert_bitwise_equal(decode_dynamic(encode_dynamic(values, True), True), want)
