"""Schemes: what training sees is what the codes say, in every dtype; names; shapes that a scheme cannot take."""

import pytest
import torch

from aotrain.formats import MappingType, integer_format, nvfp4_global_scale
from aotrain.quantization import SCHEMES, get_scheme
from aotrain.quantization.fused_groups import shared_global_scale
from aotrain.quantization.schemes import AffineScheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_values_are_decoded_codes(name: str, dtype: torch.dtype):
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    for scheme in filter(None, (SCHEMES[name].weight, SCHEMES[name].activation)):
        encoded = scheme.encode(x)
        values = scheme.values(x)
        assert values.dtype == dtype
        assert torch.equal(values, scheme.decode(encoded, dtype))
        assert encoded.data.shape == x.shape
        assert (values - x).float().norm() < 0.5 * x.float().norm()


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros(name: str):
    x = torch.zeros(128, 128)
    assert torch.equal(SCHEMES[name].weight.values(x), x)


@pytest.mark.parametrize("name", [name for name in SCHEMES if isinstance(SCHEMES[name].weight, AffineScheme)])
def test_training_in_float32_for_a_bfloat16_server(name: str):
    """Codes and scales of the scheme decode to the same bfloat16 numbers that a float32 forward rounds to."""
    scheme = get_scheme(name, scale_dtype=torch.bfloat16).weight
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    encoded = scheme.encode(x)
    assert encoded.scale.dtype == torch.bfloat16
    assert torch.equal(scheme.decode(encoded, torch.bfloat16), scheme.values(x).bfloat16())


def test_gradients_of_scales_are_those_of_the_maximum():
    """Against autograd in float64 of a definition whose rounding passes gradients straight through."""
    scheme = AffineScheme(integer_format(2, group_size=32), scale_gradient=True)
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    leaf = x.double().requires_grad_()
    groups = leaf.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 1.5
    steps = groups / scale
    codes = scheme.encode(x).data.unflatten(-1, (-1, 32))
    rounded = torch.where((steps.round() >= -2) & (steps.round() <= 1), steps + (codes - steps).detach(), codes)
    (want,) = torch.autograd.grad((rounded * scale).flatten(1), leaf, grad.double())
    got = scheme.pass_gradient(grad, x)
    assert (got - want).norm() < 1e-6 * want.norm()
    assert torch.equal(got, scheme.pass_gradient_(grad.clone(), x))
    # Quantization is homogeneous: Euler's theorem, group by group.
    inner = [(a * b).unflatten(-1, (-1, 32)).sum(-1) for a, b in ((got, x), (grad, scheme.values(x)))]
    assert torch.allclose(*inner, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_scales_leave_zeros_and_broken_groups_alone(dtype: torch.dtype):
    scheme = AffineScheme(integer_format(2, group_size=32), scale_gradient=True)
    x, grad = torch.randn(4, 64).to(dtype), torch.ones(4, 64, dtype=dtype)
    x[0] = 0
    x[1, 5], x[2, 40] = float("nan"), float("inf")
    got = scheme.pass_gradient(grad, x)
    assert got.dtype == dtype
    assert got.isfinite().all()
    assert torch.equal(got[0], grad[0])
    assert not got[1, :32].any()
    assert not got[2, 32:].any()


def test_gradients_of_scales_need_a_symmetric_mapping():
    with pytest.raises(ValueError, match="want a symmetric mapping"):
        AffineScheme(integer_format(8, mapping=MappingType.ASYMMETRIC), scale_gradient=True)


def test_an_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="got 'int4g32'; did you mean 'int4-g32'"):
        get_scheme("int4g32")


def test_shapes_that_a_scheme_cannot_take():
    assert SCHEMES["int4-g32"].problem(8, 64) is None
    assert "no multiple of the group size 32" in SCHEMES["int4-g32"].problem(8, 40)
    assert "16" in SCHEMES["nvfp4"].problem(8, 40)
    assert SCHEMES["int8"].problem(7, 13) is None


@pytest.mark.parametrize("shape", [(48, 64), (50, 48, 64)], ids=["matrix", "experts"])
def test_global_scales_of_nvfp4_survive_being_stored_as_reciprocals(shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * (1 + torch.rand((*shape[:-2], 1, 1), generator=generator))
    encoded = SCHEMES["nvfp4"].weight.encode(weight)
    assert encoded.global_scale.shape == (*shape[:-2], 1, 1)
    assert torch.equal(encoded.global_scale.reciprocal().reciprocal(), encoded.global_scale)
    own = nvfp4_global_scale(weight.abs().amax(dim=(-2, -1), keepdim=True))
    assert (encoded.global_scale.view(torch.int32) - own.view(torch.int32)).abs().max() <= 1
    if len(shape) == 3:
        assert not torch.equal(own.reciprocal().reciprocal(), own)  # or this test says nothing
        for expert, global_scale in zip(weight, encoded.global_scale, strict=True):
            assert torch.equal(global_scale, shared_global_scale([expert.abs().amax()]).reshape(1, 1))
            served = SCHEMES["nvfp4"].weight.encode(expert, global_scale=global_scale)
            assert torch.equal(served.global_scale, global_scale)
