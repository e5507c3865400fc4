"""Quantization-aware training under FSDP2 on gloo: losses, gradients, weights and exported codes of one process.

Both ranks have the same batch, so the mean of their gradients is the gradient of one, bit for bit. With a
MixedPrecisionPolicy the reference is a bfloat16 copy of float32 masters, written out here.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
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
from aotrain.quantization.modules import QuantizedLinear
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


def shard(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.layers, model):
        fully_shard(module, mp_policy=policy)
    return model


def train(
    build: Callable[[], nn.Module],
    dtype: torch.dtype = torch.float32,
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


class Mixture(MoE):
    """Experts, on the batches of the others."""

    def __init__(self, prepared: bool = True) -> None:
        torch.manual_seed(0)
        super().__init__(Experts(hidden=64))
        self.layers = [self.experts]
        if prepared:
            prepare_moe_qat(self, "int4-g32-a8")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = torch.randn(97, 32, generator=torch.Generator().manual_seed(7))[tokens.flatten()]
        return super().forward(x.to(self.gate.weight.dtype))


BFLOAT16 = {"dtype": torch.bfloat16}
# Arguments of `train`. Schemes of weights and tokens, and of weights alone; groups, rows, blocks and global scales.
RUNS: dict[str, dict[str, Any]] = {
    **{f"{name} in float32": {"build": MODELS[name]} for name in ("int4-g32", "fp8-block", "nvfp4", "tied", "learned")},
    **{f"{name} in bfloat16": {"build": build, **BFLOAT16} for name, build in MODELS.items()},
    **{
        cls.__name__: {"build": MODELS["8da4w"], **BFLOAT16, "optimizer_class": partial(cls, block_size=64)}
        for cls in (AdamW8bit, AdamW4bit, AdamWFp8)
    },
    "schedule": {"build": MODELS["int4-g32"], "schedule": QATSchedule(start_step=1, anneal_steps=1)},
    "experts": {"build": Mixture, **BFLOAT16},
    "compiled": {"build": MODELS["8da4w"], "compiled": True},
}


def gradients(model: nn.Module, batch: torch.Tensor) -> Results:
    model(batch).float().square().mean().backward()
    return {name: full(parameter.grad) for name, parameter in model.named_parameters()}


def misuse() -> dict[str, str]:
    """Messages of what is refused."""
    config = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_dynamic=False, range_learning=True)
    learning = QATConfig(weight_config=config)
    late, early, apart = Model(), Model(), by_scheme("nvfp4")
    quantize_(late, learning)
    quantize_(early, learning)
    initialize_fake_quantizers(early, (tokens(0),))
    shard(late)
    for layer in apart.layers[0].children():
        fully_shard(layer)
    calls = {
        "prepare": lambda: prepare_qat(shard(Model()), "int4-g32"),
        "prepare by a configuration": lambda: quantize_(shard(Model()), learning),
        "convert": lambda: convert_qat(shard(by_scheme("int4-g32"))),
        "go back": lambda: quantize_(shard(by_scheme("int4-g32")), QATConfig(step="convert")),
        "initialize": lambda: initialize_fake_quantizers(late, (tokens(0),)),
        "load a range": lambda: set_model_state_dict(late, early.state_dict(), options=FULL),
        "members apart": lambda: apart(tokens(0)),
        "a layer by itself": lambda: shard(by_scheme("int4-g32")).layers[0].q_proj(torch.ones(2, 64)),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
            messages[name] = "nothing was raised"
        except ValueError as error:
            messages[name] = str(error)
    return messages


def served(state: Results, folder: Path) -> dict[str, torch.Tensor]:
    """A gathered checkpoint, saved in the dtype that training gathered weights in, and exported."""
    weights = {key: value.bfloat16() for key, value in state.items() if value.dim() == 2 and " " not in key}
    write(folder / "dense", weights, config={"num_hidden_layers": 2})
    export(folder / "dense", folder / "served", scheme="int8")
    return load_file(folder / "served" / "model.safetensors")


def on_ranks(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {name: train(**run, sharded=True)[1] for name, run in RUNS.items()}
    if rank == 0:
        results["served"] = served(results["int8 in bfloat16"], Path(folder))
    results["halves"] = gradients(shard(by_scheme("8da4w")), tokens(0).chunk(world_size)[rank])
    late = shard(Mixture(prepared=False), torch.bfloat16)
    prepare_moe_qat(late, "int4-g32-a8")
    results["late experts"] = gradients(late, tokens(0))
    results["misuse"] = misuse()
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(on_ranks, 2, str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("name", RUNS)
def test_losses_gradients_and_weights_are_those_of_one_process(ranks, name: str):
    _, want = train(**{**RUNS[name], "compiled": False}, sharded=False)
    assert ranks[0][name].keys() == want.keys()
    for results in ranks:
        for key, value in results[name].items():
            assert_bitwise_equal(value, want[key], what=f"{name}: {key}")
    assert all(value.any() for value in want.values())


def test_halves_of_a_batch_give_its_gradient(ranks):
    """Sums in another order. Measured: at least 140 dB."""
    want = gradients(by_scheme("8da4w"), tokens(0))
    for results in ranks:
        for name, gradient in want.items():
            assert sqnr(gradient, results["halves"][name]) > 110, name


def test_experts_may_be_prepared_after_sharding(ranks):
    want = gradients(Mixture().bfloat16(), tokens(0))
    for results in ranks:
        for name, gradient in want.items():
            assert_bitwise_equal(results["late experts"][name], gradient.float(), what=name)


def test_what_is_exported_is_what_the_last_forward_would_have_seen(ranks):
    """Not the codes of the float32 masters, and those of the layers that conversion of one process makes."""
    masters, _ = train(**RUNS["int8 in bfloat16"], sharded=False)
    model = copy.deepcopy(masters).bfloat16()
    for each in (model, masters):
        convert_qat(each)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(layers) == 10
    for name, layer in layers.items():
        assert_bitwise_equal(ranks[0]["served"][f"{name}.weight"], layer.codes, what=name)
        assert_bitwise_equal(ranks[0]["served"][f"{name}.weight_scale"], layer.scale, what=name)
    assert any(not torch.equal(layer.codes, masters.get_submodule(name).codes) for name, layer in layers.items())


def test_what_cannot_work_says_what_to_do(ranks):
    for results in ranks:
        messages = results["misuse"]
        for name in ("prepare", "prepare by a configuration", "convert", "go back"):
            assert "FSDP shards already" in messages[name], name
            assert "Prepare before fully_shard" in messages[name], name
        for name in ("initialize", "load a range"):
            assert "before fully_shard" in messages[name], name
        assert "fully_shard the block that holds them all" in messages["members apart"]
        assert "call the modules that are sharded" in messages["a layer by itself"]
