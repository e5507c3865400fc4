"""What the Adam launcher hands to Triton's compiler on a Hopper GPU, which is simulated: nothing is launched."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest

# Prints the PTX of each launch of one step, of a parameter on the fast path and of one with ragged rows.
SCRIPT = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Hopper:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=None: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_active_torch_device = lambda self: torch.device("cuda")

driver.set_active(Hopper())
from aotrain.kernels.triton import _adam_launch as launch

class Compiled:
    kernel = launch.adam_kernel
    def __getitem__(self, grid):
        return lambda *args, **options: print(self.kernel.warmup(*args, grid=grid, **options).asm["ptx"])

launch.adam_kernel = Compiled()
state, dtype = sys.argv[1], getattr(torch, sys.argv[2])
tensors = [(torch.randn(rows, columns).to(dtype), columns) for rows, columns in ((16, 512), (3, 301))]
params = [param for param, _ in tensors]
quantized = state != "float32"
moments = [torch.zeros(param.shape, dtype=torch.uint8 if quantized else torch.float32) for param in params]
scales = [torch.ones(param.shape[0], 2) for param in params] if quantized else []
scalars = dict.fromkeys(("one_minus_beta1", "one_minus_beta2", "eps", "decay_factor", "step_size"), 0.1)
keys = [1, 2] if dtype == torch.bfloat16 else []
launch.adam_(
    params, params, moments, scales, moments, scales, state_format=state, block_size=256, coupled_decay=0.1,
    inv_sqrt_bias_correction2=1.0, rounding_keys=keys, first_indices=[0] * len(keys),
    row_strides=[columns for _, columns in tensors][: len(keys)], **scalars,
)
"""


@pytest.mark.parametrize(("state", "dtype"), [("dynamic8", "bfloat16"), ("float32", "float32")])
def test_all_arithmetic_is_rounded_once_to_nearest(state: str, dtype: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, state, dtype]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(".visible .entry adam_kernel") == 2
    operations = Counter(re.findall(r"(\w+\.[\w.]*f32) ", result.stdout))
    arithmetic = {
        name for name in operations if name.split(".")[0] in ("add", "sub", "mul", "fma", "div", "sqrt", "rcp")
    }
    assert arithmetic - {"fma.rn.f32"} == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"}
    assert not {"ex2", "lg2", "rsqrt"} & {name.split(".")[0] for name in operations}
    # The quotients that encode the moments are the only fused operations.
    assert ("fma.rn.f32" in arithmetic) == (state != "float32")
