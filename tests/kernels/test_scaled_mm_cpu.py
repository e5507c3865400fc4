"""The C++ around the emulated product against the torch expressions it replaces, on every instruction set."""

import math

import pytest
import torch

from aotrain.formats import ELEMENT_FORMATS, decode_elements, scale_shape
from aotrain.formats.scaling import expand_blocks
from aotrain.kernels import _mm_cpu as cpu
from aotrain.testing import all_bfloat16_values, all_codes, assert_bitwise_equal
from tests.kernels.native import build_or_skip, isa_or_skip

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_or_skip("scaled_mm", cpu)


@pytest.fixture(params=list(cpu.ISAS))
def isa(request: pytest.FixtureRequest) -> str:
    return isa_or_skip("scaled_mm", cpu, request.param)


def torch_product(product, a_scale, b_scale, dtype) -> torch.Tensor:
    return (product.float() * a_scale * b_scale.t()).to(dtype)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, but any NaN equals any other: torch's own conversions to bfloat16 write different ones."""
    actual, expected = (torch.where(x.isnan(), torch.full_like(x, torch.nan), x) for x in (actual, expected))
    assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "element",
    [element for element in ELEMENT_FORMATS.values() if not element.stored_as_codes],
    ids=lambda element: element.name,
)
def test_decodes_all_codes_to_the_bits_of_the_definition(element, dtype: torch.dtype, isa: str):
    codes = all_codes(element).view(torch.uint8)
    for shape in ((256,), (1, 1), (3, 77), (2, 5, 64), (0, 4), (257, 300)):
        data = codes.repeat(-(-math.prod(shape) // 256) + 1)[5 : 5 + math.prod(shape)].view(element.dtype).view(shape)
        assert_bitwise_equal(cpu.decode_elements(data, dtype, isa), decode_elements(data, dtype))


def test_decodes_a_transposed_matrix():
    data = all_codes(ELEMENT_FORMATS["float8_e4m3fn"]).view(8, 32).t()
    assert_bitwise_equal(cpu.decode_elements(data, torch.bfloat16), data.contiguous().to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (7, 65), (37, 128), (130, 517)], ids=str)
def test_scales_every_combination_of_scales(shape: tuple[int, int], dtype: torch.dtype, isa: str):
    product = (torch.randn(shape) * torch.exp(torch.randn(shape) * 9)).to(dtype)
    rows, columns = (torch.exp(torch.randn(size, 1) * 5) for size in shape)
    for a_scale in (rows, rows[:1]):
        for b_scale in (columns, columns[:1]):
            want = torch_product(product, a_scale, b_scale, dtype)
            same(cpu.scale_product(product.clone(), a_scale, b_scale, dtype, isa), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 65), (130, 517)], ids=str)
def test_scales_integer_sums(shape: tuple[int, int], dtype: torch.dtype, isa: str):
    sums = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
    rows, columns = (torch.exp(torch.randn(size, 1) * 5) for size in shape)
    for a_scale in (rows, rows[:1]):
        for b_scale in (columns, columns[:1]):
            same(cpu.scale_product(sums, a_scale, b_scale, dtype, isa), torch_product(sums, a_scale, b_scale, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(1, 128), (128, 128), (1, 32), (3, 50)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 127), (130, 300), (257, 128), (0, 4)], ids=str)
def test_dequantizes_blocks(shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype, isa: str):
    data = all_codes(ELEMENT_FORMATS["float8_e4m3fn"]).view(torch.uint8).repeat(300 * 257 // 256 + 1)
    data = data[: math.prod(shape)].view(torch.float8_e4m3fn).view(shape)
    scale = torch.exp(torch.randn(scale_shape(shape, block)) * 30)
    want = (decode_elements(data, torch.float32) * expand_blocks(scale, data.shape, block)).to(dtype)
    same(cpu.dequantize_blocks(data, scale, block, dtype, isa), want)


@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0**-120, 1e30, 0.0, math.inf, math.nan])
def test_scales_every_bfloat16(scale: float, isa: str):
    product = all_bfloat16_values().view(256, 256)
    a_scale, b_scale = torch.full((256, 1), scale), torch.exp2(torch.arange(256.0) / 16 - 8)[:, None]
    same(
        cpu.scale_product(product.clone(), a_scale, b_scale, torch.bfloat16, isa),
        torch_product(product, a_scale, b_scale, torch.bfloat16),
    )


def test_a_nan_is_one_nan(isa: str):
    product = torch.tensor([[math.nan, -math.nan, math.inf, 1.0] * 9]).bfloat16()
    scaled = cpu.scale_product(product, torch.tensor([[0.0]]), torch.ones(36, 1), torch.bfloat16, isa)
    assert scaled.view(torch.int16).tolist()[0] == [0x7FC0, 0x7FC0, 0x7FC0, 0] * 9


def test_what_the_kernel_cannot_take_runs_in_torch(isa: str):
    product = torch.randn(6, 8)
    rows, columns = torch.rand(6, 1), torch.rand(8, 1)
    cases = [
        (product, rows, columns, torch.float16),
        (product.bfloat16(), rows, columns, torch.float32),
        (product.t(), columns, rows, torch.float32),
        (product, rows.double().float().repeat(1, 2)[:, :1], columns, torch.float32),
        (product, rows, columns[:1].expand(8, 1), torch.float32),
    ]
    for product, a_scale, b_scale, dtype in cases:
        want = torch_product(product, a_scale, b_scale, dtype)
        assert_bitwise_equal(cpu.scale_product(product.clone(), a_scale, b_scale, dtype, isa), want)


def test_threads_do_not_change_the_bits(isa: str):
    data = torch.randint(0, 256, (300, 700), dtype=torch.uint8).view(torch.float8_e5m2)
    product = torch.randn(300, 700).bfloat16()
    rows, columns = torch.rand(300, 1), torch.rand(700, 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        got = cpu.decode_elements(data, torch.bfloat16, isa)
        scaled = cpu.scale_product(product.clone(), rows, columns, torch.bfloat16, isa)
    finally:
        torch.set_num_threads(threads)
    assert_bitwise_equal(got, decode_elements(data, torch.bfloat16))
    same(scaled, torch_product(product, rows, columns, torch.bfloat16))
