"""The grouped products compile to the tensor cores' 8-bit instructions, fed by asynchronous copies, without spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# One variant of each kind of scales and of each layout; all variants are compiled by tests/scripts.
PROGRAM = """
import json, sys
sys.path.insert(0, "scripts")
import compile_kernels
from aotrain.kernels.triton.registry_grouped import grouped_mms
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

found = {}
for variant in grouped_mms():
    if variant.variant not in sys.argv[1:]:
        continue
    names = variant.kernel.arg_names
    source = ASTSource(
        variant.kernel,
        signature={name: variant.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    for arch in (90, 100):
        options = {"num_warps": variant.num_warps, **variant.options}
        cubin = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]
        opcodes = [opcode.split(".")[0] for opcode in compile_kernels.opcodes(cubin)]
        key = f"{variant.name} {variant.variant} {arch}"
        found[key] = {name: opcodes.count(name) for name in sorted(set(opcodes))}
print(json.dumps(found))
"""
VARIANTS = (
    "fp8e4nv-bf16-row-scales-128-rows",
    "fp8e4nv-bf16-1x128-128x128-128-rows",
    "fp8e4nv-bf16-1x128-64-rows",
    "i8-bf16-row-scales-128-rows",
)


def test_products_run_on_the_tensor_cores():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *VARIANTS],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == 2 * (len(VARIANTS) + 3)  # all but one variant exist in both layouts
    for key, opcodes in found.items():
        name, variant, arch = key.split()
        # Hopper's and Blackwell's 8-bit products; Blackwell's large cards have integer products of the older kind only.
        want = {"90": "QGMMA", "100": "UTCQMMA"} if variant.startswith("fp8") else {"90": "IGMMA", "100": "IMMA"}
        assert want[arch] in opcodes, key
        assert "HGMMA" not in opcodes, f"{key}: codes are widened before the product"
        assert "LDGSTS" in opcodes, f"{key}: {name} does not copy asynchronously"
