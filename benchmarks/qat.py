"""Forward and backward of one fake-quantized linear layer, ours beside bfloat16 and torchao, timed in turns.

`bytes_kept_per_element` is what autograd keeps from forward to backward per element of the input and the weight: 2 for
the bfloat16 layer, which keeps just those two.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator

import torch

from aotrain.ops.fake_quantize import fake_quantized_linear
from aotrain.quantization import SCHEMES
from benchmarks.case import Case
from benchmarks.linear_case import Layer, linear_case, linear_operands

LAYERS = ("int4-g32", "8da4w")
# Of output and gradients beside those of bfloat16: int4 in groups of 32 leaves 20 dB of normal numbers, and 18 dB of a
# gradient whose saturated elements, one in 60, are zero.
_MIN_SQNR_DB = 15.0


def qat_cases(device: torch.device) -> Iterator[Case]:
    """Every layer on every shape, eager and then compiled; those of a shape are timed in turns with bfloat16."""
    for compiled in (False, True):
        for operands in linear_operands(device):
            for name, layer in _layers(operands.linear).items():
                suffix = "-compiled" if compiled and name != "bf16" else ""
                layer = torch.compile(layer, dynamic=False) if suffix else layer
                case = linear_case(f"qat-{name}{suffix}", layer, operands, min_sqnr_db=_MIN_SQNR_DB)
                yield dataclasses.replace(
                    case,
                    elements=operands.x.numel() + operands.linear.weight.numel(),
                    bytes_kept=saved_bytes(layer, operands.x),
                    group=f"{case.group}-{'compiled' if compiled else 'eager'}",
                )


def _layers(linear: torch.nn.Linear) -> dict[str, Layer]:
    """Name -> layer with the same weight."""
    layers: dict[str, Layer] = {"bf16": linear}
    for name in LAYERS:
        layers[f"aotrain-{name}"] = _ours(linear.weight, name)
    if importlib.util.find_spec("torchao"):
        layers |= _peers(linear)
    return layers


def _ours(weight: torch.Tensor, name: str) -> Layer:
    scheme = SCHEMES[name]
    return lambda x: fake_quantized_linear(x, weight, None, scheme.activation, scheme.weight)


def _peers(linear: torch.nn.Linear) -> dict[str, Layer]:
    """torchao's layers of the same schemes, prepared as its users do."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, QATStep

    # pyrefly: ignore[missing-attribute]
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    tokens = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    layers: dict[str, Layer] = {}
    for name, activations in (("int4-g32", None), ("8da4w", tokens)):
        model = torch.nn.Sequential(torch.nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta"))
        model[0].weight = linear.weight
        quantize_(model, QATConfig(activation_config=activations, weight_config=weights, step=QATStep.PREPARE))
        assert model[0].weight is linear.weight, "the peer made a weight of its own"
        layers[f"torchao-{name}"] = model[0]
    return layers


def saved_bytes(layer: Layer, x: torch.Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps from forward to backward."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x)
    del output
    return sum(sizes.values())
