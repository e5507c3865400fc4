"""Fake-quantized layers split by torch's tensor-parallel styles on gloo: values of one process, or a refusal."""

import itertools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from aotrain.qat import IntxFakeQuantizeConfig, QATConfig, initialize_fake_quantizers, prepare_qat
from aotrain.quantization import quantize_
from aotrain.testing import sqnr
from tests.distributed.ranks import run_ranks

# Sums over ranks in float32, in another order. Measured: at least 128 dB; parts with scales of their own give 23 to 46.
ORDER_DB = 110.0


class Mlp(nn.Module):
    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(64, hidden), nn.Linear(64, hidden, bias=False), nn.Linear(hidden, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate(x).tanh() * self.up(x))


def parallel(model: nn.Module, mesh: DeviceMesh, *, sequence: bool = False) -> nn.Module:
    outside = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {
        "gate": ColwiseParallel(input_layouts=outside),
        "up": ColwiseParallel(input_layouts=outside),
        "down": RowwiseParallel(output_layouts=outside),
    }
    return parallelize_module(model, mesh, plan)


def batch() -> torch.Tensor:
    return torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-2, 1, y.shape[-1])).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    full = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    return {"output": y.detach(), "input": x.grad, **full}


def prepared(scheme: str, exclude: tuple[str, ...] = ()) -> nn.Module:
    model = Mlp()
    prepare_qat(model, scheme, exclude=exclude)
    return model


# Weights alone in groups; per-row weights and per-token inputs, which only columns can have.
WHOLE: list[tuple[str, tuple[str, ...]]] = [
    ("int4-g32", ()),
    ("int4-g128", ("gate", "up")),
    ("fp8-block", ()),
    ("mxfp8", ()),
    ("q4_0", ()),
    ("8da4w", ("down",)),
    ("int8", ("down",)),
    ("fp8", ("down",)),
]


def compare(mesh: DeviceMesh, scheme: str, exclude: tuple[str, ...], sequence: bool) -> None:
    x, rank = batch(), mesh.get_local_rank()
    want = step(prepared(scheme, exclude), x)
    model = parallel(Mlp(), mesh, sequence=sequence)
    prepare_qat(model, scheme, exclude=exclude)
    got = step(model, x.chunk(2, dim=1)[rank] if sequence else x)
    for name, value in want.items():
        split = sequence and name in ("output", "input")
        expected = value.chunk(2, dim=1)[rank] if split else value
        assert sqnr(expected, got[name]) > ORDER_DB, f"{scheme}, sequence {sequence}: {name}"


def with_fsdp2(world_size: int) -> None:
    """Gathered weights are DTensors of the tensor-parallel ranks."""
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "tp"))
    model = parallel(Mlp(), mesh["tp"])
    prepare_qat(model, "int4-g32")
    fully_shard(model, mesh=mesh["dp"])
    want, got = step(prepared("int4-g32"), batch()), step(model, batch())
    for name, value in want.items():
        assert sqnr(value, got[name]) > ORDER_DB, name


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    messages = {}
    for scheme in ("8da4w", "int8", "nvfp4"):
        model = parallel(Mlp(), mesh)
        prepare_qat(model, scheme)
        messages[scheme] = message(lambda model=model: model(batch()))
    narrow = parallel(Mlp(hidden=96), mesh)
    prepare_qat(narrow, "int4-g32")
    messages["parted groups"] = message(lambda: narrow(batch()))
    learning = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_dynamic=False, range_learning=True)
    learned = parallel(Mlp(), mesh)
    quantize_(learned, QATConfig(weight_config=learning))
    messages["initialize"] = message(lambda: initialize_fake_quantizers(learned, (batch(),)))
    messages["learned"] = message(lambda: learned(batch()))
    embedding = nn.Sequential(nn.Embedding(32, 64), nn.Linear(64, 64))
    prepare_qat(parallelize_module(embedding, mesh, {"0": RowwiseParallel()}), "int4-g32", embeddings=True)
    messages["embedding"] = message(lambda: embedding(torch.arange(4)))
    # torch's style looks for a weight in the modules inside of a layer, too.
    messages["late style"] = message(lambda: parallel(prepared("int4-g32"), mesh))
    return messages


def message(call: Any) -> str:
    try:
        call()
    except (ValueError, AttributeError) as error:
        return str(error)
    return "nothing was raised"


def on_two_ranks(rank: int, world_size: int) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (world_size,))
    for (scheme, exclude), sequence in itertools.product(WHOLE, (False, True)):
        compare(mesh, scheme, exclude, sequence)
    with_fsdp2(world_size)
    return refusals(mesh)


def test_parts_have_the_codes_of_the_whole_or_are_refused():
    for messages in run_ranks(on_two_ranks, 2):
        assert "split over 2 ranks as S(2), which parts what has one scale" in messages["8da4w"]
        assert "which parts what has one scale" in messages["int8"]
        assert "which parts what has one scale" in messages["nvfp4"]
        assert "a weight (64, 96) split over 2 ranks as S(1), which parts groups of 32" in messages["parted groups"]
        assert "before fully_shard" in messages["initialize"]
        assert "want dynamic scales with tensor parallelism" in messages["learned"]
        assert "linear layers alone can be" in messages["embedding"]
        assert "has no attribute 'weight'" in messages["late style"]
