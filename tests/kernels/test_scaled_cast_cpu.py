"""The C++ kernel of scaled_cast against the definition: bit for bit, on every instruction set, format and layout."""

import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from aotrain.formats import (
    BLOCKWISE_1X32,
    BLOCKWISE_128X128,
    COLWISE,
    ELEMENT_FORMATS,
    FLOAT4_E2M1,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    INT8,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    Scaling,
    decode_elements,
    quantize,
)
from aotrain.kernels import _cast_cpu as cpu
from aotrain.kernels import scaled_cast
from aotrain.testing import adversarial_matrix, all_bfloat16_values, assert_bitwise_equal
from tests.kernels.native import build_or_skip, isa_or_skip

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Runs of one scale that are whole rows, long, short and single, in both directions; none divides the shapes below.
BLOCKS = [TENSORWISE, ROWWISE, COLWISE, BLOCKWISE_1X32, (1, 128), BLOCKWISE_128X128, (3, 5), (1, 1), (40, 16), (-1, 7)]
SCALINGS = [
    Scaling(element=element, scale=SCALE_FORMATS[scale], block=block)
    for element in (FLOAT8_E4M3, FLOAT8_E5M2, INT8)
    for scale in ("float32", "float32_pow2")
    for block in BLOCKS
]
FLOATS = (FLOAT8_E4M3, FLOAT8_E5M2, FLOAT4_E2M1)
E8M0 = [name for name in SCALE_FORMATS if name.startswith("e8m0")]
MX_SCALINGS = [
    Scaling(element=element, scale=SCALE_FORMATS[scale], block=block)
    for element in FLOATS
    for scale in E8M0
    for block in (BLOCKWISE_1X32, (3, 5))
]
# What a caller may pass, and a view that has to be copied.
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "rows-apart": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "columns-apart": lambda x: torch.cat([x, x], 0).t().contiguous().t()[: x.shape[0]],
    "strided": lambda x: torch.stack([x, -x], -1)[..., 0],
}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_or_skip("scaled_cast", cpu)


@pytest.fixture(params=list(cpu.ISAS))
def isa(request: pytest.FixtureRequest) -> str:
    return isa_or_skip("scaled_cast", cpu, request.param)


def assert_quantizes(x: torch.Tensor, scaling: Scaling, isa: str) -> None:
    assert cpu.problem(x, scaling.element.name, scaling.scale.name) is None
    data, scale = cpu.scaled_cast(x, scaling.element.name, scaling.scale.name, *scaling.block, isa=isa)
    want = quantize(x.contiguous(), scaling)
    assert_bitwise_equal(data, want.data, what="data")
    assert_bitwise_equal(scale, want.scale, what="scale")
    assert data.is_contiguous()


@pytest.mark.parametrize("scaling", [*SCALINGS, *MX_SCALINGS], ids=str)
def test_every_scaling_dtype_and_layout(scaling: Scaling, isa: str):
    for dtype in DTYPES:
        x = adversarial_matrix(75, 333, dtype)
        for view in LAYOUTS.values():
            assert_quantizes(view(x), scaling, isa)
            assert_quantizes(view(x.t().contiguous()), scaling, isa)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nans_fill_their_block_and_no_other(dtype: torch.dtype, block: tuple[int, int], isa: str):
    x = torch.randn(70, 140).to(dtype)
    x[3, 5], x[40, 100], x[69, 139] = math.inf, math.nan, -math.nan
    x[20, 33], x[21, 33] = -math.inf, math.nan
    for element in (FLOAT8_E4M3, FLOAT8_E5M2, INT8, FLOAT4_E2M1):
        for scale in ("float32", "float32_pow2", *(E8M0 if element is not INT8 else ())):
            scaling = Scaling(element=element, scale=SCALE_FORMATS[scale], block=block)
            assert_quantizes(x, scaling, isa)
            assert_quantizes(x.t(), scaling, isa)


