"""FSDP2 with weights gathered as codes: bit-equal to gathering them in high precision, on 2 and 4 gloo ranks."""

import copy
import io
import itertools
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from aotrain.nn import Float8LinearConfig, convert_to_float8_training
from aotrain.nn.float8_config import FLOAT8_LINEAR_RECIPES
from aotrain.nn.fsdp_weight import FsdpWeight, fsdp_weight_of
from aotrain.nn.fsdp_wrap import precompute_float8_dynamic_scale_for_fsdp
from aotrain.nn.gathered_weight import planes_of
from aotrain.ops import cast_weight
from aotrain.optim import AdamW8bit
from aotrain.recipes import RECIPES
from aotrain.testing import assert_bitwise_equal
from tests.distributed.ranks import run_ranks

# 300 rows over 2 or 4 ranks cut blocks of 128; 97 divides by neither; of 5 rows over 4 ranks one gets none.
SIZES = (130, 300, 97, 5)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
MASTER = MixedPrecisionPolicy()


class Checkpointed(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def build(recipe: str, gather: bool, *, container: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(k, n, bias=n != 97) for k, n in itertools.pairwise(SIZES)]
    model = nn.Sequential(*(container(layer, nn.Tanh()) for layer in layers))
    config = replace(Float8LinearConfig.from_recipe_name(recipe), enable_fsdp_float8_all_gather=gather)
    convert_to_float8_training(model, config=config)
    return model


def shard(model: nn.Sequential, policy: MixedPrecisionPolicy = BF16, **options: Any) -> nn.Sequential:
    for module in (*model, model):
        fully_shard(module, mp_policy=policy, **options)
    return model


def step(model: nn.Module, seed: int) -> list[torch.Tensor]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    x = torch.randn(16, SIZES[0], generator=torch.Generator().manual_seed(seed * 100 + rank)).requires_grad_()
    y = model(x)
    y.float().square().mean().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int = 3, passes: int = 1) -> list[torch.Tensor]:
    """Everything that came out: outputs, gradients of input and weights, the norm, and the weights at the end."""
    seen = []
    for number in range(steps):
        for part in range(passes):
            seen += step(model, number * passes + part)
        seen += [param.grad.to_local().clone() for param in model.parameters() if param.grad is not None]
        seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).full_tensor())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        seen.append(model(torch.ones(2, SIZES[0])))
    for module in (*model, model):
        module.reshard()
    return seen + [param.full_tensor() for param in model.parameters()]


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def case(name: str, recipe: str, gather: bool) -> list[torch.Tensor]:
    if name == "master dtype":
        return train(model := shard(build(recipe, gather), MASTER), adamw(model))
    if name == "kept after forward":
        return train(model := shard(build(recipe, gather), reshard_after_forward=False), adamw(model))
    if name == "fused":
        return train(model := shard(build(recipe, gather)), adamw(model, fused=True))
    if name == "8-bit":
        return train(model := shard(build(recipe, gather)), AdamW8bit(model.parameters(), lr=1e-2))
    if name == "accumulation":
        return train(model := shard(build(recipe, gather)), adamw(model), passes=2)
    if name == "checkpointing":
        return train(model := shard(build(recipe, gather, container=Checkpointed)), adamw(model))
    if name == "compiled":
        torch._dynamo.reset()
        model = shard(build(recipe, gather))
        for block in model:
            block.compile(backend="aot_eager")
        return train(model, adamw(model, fused=True))
    if name == "hybrid":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        return train(model := shard(build(recipe, gather), mesh=mesh), adamw(model))
    assert name == "changed outside of optimizers"
    model = shard(build(recipe, gather))
    step(model, 0)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3)
    seen = step(model, 1)
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()})
    seen += step(model, 2)
    for number, write in enumerate(
        (lambda p: p.data.mul_(4), lambda p: p.detach().mul_(3), lambda p: p.to_local().mul_(2))
    ):
        with torch.no_grad():
            for param in model.parameters():
                write(param)
        seen += step(model, 4 + number)
    with torch.no_grad():  # what only the explicit call sees: a write without a version
        for param in model.parameters():
            param.to_local().data.mul_(5)
    precompute_float8_dynamic_scale_for_fsdp(model)
    return seen + step(model, 3)


