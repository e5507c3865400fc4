"""Every shipped kernel compiles for Hopper and Blackwell on this machine, without spills."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "scripts" / "compile_kernels.py", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)


def test_all_kernels_compile_without_spills(tmp_path):
    result = run("--out", tmp_path / "table.csv")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert {row["arch"] for row in rows} == {"90", "100"}
    assert all(row["spill_bytes"] == "0" and int(row["registers"]) > 0 for row in rows)
    across = [row for row in rows if row["kernel"].startswith(("nvfp4", "mx_transform"))]
    casts = [row for row in rows if ("cast" in row["kernel"] or "amax" in row["kernel"]) and row not in across]
    # All loads and stores are vectors, and what a transposition exchanges are 16-bit elements; of a 32-bit x, codes.
    by_bytes = {row["variant"] for row in casts if int(row["byte_accesses"])}
    assert all(name.startswith("fp32") or name.endswith("ragged") for name in by_bytes), by_bytes
    # 64 elements per thread, for each of two outputs; the codes of e2m1 are made of integers, 15 instructions each.
    most = {"mx_cast": 4800}
    assert all(50 < int(row["instructions"]) < most.get(row["kernel"], 2200) for row in rows if row not in across)
    # Sixteen rows or 32 at a time, with noise; scales are bytes, and cross to their rows as such.
    assert all(50 < int(row["instructions"]) < 4100 and int(row["byte_accesses"]) <= 12 for row in across)
    recorded = ROOT / "benchmarks" / "results" / "aot_kernels.csv"
    names = {(row["kernel"], row["variant"], row["arch"]) for row in rows}
    assert names == {(row["kernel"], row["variant"], row["arch"]) for row in csv.DictReader(recorded.open())}, (
        "the recorded table is stale; run scripts/compile_kernels.py --out benchmarks/results/aot_kernels.csv"
    )


def test_a_spill_beyond_the_bound_fails():
    result = run("--arch", 90, "--kernel", "amax", "--max-spill", -1)
    assert result.returncode == 1
    assert "spills 0 bytes" in result.stdout


def test_the_interpreter_is_refused():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 2
    assert "unset it" in result.stderr
