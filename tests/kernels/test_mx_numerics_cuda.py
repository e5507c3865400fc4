"""Scale bytes and codes of the CUDA kernel's header against the definition, compiled for this CPU: bit for bit."""

import ctypes
import math
import subprocess

import pytest
import torch

from aotrain import _build
from aotrain.formats import ELEMENT_FORMATS
from aotrain.formats.e8m0 import E8M0_ROUNDINGS, e8m0_from_amax, e8m0_inverse
from aotrain.formats.rounding import round_nearest
from aotrain.kernels import _mx_cuda
from aotrain.testing import all_bfloat16_values, assert_bitwise_equal
from tests.kernels.mx_host import Host

ELEMENTS = list(_mx_cuda.ELEMENTS)


@pytest.fixture(scope="module")
def host() -> Host:
    return Host()


def largest_magnitudes() -> torch.Tensor:
    """Every exponent with every mantissa of 11 bits and its neighbours, 1.6 million; subnormals, infinity, NaNs."""
    exponents = torch.arange(256, dtype=torch.int32)[:, None, None] << 23
    mantissas = torch.arange(2048, dtype=torch.int32)[None, :, None] << 12
    around = torch.tensor([-1, 0, 1], dtype=torch.int32)
    return (exponents + mantissas + around).flatten().clamp(min=0, max=0x7FFFFFFF).view(torch.float32)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("rounding", E8M0_ROUNDINGS)
def test_scale_bytes(host: Host, element: str, rounding: str):
    amax = largest_magnitudes()
    got = host.scale_bytes(amax, element, rounding)
    assert_bitwise_equal(got, e8m0_from_amax(amax, ELEMENT_FORMATS[element], rounding))
    assert got[amax.isfinite()].max() <= 253  # what inverse_of takes


@pytest.mark.parametrize("element", ELEMENTS)
def test_scale_bytes_at_every_step_of_rceil(host: Host, element: str):
    """The product with fp32(1 / max) crosses a power of two once per binade: there, every neighbour."""
    powers = torch.exp2(torch.arange(-149, 128, dtype=torch.float64)) * ELEMENT_FORMATS[element].max
    bits = powers[powers < 3.4e38].float().view(torch.int32)[:, None] + torch.arange(-500, 501, dtype=torch.int32)
    amax = bits.clamp(min=0, max=0x7F7FFFFF).flatten().view(torch.float32)
    want = e8m0_from_amax(amax, ELEMENT_FORMATS[element], "rceil")
    assert_bitwise_equal(host.scale_bytes(amax, element, "rceil"), want)


def test_inverse_scales(host: Host):
    byte = torch.arange(254, dtype=torch.uint8)
    assert_bitwise_equal(host.inverses(byte), e8m0_inverse(byte))


@pytest.mark.parametrize("element", ELEMENTS)
def test_codes_of_every_bfloat16_under_every_scale(host: Host, element: str):
    values = all_bfloat16_values().float()
    values = values[values.isfinite()]
    for first in range(0, 254, 32):
        inverse = e8m0_inverse(torch.arange(first, min(first + 32, 254), dtype=torch.uint8))
        y = values[None] * inverse[:, None]  # 2 million, infinities among them
        want = round_nearest(y, ELEMENT_FORMATS[element]).view(torch.uint8)
        assert_bitwise_equal(host.codes(y, element), want)


@pytest.mark.parametrize("element", ELEMENTS)
def test_codes_of_ties_their_neighbours_and_random_bits(host: Host, element: str):
    y = awkward_values(element)
    want = round_nearest(y, ELEMENT_FORMATS[element]).view(torch.uint8)
    assert_bitwise_equal(host.codes(y, element), want)


def awkward_values(element: str) -> torch.Tensor:
    """Values halfway between neighbours of the format, what lies 1 to 3 steps of float32 beside, and random bits."""
    fmt = ELEMENT_FORMATS[element]
    steps = torch.arange(2 ** (fmt.mantissa_bits + 2), dtype=torch.float64) / 2 ** (fmt.mantissa_bits + 1)
    binades = torch.exp2(torch.arange(fmt.min_exponent - 4, fmt.max_exponent + 3, dtype=torch.float64))
    ties = torch.cat([(binades[:, None] * steps).flatten(), torch.tensor([fmt.max, fmt.min_subnormal / 2])]).float()
    near = (ties.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)).clamp(min=0).flatten()
    bits = torch.randint(-(2**31), 2**31, (1_000_000,)).int()
    scaled = torch.randn(1_000_000) * fmt.max / 3
    y = torch.cat([near.view(torch.float32), bits.view(torch.float32), scaled, torch.tensor([math.inf])])
    y = torch.cat([y, -y])
    return y[~y.isnan()]


def test_every_half(host: Host):
    x = all_bfloat16_values().view(torch.float16)
    got, want = host.halves(x), x.float()
    assert_bitwise_equal(got[~x.isnan()], want[~x.isnan()])
    assert got[x.isnan()].isnan().all()


VENDOR = """
#include <cuda_fp8.h>
#include <cuda_fp4.h>
#include <cstdint>
extern "C" void convert(const float* y, int64_t n, int element, uint8_t* codes) {
    for (int64_t i = 0; i < n; i++)
        codes[i] = element == 2 ? __nv_cvt_float_to_fp4(y[i], __NV_E2M1, cudaRoundNearest)
                                : __nv_cvt_float_to_fp8(y[i], __NV_SATFINITE, element ? __NV_E5M2 : __NV_E4M3);
}
"""


@pytest.fixture(scope="module")
def vendor(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    nvcc = _build.find_nvcc()
    if nvcc is None:
        pytest.skip("needs the headers of the CUDA toolkit, which its nvcc finds: there is no nvcc")
    folder = tmp_path_factory.mktemp("vendor")
    (folder / "vendor.cpp").write_text(VENDOR)
    command = [nvcc, "-O2", "-shared", "-cudart=none", "-Xcompiler=-fPIC", "vendor.cpp", "-o", "vendor.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "vendor.so"))


@pytest.mark.parametrize("element", ELEMENTS)
def test_codes_are_those_of_the_vendors_emulation_of_its_instructions(host: Host, vendor: ctypes.CDLL, element: str):
    """cuda_fp8.h computes on a CPU what `cvt.rn.satfinite` does on a GPU, where the kernel uses the instruction."""
    y = awkward_values(element)
    want = torch.empty(y.shape, dtype=torch.uint8)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (y, want)]
    vendor.convert(pointers[0], ctypes.c_int64(y.numel()), _mx_cuda.ELEMENTS[element], pointers[1])
    assert_bitwise_equal(host.codes(y, element), want)
