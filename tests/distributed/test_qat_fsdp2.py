"""Quantization-aware training under FSDP2 on gloo: losses, gradients, weights and exported codes of one process.

Both ranks have the same batch, so the mean of their gradients is the gradient of one, bit for bit. With a
MixedPrecisionPolicy the reference is a bfloat16 copy of float32 masters, written out here.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from aotrain.export import export
from aotrain.optim import AdamW4bit, AdamW8bit, AdamWFp8
from aotrain.qat import (
    IntxFakeQuantizeConfig,
    QATConfig,
    QATSchedule,
    convert_qat,
    initialize_fake_quantizers,
    prepare_moe_qat,
    prepare_qat,
    share_global_scales,
)
from aotrain.quantization import quantize_
from aotrain.testing import assert_bitwise_equal, sqnr
from tests.distributed.ranks import run_ranks
from tests.export.checkpoints import write
from tests.nn.experts import Experts, MoE

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
STEPS = 3
Results = dict[str, torch.Tensor]


class Block(nn.Module):
    """Rows of 97 do not divide by two ranks, nor those of any layer into blocks of 128."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(64, 97), nn.Linear(64, 97, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(64, 160, bias=False), nn.Linear(64, 160)
        self.down_proj = nn.Linear(160, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = (self.q_proj(x) * self.k_proj(x)).sum(-1, keepdim=True).tanh()
        return x + self.down_proj(self.gate_proj(x).tanh() * self.up_proj(x)) * scores


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.lm_head = nn.Embedding(97, 64), nn.Linear(64, 97, bias=False)
        self.layers = nn.ModuleList([Block(), Block()])
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def tokens(step: int) -> torch.Tensor:
    return torch.randint(0, 97, (4, 6), generator=torch.Generator().manual_seed(step))


def by_scheme(scheme: str, tied: bool = False, embeddings: bool = False) -> nn.Module:
    model = Model(tied)
    prepare_qat(model, scheme, embeddings=embeddings)
    if scheme == "nvfp4":
        assert ("layers.0.q_proj", "layers.0.k_proj") in share_global_scales(model)
    return model


def learned() -> nn.Module:
    model = Model()
    for symmetric, name in ((True, "gate_proj"), (False, "up_proj")):
        config = IntxFakeQuantizeConfig(
            torch.int4, group_size=32, is_symmetric=symmetric, is_dynamic=False, range_learning=True
        )
        quantize_(model, QATConfig(weight_config=config), filter_fn=lambda _, fqn, name=name: name in fqn)
    initialize_fake_quantizers(model, (tokens(0),))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(by_scheme, name) for name in ("int4-g32", "8da4w", "int8", "fp8", "fp8-block", "mxfp8", "nvfp4")},
    "embeddings": partial(by_scheme, "int4-g32", embeddings=True),
    "tied": partial(by_scheme, "8da4w", tied=True, embeddings=True),
    "learned": learned,
}
OPTIMIZERS = (AdamW8bit, AdamW4bit, AdamWFp8)


def shard(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.layers, model):
        fully_shard(module, mp_policy=policy)
    return model


def train(
    build: Callable[[], nn.Module],
    dtype: torch.dtype,
    *,
    sharded: bool,
    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    schedule: QATSchedule | None = None,
    compiled: bool = False,
) -> tuple[nn.Module, Results]:
    """The trained model, and losses, last gradients and weights."""
    model = working = build()
    if compiled:
        for layer in model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    if sharded:
        shard(model, dtype)
    elif dtype != torch.float32:
        working = build().to(dtype)
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    results: Results = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        if schedule is not None:
            schedule.apply(working, step)
        cast_weights(model, working)
        loss = working(tokens(step)).float().square().mean()
        loss.backward()
        hand_over_gradients(working, model)
        optimizer.step()
        results[f"loss {step}"] = loss.detach()
    for name, parameter in model.named_parameters():
        results[f"gradient of {name}"] = full(parameter.grad)
    weights = get_model_state_dict(model, options=FULL) if sharded else model.state_dict()
    # Only rank 0 has them.
    return model, results | {name: weight.clone() for name, weight in weights.items()}


def cast_weights(masters: nn.Module, working: nn.Module) -> None:
    if working is not masters:
        with torch.no_grad():
            for master, weight in zip(masters.parameters(), working.parameters(), strict=True):
                weight.copy_(master)


def hand_over_gradients(working: nn.Module, masters: nn.Module) -> None:
    if working is not masters:
        for weight, master in zip(working.parameters(), masters.parameters(), strict=True):
            master.grad, weight.grad = weight.grad.float(), None


def full(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


RUNS = {
    **{
        f"{name}, {dtype}": {"build": build, "dtype": dtype}
        for name, build in MODELS.items()
        for dtype in (torch.float32, torch.bfloat16)
    },
    **{
        cls.__name__: {
            "build": MODELS["8da4w"],
            "dtype": torch.bfloat16,
            "optimizer_class": partial(cls, block_size=64),
        }
        for cls in OPTIMIZERS
    },
    "schedule": {"build": MODELS["int4-g32"], "dtype": torch.bfloat16, "schedule": QATSchedule(1, 1)},
}


def on_ranks(rank: int, world_size: int) -> dict:
    results = {name: train(**run, sharded=True)[1] for name, run in RUNS.items()}
    return results


def test_two_ranks():
    got = run_ranks(on_ranks, 2)
    for name, run in RUNS.items():
        _, want = train(**run, sharded=False)
        assert got[0][name].keys() == want.keys(), name
        for rank in (0, 1):
            for key, value in got[rank][name].items():
                assert_bitwise_equal(value, want[key], what=f"{name}: {key}")