@pytest.mark.parametrize("element", [FLOAT8_E4M3, FLOAT8_E5M2, INT8], ids=lambda element: element.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_of_16_bits(dtype: torch.dtype, element, isa: str):
    patterns = all_bfloat16_values()
    values = patterns.view(torch.float16) if dtype == torch.float16 else patterns.to(dtype)
    # In a block of its own, where nothing else decides the scale; among its neighbours; and finite ones in one block.
    for scale in ("float32", "float32_pow2"):
        for shape, block in (((256, 256), (1, 1)), ((65536, 1), ROWWISE), ((512, 128), ROWWISE)):
            assert_quantizes(values.view(shape), Scaling(element=element, scale=SCALE_FORMATS[scale], block=block), isa)
    finite = values[values.isfinite()].view(1, -1)
    assert_quantizes(finite, Scaling(element=element), isa)


@pytest.mark.parametrize("scale", E8M0)
@pytest.mark.parametrize("element", FLOATS, ids=lambda element: element.name)
def test_every_value_of_16_bits_as_the_largest_of_a_block(element, scale: str, isa: str):
    patterns = all_bfloat16_values()
    for values in (patterns, patterns.view(torch.float16), patterns.float() * 1.0078125):
        for shape, block in (((256, 256), (1, 1)), ((2048, 32), BLOCKWISE_1X32)):
            assert_quantizes(values.view(shape), Scaling(element=element, scale=SCALE_FORMATS[scale], block=block), isa)


@pytest.mark.parametrize("element", [FLOAT8_E4M3, FLOAT8_E5M2, INT8, FLOAT4_E2M1], ids=lambda element: element.name)
@pytest.mark.parametrize("power", [-30, -9, -1, 0, 1, 20])
def test_ties_and_their_neighbours(element, power: int, isa: str):
    """Scaled by a power of two, so that a tie stays one."""
    codes = decode_elements(torch.arange(256, dtype=torch.uint8).view(element.dtype), torch.float32, element)
    codes = codes[codes.isfinite() & (codes >= 0)].sort().values
    values = torch.cat([codes, (codes[:-1] + codes[1:]) / 2, torch.tensor([element.min_subnormal / 2])])
    around = [values.nextafter(torch.tensor(sign * math.inf)) for sign in (-1, 1)]
    values = torch.cat([values, *around]).clamp(max=element.max)
    x = torch.cat([values, -values, torch.tensor([element.max])])[None] * 2.0**power
    for scale in ("float32", "float32_pow2", *(E8M0 if element is not INT8 else ())):
        for block in (ROWWISE, TENSORWISE):
            assert_quantizes(x, Scaling(element=element, scale=SCALE_FORMATS[scale], block=block), isa)
            assert_quantizes(x.bfloat16(), Scaling(element=element, scale=SCALE_FORMATS[scale], block=block), isa)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 5), (5, 1), (2, 3, 31), (2, 3, 5, 33), (3, 200, 70), (64, 256), (65, 257), (16, 16)], ids=str
)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_shapes(shape: tuple[int, ...], block: tuple[int, int], isa: str):
    scaling = Scaling(element=FLOAT8_E4M3, block=block)
    x = torch.randn(shape).bfloat16()
    assert_quantizes(x, scaling, isa)
    assert_quantizes(x.transpose(-1, -2), scaling, isa)
    assert_quantizes(x.transpose(0, -1), scaling, isa)
    assert_quantizes(x[:1].expand(shape), scaling, isa)


@pytest.mark.parametrize(
    "scaling", [s for s in [*SCALINGS, *MX_SCALINGS] if not s.scale.power_of_two or s.block[0] == 1], ids=str
)
def test_threads_do_not_change_the_bits(scaling: Scaling):
    x = torch.randn(300, 1100)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for view in (x, x.t(), x.bfloat16()):
            assert_quantizes(view, scaling, list(cpu.ISAS)[cpu.library()[0].aotrain_scaled_cast_isa()])
    finally:
        torch.set_num_threads(threads)


def test_the_op_takes_the_kernel_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    calls = []
    original = cpu.scaled_cast
    monkeypatch.setattr(cpu, "scaled_cast", lambda *args: calls.append(args[1:3]) or original(*args))
    x = torch.randn(8, 64)
    for element in ELEMENT_FORMATS.values():
        for scale in SCALE_FORMATS.values():
            scaled_cast(x, Scaling(element=element, scale=scale, block=BLOCKWISE_1X32))
    scaled_cast(x[:0], Scaling(element=FLOAT8_E4M3))
    elements, scales = ("float4_e2m1fn", "float8_e4m3fn", "float8_e5m2"), ("float32", "float32_pow2", *E8M0)
    want = [(element, scale) for element in elements for scale in scales]
    assert sorted(calls) == sorted([*want, ("int8", "float32"), ("int8", "float32_pow2")])


def test_without_the_library_the_definition_runs():
    module = import_module("aotrain.kernels.scaled_cast")
    script = (
        "import torch\nfrom aotrain.formats import *\nfrom aotrain.kernels import scaled_cast, _cast_cpu\n"
        "s = Scaling(element=FLOAT8_E4M3, block=ROWWISE)\nx = torch.randn(5, 7)\n"
        "assert torch.equal(scaled_cast(x, s).data.view(torch.uint8), quantize(x, s).data.view(torch.uint8))\n"
        "print(_cast_cpu.problem(x, 'float8_e4m3fn', 'float32'))\n"
    )
    environment = {**os.environ, "AOTRAIN_NO_NATIVE": "1", "PYTHONPATH": str(Path(module.__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "AOTRAIN_NO_NATIVE is set" in result.stdout, result.stderr
