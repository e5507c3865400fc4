"""Forward and backward of one float8 linear layer, ours beside bfloat16 and torchao, timed in turns.

On a CPU float8 is emulated, so a ratio above 1 to bfloat16 is the price of training there with float8 numerics.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator

import torch

from aotrain import Float8LinearConfig
from aotrain.nn import Float8Linear
from benchmarks.case import Case
from benchmarks.linear_case import Layer, linear_case, linear_operands

PEER_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
RECIPES = (*PEER_RECIPES, "blockwise", "int8_rowwise")
# Of output, grad_input and grad_weight; the lowest recipe, tensorwise with e5m2 gradients, has 21 dB.
_MIN_SQNR_DB = 18.0


def float8_cases(device: torch.device) -> Iterator[Case]:
    """Every layer on every shape; those of a shape have the same operands and are timed in turns."""
    for operands in linear_operands(device):
        for name, layer in _layers(operands.linear, device).items():
            yield linear_case(f"float8-{name}", layer, operands, min_sqnr_db=_MIN_SQNR_DB)


def _layers(linear: torch.nn.Linear, device: torch.device) -> dict[str, Layer]:
    """Name -> layer with the same weight. Compiled ones only on a GPU."""
    layers: dict[str, Layer] = {"bf16": linear}
    for recipe in RECIPES:
        # Every run stands for a training step, in which the weight is new.
        ours = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), cache_weight_casts=False)
        layers[f"aotrain-{recipe}"] = Float8Linear.from_float(linear, ours)
        if device.type == "cuda":
            layers[f"aotrain-{recipe}-compiled"] = torch.compile(layers[f"aotrain-{recipe}"])
    if importlib.util.find_spec("torchao"):
        from torchao.float8 import Float8LinearConfig as PeerConfig
        from torchao.float8.float8_linear import Float8Linear as PeerLinear

        for recipe in PEER_RECIPES:
            config = dataclasses.replace(PeerConfig.from_recipe_name(recipe), emulate=device.type != "cuda")
            layers[f"torchao-{recipe}"] = PeerLinear.from_float(linear, config)
            if device.type == "cuda":
                layers[f"torchao-{recipe}-compiled"] = torch.compile(layers[f"torchao-{recipe}"])
    return layers