CASES = {
    "master dtype": list(FLOAT8_LINEAR_RECIPES),
    "kept after forward": ["rowwise"],
    "fused": list(FLOAT8_LINEAR_RECIPES),
    "8-bit": ["tensorwise"],
    "accumulation": ["blockwise"],
    "checkpointing": ["rowwise"],
    "compiled": ["rowwise", "tensorwise"],
    "changed outside of optimizers": ["tensorwise", "rowwise"],
}


# Four ranks: what depends on how rows are cut, or needs so many.
CASES_OF_FOUR = {"fused": ["tensorwise", "rowwise", "blockwise"], "hybrid": ["rowwise"]}


def compare(rank: int, world_size: int) -> None:
    for name, recipes in (CASES_OF_FOUR if world_size == 4 else CASES).items():
        for recipe in recipes:
            want, got = case(name, recipe, gather=False), case(name, recipe, gather=True)
            assert len(want) == len(got) >= 6
            for number, (a, b) in enumerate(zip(got, want, strict=True)):
                assert_bitwise_equal(a, b, what=f"{name}, {recipe}, rank {rank}, result {number}")


@pytest.mark.parametrize("world_size", [2, 4])
def test_gathered_codes_give_the_bits_of_gathered_values(world_size: int):
    run_ranks(compare, world_size)


