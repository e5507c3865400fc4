"""Compile every CUDA kernel of csrc/cuda for each GPU architecture, without a GPU, and read the machine code.

    python scripts/compile_cuda.py [--out benchmarks/results/cuda_kernels.csv]

Prints kernel, variant, architecture, registers per thread, bytes of stack, which is what a thread spills, shared memory
of a group of threads, threads that a processor holds at once, and machine instructions; fails when a kernel spills.
Needs nvcc and the cuobjdump of a CUDA toolkit or of triton; exit status 2 where one is missing.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compile_kernels import source_commit, write_csv

from aotrain import _build

COLUMNS = (
    "kernel", "variant", "arch", "registers", "spill_bytes", "shared_bytes", "threads_per_processor", "instructions",
    "nvcc", "commit",
)  # fmt: skip

# Of csrc/cuda/mx_{plan.h,tile.cuh}: a tile of 128 x 128 elements and two scale tiles, for 256 threads.
THREADS, SCALE_BYTES = 256, 2 * 512
INPUTS = {"Float32": ("fp32", 4), "Bfloat16": ("bf16", 2), "Float16": ("fp16", 2)}
WAYS = {"1": "rows", "2": "columns", "3": "both"}
# Of a processor of sm_90 and sm_100 (CUDA C++ Programming Guide, technical specifications per compute capability);
# registers are given to a warp in units of 8 per thread, and each group takes 1 KiB of shared memory more.
PROCESSOR_THREADS, PROCESSOR_REGISTERS, PROCESSOR_SHARED = 2048, 65536, 228 << 10


def main() -> int:
    """Compile and report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    options = parser.parse_args()
    nvcc, cuobjdump = _build.find_nvcc(), find_cuobjdump()
    if nvcc is None or cuobjdump is None:
        missing = " and ".join(name for name, path in (("nvcc", nvcc), ("cuobjdump", cuobjdump)) if path is None)
        print(f"skipped: there is no {missing} (install the CUDA toolkit, or triton for cuobjdump)", file=sys.stderr)
        return 2
    origin = {"nvcc": nvcc_version(nvcc), "commit": source_commit()}
    rows = [
        row | origin for source in _build.sources(".cu") for row in kernels(cuobjdump, _build.build_library(source))
    ]
    width = max(len(row["variant"]) for row in rows)
    print(
        f"{'kernel':8} {'variant':{width}} {'arch':8} {'regs':>4} {'spill':>5} {'shared':>6} {'threads':>7} {'code':>5}"
    )
    for row in rows:
        print(
            f"{row['kernel']:8} {row['variant']:{width}} {row['arch']:8} {row['registers']:>4} {row['spill_bytes']:>5} "
            f"{row['shared_bytes']:>6} {row['threads_per_processor']:>7} {row['instructions']:>5}"
        )
    if options.out is not None:
        write_csv(rows, options.out, COLUMNS)
    spilling = [row for row in rows if row["spill_bytes"]]
    for row in spilling:
        print(f"error: {row['kernel']} {row['variant']} spills {row['spill_bytes']} bytes on {row['arch']}")
    return 1 if spilling else 0


def kernels(cuobjdump: str, library: Path) -> list[dict[str, Any]]:
    """One row per kernel and architecture in a library."""
    usage, code = (run(cuobjdump, option, str(library)) for option in ("-res-usage", "-sass"))
    instructions = {}
    for arch, text in by_architecture(code):
        for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", text, re.DOTALL):
            opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", body, re.MULTILINE)
            instructions[name, arch] = sum(opcode != "NOP" for opcode in opcodes)
    rows = []
    for arch, text in by_architecture(usage):
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", text):
            kernel, variant, shared = describe(name)
            rows.append(
                {
                    "kernel": kernel,
                    "variant": variant,
                    "arch": arch,
                    "registers": int(registers),
                    "spill_bytes": int(stack),
                    "shared_bytes": shared,
                    "threads_per_processor": threads_per_processor(int(registers), shared),
                    "instructions": instructions[name, arch],
                }
            )
    return sorted(rows, key=lambda row: (row["kernel"], row["variant"], row["arch"]))


def describe(name: str) -> tuple[str, str, int]:
    """(kernel, variant, bytes of shared memory) of aotrain::mx::mx_cast_kernel<Input, Element, ways>, mangled."""
    match = re.search(r"(mx_cast)_kernel.*?\d(Float32|Bfloat16|Float16)E.*?\d(E\dm\d)ELi(\d)E", name)
    if match is None:
        raise RuntimeError(f"{name} is not a kernel that scripts/compile_cuda.py knows")
    kernel, source, element, ways = match.groups()
    dtype, item = INPUTS[source]
    return kernel, f"{dtype}-{element.lower()}-{WAYS[ways]}", 128 * 128 * item + SCALE_BYTES


def threads_per_processor(registers: int, shared: int) -> int:
    """Threads that a processor holds at once."""
    by_registers = PROCESSOR_REGISTERS // (-(-registers // 8) * 8 * THREADS)
    return THREADS * min(PROCESSOR_THREADS // THREADS, by_registers, PROCESSOR_SHARED // (shared + 1024))


def by_architecture(output: str) -> list[tuple[str, str]]:
    """The parts of what cuobjdump prints, each with its architecture; one has several parts, some without kernels."""
    parts = re.split(r"^arch = (\S+)$", output, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def find_cuobjdump() -> str | None:
    """That of a CUDA toolkit, or the one that triton ships."""
    if (found := shutil.which("cuobjdump")) is not None:
        return found
    try:
        import triton
    except ImportError:
        return None
    return shutil.which(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def nvcc_version(nvcc: str) -> str:
    """Such as V13.0.88."""
    found = re.search(r"\bV\d+\.\d+\.\d+", run(nvcc, "--version"))
    return found[0] if found else "unknown"


def run(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
