"""Groups of layers that servers join, and a scale that survives its reciprocal."""

import pytest
import torch

from aotrain.formats import nvfp4_global_scale
from aotrain.quantization.fused_groups import fused_groups, shared_global_scale


def test_groups_share_a_parent():
    names = [
        *("a.q_proj.weight", "a.o_proj.weight", "a.k_proj.weight", "b.q_proj.weight", "a.v_proj.weight"),
        *("m.experts.0.gate_proj", "m.experts.1.gate_proj", "m.experts.0.up_proj", "q_proj", "w3", "w1", "w2"),
    ]
    assert fused_groups(names) == [
        ("a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight"),
        ("a.o_proj.weight",),
        ("b.q_proj.weight",),
        ("m.experts.0.gate_proj", "m.experts.0.up_proj"),
        ("m.experts.1.gate_proj",),
        ("q_proj",),
        ("w3", "w1"),
        ("w2",),
    ]


def test_the_shared_scale_is_that_of_the_largest_member_and_its_divisor_gives_it_back():
    amax = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).abs() * 10
    plain = nvfp4_global_scale(amax)
    shared = torch.cat([shared_global_scale([each, each / 2]) for each in amax[:100]])
    assert torch.equal(shared, plain[:100].reciprocal().reciprocal())
    twice = plain.reciprocal().reciprocal()
    assert torch.equal(twice.reciprocal().reciprocal(), twice)
    assert not torch.equal(plain, twice)  # what the second rounding is for
    steps = (plain.view(torch.int32) - twice.view(torch.int32)).abs()
    assert steps.max() == 1


def test_no_members():
    with pytest.raises(ValueError, match="no members"):
        shared_global_scale([])
