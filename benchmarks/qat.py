"""Forward and backward of one fake-quantized linear layer, ours beside bfloat16 and torchao, timed in turns.

`bytes_kept_per_element` is what autograd keeps from forward to backward per element of the input and the weight: 2 for
the bfloat16 layer, which keeps just those two.
"""

import importlib.util
from collections.abc import Callable, Iterator

import torch

from aotrain.ops.fake_quantize import fake_quantized_linear
from aotrain.quantization import SCHEMES
from aotrain.testing import sqnr
from benchmarks.case import Case
from benchmarks.float8 import CPU_SHAPES, GPU_SHAPES

LAYERS = ("int4-g32", "8da4w")
# Of output and gradients beside those of bfloat16: int4 in groups of 32 leaves 20 dB of normal numbers, and 18 dB of a
# gradient whose saturated elements, one in 60, are zero.
_MIN_SQNR_DB = 15.0

_Layer = Callable[[torch.Tensor], torch.Tensor]


def qat_cases(device: torch.device) -> Iterator[Case]:
    """Every layer on every shape, eager and then compiled; those of a shape are timed in turns with bfloat16."""
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    for compiled in (False, True):
        for tokens, k, n in shapes:
            options = {"device": device, "dtype": torch.bfloat16}
            linear = torch.nn.Linear(k, n, bias=False, **options)
            x = torch.randn(tokens, k, requires_grad=True, **options)
            grad = torch.randn(tokens, n, **options)
            for name, layer in _layers(linear).items():
                suffix = "-compiled" if compiled and name != "bf16" else ""
                layer = torch.compile(layer, dynamic=False) if suffix else layer
                yield _case(name + suffix, layer, linear.weight, x, grad, "compiled" if compiled else "eager")


def _layers(linear: torch.nn.Linear) -> dict[str, _Layer]:
    """Name -> layer with the same weight."""
    layers: dict[str, _Layer] = {"bf16": linear}
    for name in LAYERS:
        layers[f"aotrain-{name}"] = _ours(linear.weight, name)
    if importlib.util.find_spec("torchao"):
        layers |= _peers(linear)
    return layers


def _ours(weight: torch.Tensor, name: str) -> _Layer:
    scheme = SCHEMES[name]
    return lambda x: fake_quantized_linear(x, weight, None, scheme.activation, scheme.weight)


def _peers(linear: torch.nn.Linear) -> dict[str, _Layer]:
    """torchao's layers of the same schemes, prepared as its users do."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, QATStep

    # pyrefly: ignore[missing-attribute]
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    tokens = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    layers: dict[str, _Layer] = {}
    for name, activations in (("int4-g32", None), ("8da4w", tokens)):
        model = torch.nn.Sequential(torch.nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta"))
        model[0].weight = linear.weight
        quantize_(model, QATConfig(activation_config=activations, weight_config=weights, step=QATStep.PREPARE))
        assert model[0].weight is linear.weight, "the peer made a weight of its own"
        layers[f"torchao-{name}"] = model[0]
    return layers


def _case(name: str, layer: _Layer, weight: torch.Tensor, x: torch.Tensor, grad: torch.Tensor, mode: str) -> Case:
    def run() -> tuple[torch.Tensor, ...]:
        y = layer(x)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))

    def check() -> None:
        exact = (x.float() @ weight.float().t(), grad.float() @ weight.float(), grad.float().t() @ x.float())
        got = [float(sqnr(want.detach(), value)) for want, value in zip(exact, run(), strict=True)]
        assert min(got) >= _MIN_SQNR_DB, f"SQNR {got} dB, want {_MIN_SQNR_DB}"

    (tokens, k), n = x.shape, weight.shape[0]
    shape = f"{tokens}x{k}x{n}"
    return Case(
        name=f"qat-{name}",
        shape=shape,
        run=run,
        check=check,
        # Each operand is read and each result written once.
        bytes_moved=2 * 2 * (tokens * k + n * k + tokens * n),
        flops=3 * 2 * tokens * k * n,
        elements=tokens * k + n * k,
        bytes_kept=saved_bytes(layer, x),
        group=f"{shape}-{mode}",
    )


def saved_bytes(layer: _Layer, x: torch.Tensor) -> int:
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
