"""The C++ kernels of nvfp4_cast and nvfp4_mm against the definitions: bit for bit, on every instruction set."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aotrain
from aotrain.formats import FLOAT4_E2M1, FLOAT8_E4M3, decode_elements, hadamard_signs, pack_float4
from aotrain.kernels import _nvfp4_cpu as cpu
from aotrain.kernels.nvfp4_cast import _allocate, _reference, nvfp4_cast
from aotrain.testing import adversarial_matrix, all_bfloat16_values, all_codes, assert_bitwise_equal
from tests.kernels.native import build_or_skip

SIGNS = tuple(int(sign) for sign in hadamard_signs(1).tolist())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (block rows, signs, seed)
CASTS = [(1, (), None), (1, (), 3), (16, (), None), (16, (), 3), (1, SIGNS, None), (1, SIGNS, -5)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "rows-apart": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "columns-apart": lambda x: torch.cat([x, x], 0).t().contiguous().t()[: x.shape[0]],
    "strided": lambda x: torch.stack([x, -x], -1)[..., 0],
}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_or_skip("nvfp4_cast", cpu)
    build_or_skip("nvfp4_mm", cpu)
    cpu.decode_library.cache_clear()


@pytest.fixture(params=list(cpu.ISAS))
def isa(request: pytest.FixtureRequest) -> str:
    library, reason = cpu.library()
    assert library is not None, reason
    if cpu.ISAS[request.param] > library.aotrain_nvfp4_cast_isa():
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


def assert_casts(x: torch.Tensor, block_rows: int, signs: tuple[int, ...], seed: int | None, isa: str) -> None:
    """x is cast as an operand of its own; through the op, a transform applies to a transposition only."""
    want = _reference(x.t(), block_rows, False, True, signs, seed, False)[3:]
    got = _allocate(x, *x.shape, blocked=False)
    cpu.cast_operand(x, block_rows, signs, None if seed is None else 2 * seed + 1, got, isa)
    for name, actual, expected in zip(("data", "scale", "global scale"), got, want, strict=True):
        assert_bitwise_equal(actual, expected, what=name)


@pytest.mark.parametrize("cast", CASTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(dtype: torch.dtype, cast: tuple, isa: str) -> None:
    for x in (adversarial_matrix(75, 333, dtype), torch.randn(75, 333).to(dtype)):
        for view in LAYOUTS.values():
            assert_casts(view(x), *cast, isa)


@pytest.mark.parametrize("cast", CASTS, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 33), (33, 1), (17, 31), (64, 128), (65, 260), (130, 257), (16, 16)], ids=str
)
def test_shapes(shape: tuple[int, int], cast: tuple, isa: str) -> None:
    for x in (torch.randn(shape).bfloat16(), torch.randn(shape[::-1]).bfloat16().t()):
        assert_casts(x, *cast, isa)


@pytest.mark.parametrize("cast", CASTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite(dtype: torch.dtype, cast: tuple, isa: str) -> None:
    for bad in ([(3, 5, math.inf)], [(40, 30, math.nan)], [(3, 5, -math.inf), (69, 79, -math.nan), (20, 5, math.inf)]):
        x = torch.randn(70, 80)
        for row, column, value in bad:
            x[row, column] = value
        assert_casts(x.to(dtype), *cast, isa)
        assert_casts(x.t().contiguous().t().to(dtype), *cast, isa)


@pytest.mark.parametrize("seed", [None, 1])
def test_every_bfloat16_value(seed: int | None, isa: str) -> None:
    values = all_bfloat16_values()
    values = values[values.isfinite()].view(-1, 2).t().contiguous().flatten()  # neighbours apart
    for largest in (3e38, 1.0, 1e-30, 1e-38):
        x = values[values.abs() <= largest]
        x = torch.nn.functional.pad(x, (0, -len(x) % 64)).view(-1, 64)
        assert_casts(x, 1, (), seed, isa)
        assert_casts(x.t().contiguous().t(), 1, (), seed, isa)


@pytest.mark.parametrize("power", [-40, -1, 0, 3, 60])
def test_ties_and_their_neighbours(power: int, isa: str) -> None:
    """Under a block scale of 448 and a global scale that is a power of two, so that a tie stays one."""
    codes = decode_elements(all_codes(FLOAT4_E2M1)[:8], torch.float32, FLOAT4_E2M1)
    values = torch.cat([codes, (codes[:-1] + codes[1:]) / 2])
    around = [values.nextafter(torch.tensor(sign * math.inf)) for sign in (-1, 1)]
    values = torch.cat([values, *around]).clamp(max=6)
    rows = torch.stack([values, -values], 1).flatten().split(15)
    x = torch.stack([torch.nn.functional.pad(row, (1, 15 - len(row)), value=6.0) for row in rows])
    for cast in CASTS[:2]:
        assert_casts(x * 2.0**power * 448 / 512, *cast, isa)
        assert_casts((x * 2.0**power).t().contiguous().t(), *cast, isa)


@pytest.mark.parametrize("cast", CASTS, ids=str)
def test_threads_do_not_change_the_bits(cast: tuple) -> None:
    best = list(cpu.ISAS)[cpu.library()[0].aotrain_nvfp4_cast_isa()]
    x = torch.randn(300, 1100)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for view in (x, x.t(), x.bfloat16()):
            assert_casts(view, *cast, best)
    finally:
        torch.set_num_threads(threads)


def test_decodes_every_code_with_every_scale(isa: str) -> None:
    scales = all_codes(FLOAT8_E4M3)[:128]  # positive, and NaN
    codes = torch.arange(16, dtype=torch.uint8).expand(128, 16)
    want = decode_elements(codes, torch.float32, FLOAT4_E2M1) * scales.float()[:, None]
    for dtype in (torch.bfloat16, torch.float32):
        got = cpu.decode_operand(pack_float4(codes), scales[:, None], dtype, isa)
        assert got.dtype == dtype
        assert torch.equal(got[:127].float(), want[:127])
        assert torch.equal(got[:127].signbit(), want[:127].signbit())
        assert bool(got[127].isnan().all())


def test_decodes_many_rows_on_many_threads(isa: str) -> None:
    q = nvfp4_cast(torch.randn(301, 300))
    plain = cpu.decode_operand(q.data.t().contiguous().t(), q.scale, torch.bfloat16)  # not what the kernel takes
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert_bitwise_equal(cpu.decode_operand(*q[:2], torch.bfloat16, isa), plain)
    finally:
        torch.set_num_threads(threads)


def test_without_the_libraries_the_definitions_run() -> None:
    script = (
        "import torch\nfrom aotrain.kernels import nvfp4_cast, nvfp4_mm, _nvfp4_cpu as cpu\n"
        "torch.manual_seed(0)\nx = torch.randn(20, 50)\n"
        "output = nvfp4_mm(nvfp4_cast(x, seed=1), nvfp4_cast(x), x.dtype)\n"
        "print(cpu.library()[1], cpu.decode_library()[1], output.sum())"
    )
    root = str(Path(aotrain.__file__).parents[1])
    outputs = []
    for disabled in ("1", "0"):
        environment = {**os.environ, "AOTRAIN_NO_NATIVE": disabled, "PYTHONPATH": root}
        result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    assert outputs[0].count("AOTRAIN_NO_NATIVE is set") == 2
    assert outputs[1].startswith("None None")
    assert outputs[0].split()[-1] == outputs[1].split()[-1]
