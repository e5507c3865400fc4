"""Compile every Triton kernel at every shipped configuration for each GPU architecture, without a GPU.

    python scripts/compile_kernels.py [--out benchmarks/results/aot_kernels.csv] [--arch 90 100] [--kernel NAME]

Prints kernel, variant, architecture, registers per thread, spilled bytes, shared memory, machine instructions (each
counted once, without the blocks that call the slow path of a division or root) and how many of all instructions move
single bytes, as those of an access that is not vectorized do; fails when a kernel spills more than --max-spill bytes
per thread (loads and stores together).
"""

import argparse
import csv
import functools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

COLUMNS = (
    "kernel", "variant", "arch", "registers", "spill_bytes", "shared_bytes", "instructions", "byte_accesses", "triton",
    "commit",
)  # fmt: skip


def main() -> int:
    """Compile and report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 100], help="compute capabilities, as in sm_90")
    parser.add_argument("--kernel", help="only the variants of this one")
    parser.add_argument("--max-spill", type=int, default=0, help="bytes per thread")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by the interpreter; unset it")

    commit = {"commit": source_commit()}
    chosen = [index for index, variant in enumerate(variants()) if options.kernel in (None, variant.name)]
    if not chosen:
        parser.error(f"--kernel got {options.kernel!r}; want one of {', '.join(sorted({v.name for v in variants()}))}")
    wanted = [(index, arch) for index in chosen for arch in options.arch]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        rows = [row | commit for row in pool.map(compile_index, *zip(*wanted, strict=True))]
    print_table(rows)
    if options.out is not None:
        write_csv(rows, options.out)
    spilling = [row for row in rows if row["spill_bytes"] > options.max_spill]
    for row in spilling:
        print(f"error: {row['kernel']} {row['variant']} spills {row['spill_bytes']} bytes on sm_{row['arch']}")
    return 1 if spilling else 0


@functools.lru_cache(maxsize=1)
def variants() -> list[Any]:
    """All that is to be compiled. Kernels cannot be pickled, so processes agree on positions in this list."""
    from aotrain.kernels.triton.registry import KERNELS

    return [variant for make in KERNELS for variant in make()]


def compile_index(index: int, arch: int) -> dict[str, Any]:
    """`compile_variant` of one of `variants`."""
    return compile_variant(variants()[index], arch)


def compile_variant(variant: Any, arch: int) -> dict[str, Any]:
    """Compile one specialization and read its resource usage from the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    source = ASTSource(
        variant.kernel,
        signature={name: variant.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, **variant.options}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spill_bytes = resource_usage(kernel.asm["cubin"])
    instructions = opcodes(kernel.asm["cubin"])
    return {
        "kernel": variant.name,
        "variant": variant.variant,
        "arch": arch,
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": kernel.metadata.shared,
        "instructions": fast_path_instructions(kernel.asm["cubin"]),
        "byte_accesses": sum(re.fullmatch(r"(LD|ST)[GS].*\.[US]8", opcode) is not None for opcode in instructions),
        "triton": triton.__version__,
    }


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, stack bytes per thread) of a compiled kernel, from the cuobjdump that triton ships.

    None of our kernels has arrays in local memory, so its stack is what it spills.
    """
    output = cuda_tool("cuobjdump", cubin, "-res-usage")
    registers, stack = re.search(r"REG:(\d+)", output), re.search(r"STACK:(\d+)", output)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no register or stack count:\n{output}")
    return int(registers[1]), int(stack[1])


def fast_path_instructions(cubin: bytes) -> int:
    """Machine instructions up to the end of the kernel, without basic blocks that call a subroutine."""
    blocks, block = [], []
    for line in cuda_tool("nvdisasm", cubin, "-c").splitlines():
        instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?U?P\d+ )?([A-Z]\w+)", line)
        if instruction:
            block.append(instruction[2])
        if line.startswith(".L_x_") or (instruction and instruction[2] in ("BRA", "EXIT")):
            blocks.append(block)
            block = []
        if instruction and instruction[2] == "EXIT" and not instruction[1]:  # threads without work end earlier
            break
    return sum(len(block) for block in blocks if "CALL" not in block)


def opcodes(cubin: bytes) -> list[str]:
    """Every instruction of a compiled kernel without its operands; no padding."""
    # /*00a0*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
    instruction = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
    return [opcode for opcode in instruction.findall(cuda_tool("nvdisasm", cubin, "-c")) if opcode != "NOP"]


@functools.lru_cache(maxsize=8)
def cuda_tool(name: str, cubin: bytes, option: str) -> str:
    """Output of one of the CUDA tools that triton ships, for a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def source_commit() -> str:
    """The checkout that was compiled, marked when it has changes."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows as aligned text."""
    width = max(len(row["variant"]) for row in rows)
    print(
        f"{'kernel':22} {'variant':{width}} {'arch':>5} {'regs':>5} {'spill':>5} {'shared':>6} {'code':>6} {'byte':>5}"
    )
    for row in rows:
        print(
            f"{row['kernel']:22} {row['variant']:{width}} sm_{row['arch']:<3} {row['registers']:>4} "
            f"{row['spill_bytes']:>5} {row['shared_bytes']:>6} {row['instructions']:>6} {row['byte_accesses']:>5}"
        )


def write_csv(rows: list[dict[str, Any]], path: Path, columns: tuple[str, ...] = COLUMNS) -> None:
    """Rows as CSV, replacing the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
