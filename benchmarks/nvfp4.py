"""Forward and backward of one NVFP4 linear layer beside bfloat16, timed in turns.

Without hardware that multiplies NVFP4 the products are emulated, so a ratio above 1 to bfloat16 is the price of
training there with NVFP4 numerics.
"""

from collections.abc import Iterator

import torch

from aotrain.nn import NVFP4Linear, NVFP4TrainingConfig
from aotrain.ops import Nvfp4Recipe
from benchmarks.case import Case
from benchmarks.linear_case import linear_case, linear_operands

LAYERS = {
    "paper": NVFP4TrainingConfig(),
    "quantized-input": NVFP4TrainingConfig(save_for_backward="quantized"),
    "plain": NVFP4TrainingConfig(recipe=Nvfp4Recipe(hadamard=False, stochastic_rounding=False)),
}
# Of output, grad_input and grad_weight; tests/ops/test_nvfp4_linear.py has the thresholds of each.
_MIN_SQNR_DB = 14.0


def nvfp4_cases(device: torch.device) -> Iterator[Case]:
    """Every layer on every shape; those of a shape have the same operands and are timed in turns."""
    for operands in linear_operands(device):
        layers = {"bf16": operands.linear}
        layers |= {name: NVFP4Linear.from_float(operands.linear, config) for name, config in LAYERS.items()}
        for name, layer in layers.items():
            yield linear_case(f"nvfp4-{name}", layer, operands, min_sqnr_db=_MIN_SQNR_DB)