class Wire(TorchDispatchMode):
    """Bytes that this rank puts into each kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sent = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)][-1]
            self.sent.setdefault(func._opname, []).append(sent.nbytes)
        return func(*args, **(kwargs or {}))


def bytes_of_a_step(recipe: str, gather: bool, reshard: bool) -> dict[str, list[int]]:
    model = shard(build(recipe, gather), reshard_after_forward=reshard)
    optimizer = adamw(model, fused=True)
    for number in range(2):  # the first step finds out what to do
        with Wire() as wire:
            step(model, number)
            optimizer.step()
        optimizer.zero_grad()
    return wire.sent


def measure_bytes(rank: int, world_size: int) -> dict[str, list[int]]:
    return {
        f"{recipe} {gather} {reshard} {kind}": sent
        for recipe in FLOAT8_LINEAR_RECIPES
        for gather in (False, True)
        for reshard in (False, True)
        for kind, sent in bytes_of_a_step(recipe, gather, reshard).items()
        if "reduce_scatter" not in kind
    }


def test_one_byte_per_element_and_one_all_reduce_per_step():
    halves = [-(-n // 2) for n in SIZES[1:]]
    weights = sum(rows * k for rows, k in zip(halves, SIZES, strict=False))
    biases = halves[0] + halves[2]
    two_planes = {"float8_rowwise", "float8_rowwise_with_gw_hp", "int8_rowwise"}
    for sent in run_ranks(measure_bytes, 2):
        for recipe in FLOAT8_LINEAR_RECIPES:
            gathered = {
                (gather, reshard): sum(
                    sum(sizes)
                    for name, sizes in sent.items()
                    if name.startswith(f"{recipe} {gather} {reshard} ") and "gather" in name
                )
                for gather in (False, True)
                for reshard in (False, True)
            }
            assert gathered[False, True] == 2 * 2 * (weights + biases)
            assert gathered[True, True] == 2 * (weights + 2 * biases)
            assert gathered[False, False] == 2 * (weights + biases)
            # Kept after forward: the codes for backward are gathered when they are needed.
            assert gathered[True, False] == (2 if recipe in two_planes else 1) * weights + 2 * biases
            for reshard in (False, True):
                reduces = sent[f"{recipe} True {reshard} allreduce_"]
                assert len(reduces) == 1
                assert f"{recipe} False {reshard} allreduce_" not in sent
            if recipe == "float8_tensorwise":
                assert reduces == [4 * 3]
            if recipe == "float8_rowwise":
                assert reduces == [4 * (sum(SIZES[1:]) + sum(SIZES[:-1]))]
            if recipe == "float8_blockwise":
                assert reduces == [4 * (3 * 2 + 1 * 3 + 1 * 1)]


def states(rank: int, world_size: int) -> None:
    model = build("rowwise", True)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    shard(copied)
    with torch.device("meta"):
        empty = build("rowwise", True)
    shard(empty).to_empty(device="cpu")
    shard(model)
    for got, expected in zip(train(copied, adamw(copied)), train(model, adamw(model)), strict=True):
        assert_bitwise_equal(got, expected)

    state = model.state_dict()
    empty.load_state_dict(state)
    assert all(type(value) is DTensor and type(value.to_local()) is torch.Tensor for value in state.values())
    assert all(type(value._local_tensor) is torch.Tensor for value in state.values())
    # The state is the weights, not a copy, as for any module.
    assert state["0.0.weight"].to_local().data_ptr() == model[0][0].weight.to_local().data_ptr()
    for saved in (state, dict(model.named_parameters())):
        file = io.BytesIO()
        torch.save({name: value.to_local() for name, value in saved.items()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert {type(value) for value in loaded.values()} <= {torch.Tensor, nn.Parameter}

    again = shard(build("rowwise", True))
    for assign in (False, True):
        again.load_state_dict({name: value.clone() for name, value in state.items()}, assign=assign)
        assert all(fsdp_weight_of(layer[0].weight) is not None for layer in (*again, *empty))
        for other in (again, empty):
            for number in (7, 8):
                for got, expected in zip(step(other, number), step(model, number), strict=True):
                    assert_bitwise_equal(got, expected)


def test_states_are_ordinary_and_every_way_to_a_model_works():
    run_ranks(states, 2)


def offloaded(rank: int, world_size: int) -> None:
    """With CPU offload FSDP2 asks a copy on the device for codes, and the weight itself for what they mean."""
    mesh = init_device_mesh("cpu", (world_size,))
    for recipe in FLOAT8_LINEAR_RECIPES:
        planes = planes_of(RECIPES[recipe])
        whole = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
        weight = FsdpWeight(whole.chunk(world_size)[rank].clone(), planes)
        copied = weight.clone()
        (codes,), metadata = copied.fsdp_pre_all_gather(mesh, whole.shape, whole.stride(), None, BF16)
        gathered = torch.empty(6, 20, dtype=torch.uint8)
        dist.all_gather(list(gathered.chunk(world_size)), codes)
        unsharded, _ = weight.fsdp_post_all_gather((gathered,), metadata, torch.bfloat16)
        for transposed, scaling in ((False, RECIPES[recipe].output.rhs), (True, RECIPES[recipe].grad_input.rhs)):
            want = cast_weight(whole.bfloat16(), scaling, transposed=transposed)
            got = unsharded.quantized(scaling, transposed=transposed)
            assert got.scaling == want.scaling
            assert_bitwise_equal(got.data, want.data)
            assert_bitwise_equal(got.scale, want.scale)


def test_a_copy_on_the_device_gives_the_codes_of_an_offloaded_weight():
    run_ranks(offloaded, 2)


def test_gathered_weight_is_read_only_and_not_for_others():
    messages = run_ranks(misuse, 2)[0]
    assert "read-only" in messages[0]
    assert "share (tie) weights before" in messages[1]
    assert "after FSDP2 had freed it" in messages[2]


def misuse(rank: int, world_size: int) -> list[str]:
    model = shard(build("tensorwise", True))
    model[0].unshard()
    weight = model[0][0].weight
    with torch.no_grad():
        # Looking at it is allowed, and sees the codes' values.
        assert 0 < (weight.float() - weight.norm() * 0).abs().amax() < 1
        assert "GatheredWeight" in repr(weight)
        attempts = (lambda: weight.mul_(2), lambda: nn.functional.embedding(torch.tensor([0]), weight), weight.norm)
        messages = []
        for attempt in attempts:
            if attempt is attempts[-1]:
                model[0].reshard()
            try:
                attempt()
            except RuntimeError as error:
                messages.append(str(error))
    return messages
