"""Every CUDA kernel compiles for Hopper and Blackwell where there is an nvcc, without spills, and is as recorded."""

import csv
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aotrain import _build
from aotrain.formats import BLOCKWISE_1X32
from aotrain.kernels import _mx_cuda

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDED = ROOT / "benchmarks" / "results" / "cuda_kernels.csv"
# Of a kernel, input x element x direction, for each architecture with machine code of its own.
VARIANTS = {
    f"{dtype}-{element}-{ways}"
    for dtype in ("bf16", "fp16", "fp32")
    for element in ("e4m3", "e5m2", "e2m1")
    for ways in ("rows", "columns", "both")
}


@pytest.fixture(scope="module")
def nvcc() -> str:
    if _build.disabled():
        pytest.skip("AOTRAIN_NO_NATIVE is set")
    found = _build.find_nvcc()
    if found is None:
        pytest.skip(
            "there is no nvcc: the kernels' bodies are tested as C++ (test_mx_cuda.py), their compilation is not"
        )
    return found


def run(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "compile_cuda.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def names(rows: list[dict[str, str]]) -> set[tuple[str, str, str]]:
    return {(row["kernel"], row["variant"], row["arch"]) for row in rows}


def test_the_recorded_table_has_every_kernel():
    rows = list(csv.DictReader(RECORDED.open()))
    assert names(rows) == {("mx_cast", variant, arch) for variant in VARIANTS for arch in ("sm_90a", "sm_100a")}
    assert all(row["spill_bytes"] == "0" for row in rows)


@pytest.mark.usefixtures("nvcc")
def test_all_kernels_compile_without_spills(tmp_path: Path):
    result = run({}, "--out", tmp_path / "table.csv")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert names(rows) == names(list(csv.DictReader(RECORDED.open()))), (
        "the recorded table is stale; run scripts/compile_cuda.py --out benchmarks/results/cuda_kernels.csv"
    )
    for row in rows:
        # Four groups of 256 threads; two of a 32-bit x, whose tile and values take twice the room.
        assert int(row["threads_per_processor"]) >= (512 if row["variant"].startswith("fp32") else 1024), row
        assert 500 < int(row["instructions"]) < 6000, row


@pytest.mark.usefixtures("nvcc")
def test_the_library_loads_without_a_gpu_and_a_launch_fails_cleanly():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/kernels/test_mx_cuda.py runs the kernels on it")
    library = _mx_cuda.declare(ctypes.CDLL(str(_build.build_library(_build.sources(".cu")[0]))))
    x, scale = torch.zeros(128, 128), torch.zeros(128, 4)
    table, _kept = _mx_cuda.arguments(x, "float8_e4m3fn", "rceil", {BLOCKWISE_1X32: (x, scale)}, False)
    error = library.aotrain_mx_cast(ctypes.c_void_p(table.buffer_info()[0]), None)
    assert error != 0
    assert b"CUDA" in library.aotrain_mx_cast_error(error)


def test_without_nvcc_it_says_so():
    result = run({"NVCC": "/nonexistent/nvcc"})
    assert result.returncode == 2
    assert "there is no nvcc" in result.stderr
