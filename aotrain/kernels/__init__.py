"""Fast ops with the signature and the bits of `aotrain.formats`, registered with torch.library as `aotrain::*`.

The thin functions here take and return the project's own types; torch.library sees only plain tensors, numbers and
strings. Each op has a schema, a fake implementation for tracing, a plain-torch implementation that runs on every
device, and, where there is one, a faster implementation for CUDA (Triton) or CPU (C++).
"""

from aotrain.kernels._padding import operand_multiples
from aotrain.kernels.mx_cast import mx_cast, mx_cast_both
from aotrain.kernels.mx_mm import mx_mm, mx_mm_problem
from aotrain.kernels.nvfp4_cast import Nvfp4Operand, nvfp4_cast, nvfp4_cast_both
from aotrain.kernels.nvfp4_mm import nvfp4_mm
from aotrain.kernels.scaled_cast import cast_kernel_gap, scaled_cast, scaled_cast_both
from aotrain.kernels.scaled_cast_after import scaled_cast_after
from aotrain.kernels.scaled_mm import float8_problem, native_scaled_mm_problem, scaled_mm, with_equal_depths
from aotrain.kernels.sum_rows import sum_rows
from aotrain.kernels.token_permute import RowPermutation, expert_major_permutation, gather_rows

__all__ = [
    "Nvfp4Operand",
    "RowPermutation",
    "cast_kernel_gap",
    "expert_major_permutation",
    "float8_problem",
    "gather_rows",
    "mx_cast",
    "mx_cast_both",
    "mx_mm",
    "mx_mm_problem",
    "native_scaled_mm_problem",
    "nvfp4_cast",
    "nvfp4_cast_both",
    "nvfp4_mm",
    "operand_multiples",
    "scaled_cast",
    "scaled_cast_after",
    "scaled_cast_both",
    "scaled_mm",
    "sum_rows",
    "with_equal_depths",
]
