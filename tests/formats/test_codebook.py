"""The dynamic 8-bit maps: published construction, order, nearest rule by brute force."""

import pytest
import torch

from aotrain.formats.codebook import decode_dynamic, dynamic_codebook, encode_dynamic

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


def test_ties_go_up():
    values = dynamic_codebook(False, CPU)
    midpoint = (values[200] + values[201]) * 0.5
    assert encode_dynamic(midpoint.reshape(1), False).item() == 201
