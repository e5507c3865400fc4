"""The C++ Hadamard transform and stochastic rounding against the definition, bit for bit."""

import math
from dataclasses import replace

import pytest
import torch

from aotrain.formats import (
    BLOCKWISE_1X32,
    FLOAT4_E2M1,
    FLOAT8_E4M3,
    SCALE_FORMATS,
    Scaling,
    hadamard_signs,
    quantize_mx,
)
from aotrain.formats import hadamard_transform as reference
from aotrain.kernels import _mx_cpu as cpu
from aotrain.kernels import mx_cast
from aotrain.testing import adversarial_matrix, all_bfloat16_values, assert_bitwise_equal
from tests.kernels.native import build_or_skip

STOCHASTIC = Scaling(
    element=FLOAT4_E2M1, scale=SCALE_FORMATS["e8m0_rceil"], block=BLOCKWISE_1X32, rounding="stochastic"
)
SCALES = [name for name in SCALE_FORMATS if name.startswith("e8m0")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows of one chunk and of several, and tails.
SHAPES = [(1, 1), (5, 37), (3, 4, 33), (64, 96), (3, 4099), (2, 8192)]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_or_skip("mx_operand", cpu)


def assert_casts(x: torch.Tensor, scaling: Scaling) -> None:
    assert cpu.stochastic_problem(x, scaling.element.name) is None
    got, want = mx_cast(x, scaling), quantize_mx(x.contiguous(), scaling)
    assert_bitwise_equal(got.scale, want.scale, what="scale")
    assert_bitwise_equal(got.data, want.data, what="data")


@pytest.mark.parametrize("hadamard", [0, 16, 32])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stochastic_rounding_of_every_shape_and_scale(shape, scale: str, hadamard: int):
    scaling = replace(STOCHASTIC, scale=SCALE_FORMATS[scale], hadamard=hadamard)
    for dtype in DTYPES:
        x = torch.randn(shape).to(dtype)
        assert_casts(x, scaling)
        assert_casts(x.mT, scaling)


@pytest.mark.parametrize("scale", SCALES)
def test_every_magnitude(scale: str):
    scaling = replace(STOCHASTIC, scale=SCALE_FORMATS[scale])
    values = all_bfloat16_values().view(256, 256)
    assert_casts(values, scaling)
    assert_casts(values.float() * 1.0078125, scaling)
    assert_casts(values.view(torch.float16), scaling)
    for dtype in DTYPES:
        assert_casts(adversarial_matrix(75, 333, dtype), scaling)
    x = torch.randn(8, 100)
    x[1, 3], x[2, 40], x[3, 99], x[4, :2] = math.inf, math.nan, -math.nan, torch.tensor([-math.inf, math.nan])
    assert_casts(x, scaling)


@pytest.mark.parametrize("size", [1, 2, 16, 32, 64])
def test_the_transform(size: int):
    signs = hadamard_signs(3, size)
    for shape in ((3, 100), (2, 3, 64), (1, 1)):
        for dtype in DTYPES:
            x = torch.randn(shape).to(dtype)
            assert_bitwise_equal(cpu.hadamard_transform(x, signs), reference(x, signs))
            assert_bitwise_equal(cpu.hadamard_transform(x.mT, signs), reference(x.mT, signs))


def test_threads_do_not_change_the_bits():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_casts(torch.randn(37, 5000), replace(STOCHASTIC, hadamard=32))
    finally:
        torch.set_num_threads(threads)


def test_what_it_does_not_do():
    x = torch.randn(2, 32)
    assert "float8_e4m3fn" in (cpu.stochastic_problem(x, FLOAT8_E4M3.name) or "")
    assert "empty" in (cpu.stochastic_problem(x[:0], FLOAT4_E2M1.name) or "")
    scaling = replace(STOCHASTIC, element=FLOAT8_E4M3)
    assert_bitwise_equal(mx_cast(x, scaling).data, quantize_mx(x, scaling).data)
