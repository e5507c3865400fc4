"""Checkpoints that torchao and bitsandbytes themselves write, continued here.

    pip install torchao bitsandbytes && pytest tests/optim/test_convert_peers.py

Both are peers, not dependencies: without them these tests are skipped, and test_convert.py has their layouts by hand.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from aotrain.optim import Adam8bit, AdamW4bit, AdamW8bit, AdamW32bit, AdamWFp8, convert_state

# Values of the maps are computed in another order of float32 operations: 1.8e-7 apart, and one product.
MAP_RTOL = 1e-6
# Distance of the weights from theirs after ten more steps, relative to the distance without conversion, by the coarser
# of the two formats. Measured: 4 bits 0.17-0.18, as most rows here are not whole blocks of theirs; float8 0.038;
# 8 bits 0.014-0.057; 32 bits 4e-7.
MAX_DRIFT = {4: 0.3, "fp8": 0.1, 8: 0.1, 32: 1e-5}
CASES = [
    ("torchao", "AdamW8bit", AdamW8bit),
    ("torchao", "Adam8bit", Adam8bit),
    ("torchao", "AdamW4bit", AdamW4bit),
    ("torchao", "AdamWFp8", AdamWFp8),
    ("torchao", "AdamW8bit", AdamW32bit),
    ("torchao", "AdamW4bit", AdamW32bit),
    ("bitsandbytes", "AdamW8bit", AdamW8bit),
    # Its Adam decays weights as AdamW does.
    ("bitsandbytes", "Adam8bit", AdamW8bit),
    ("bitsandbytes", "AdamW8bit", AdamW32bit),
    ("bitsandbytes", "AdamW32bit", AdamW32bit),
]


@pytest.fixture(autouse=True)
def _eager():
    """torchao compiles its step for seconds; what it computes is the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


def build() -> nn.Module:
    """Rows of 512 are whole blocks, rows of 320 are not; the last bias is large enough for bitsandbytes to quantize."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 320), nn.Tanh(), nn.Linear(320, 64), nn.Tanh(), nn.Linear(64, 4224))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 512, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.repeat(1, 9)[:, :4224]).square().mean().backward()
        optimizer.step()


def written_by_a_peer(library: str, cls: str, path: Path):
    """A model, the peer's optimizer after ten steps, and its state as read from a file."""
    peer = pytest.importorskip(library, reason=f"a peer: pip install {library}")
    model = build()
    optimizer = getattr(peer.optim, cls)(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.05)
    train(model, optimizer, range(10))
    torch.save(optimizer.state_dict(), path)
    return model, optimizer, torch.load(path, weights_only=True)


def moment_of_peer(state: dict, name: str, shape: torch.Size) -> torch.Tensor:
    """Decoded without any code of ours."""
    if name in state:
        value = state[name]
        return value.dequantize() if hasattr(value, "dequantize") and hasattr(value, "codes") else value
    state = {**state, **state.get("__bnb_optimizer_quant_state__", {})}
    suffix = {"exp_avg": "1", "exp_avg_sq": "2"}[name]
    codes = state[f"state{suffix}"]
    if codes.dtype != torch.uint8:
        return codes
    from bitsandbytes.functional import dequantize_blockwise

    qmap, absmax = state[f"qmap{suffix}"], state[f"absmax{suffix}"]
    return dequantize_blockwise(codes, absmax=absmax, code=qmap, blocksize=256).view(shape)


@pytest.mark.parametrize(("library", "theirs", "ours"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_real_checkpoint_is_read_and_continued(library: str, theirs: str, ours, tmp_path):
    model, their_optimizer, saved = written_by_a_peer(library, theirs, tmp_path / "optimizer.pt")
    twin, fresh = copy.deepcopy(model), copy.deepcopy(model)
    options = {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 0.05}
    optimizer, fresh_optimizer = ours(twin.parameters()), ours(fresh.parameters(), **options)
    optimizer.load_state_dict(convert_state(saved, optimizer))

    group = optimizer.param_groups[0]
    assert {key: pytest.approx(group[key]) for key in options} == options
    for index, param in enumerate(twin.parameters()):
        state = optimizer.state[param]
        assert float(state["step"]) == 10
        for moment in optimizer.moments(param, group):
            want = moment_of_peer(saved["state"][index], moment.name, param.shape)
            exact = len(moment.keys) == 1 or param.shape[1] % moment.block_size == 0
            if exact and ours.state_bits in (32, their_bits(theirs)):
                torch.testing.assert_close(moment.read(state, param), want, rtol=MAP_RTOL, atol=0.0)

    train(model, their_optimizer, range(10, 20))
    train(twin, optimizer, range(10, 20))
    train(fresh, fresh_optimizer, range(10, 20))
    drift = distance(model, twin) / distance(model, fresh)
    assert drift < max(MAX_DRIFT[their_bits(theirs)], MAX_DRIFT[ours.state_bits])


def their_bits(name: str) -> int | str:
    return {"8bit": 8, "4bit": 4, "Fp8": "fp8"}.get(name.removeprefix("Adam").removeprefix("W"), 32)


def distance(a: nn.Module, b: nn.Module) -> float:
    squares = [(p - q).square().sum() for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    return torch.stack(squares).sum().sqrt().item()
