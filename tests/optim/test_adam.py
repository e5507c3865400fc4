"""AdamW8bit against torch.optim.AdamW: update rule, options, schedulers, groups, rounding."""

import copy

import pytest
import torch
from torch import nn

from aotrain.optim import AdamW8bit
from aotrain.optim.state import MIN_QUANTIZED_NUMEL
from aotrain.testing import assert_bitwise_equal, sqnr


def regression(seed: int = 0, dtype: torch.dtype = torch.float32):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 96), nn.Tanh(), nn.Linear(96, 70)).to(dtype)
    return model, torch.randn(64, 128, dtype=dtype), torch.randn(64, 70, dtype=dtype)


def train(model, optimizer, x, target, steps: int, scheduler=None) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_float32_moments_are_torch_adamw(amsgrad: bool, weight_decay: float):
    """Small parameters are not quantized, so only the order of float32 operations differs: 120 dB after 20 steps."""
    model = nn.Linear(16, 8)
    assert model.weight.numel() < MIN_QUANTIZED_NUMEL
    twin = copy.deepcopy(model)
    x, target = torch.randn(32, 16), torch.randn(32, 8)
    options = {"lr": 1e-2, "weight_decay": weight_decay, "amsgrad": amsgrad}
    train(model, AdamW8bit(model.parameters(), **options), x, target, 20)
    train(twin, torch.optim.AdamW(twin.parameters(), **options), x, target, 20)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert sqnr(theirs, ours) > 110


@pytest.mark.parametrize("amsgrad", [False, True])
def test_quantized_moments_train_like_torch_adamw(amsgrad: bool):
    model, x, target = regression()
    twin = copy.deepcopy(model)
    ours = train(model, AdamW8bit(model.parameters(), lr=3e-3, amsgrad=amsgrad), x, target, 60)
    theirs = train(twin, torch.optim.AdamW(twin.parameters(), lr=3e-3, amsgrad=amsgrad), x, target, 60)
    assert ours[0] == theirs[0]
    assert theirs[-1] < 0.2 * theirs[0]
    assert ours[-1] < 1.05 * theirs[-1]  # measured 0.96


def test_first_update_uses_unquantized_moments():
    """After one step the update is lr * sign-like: bit-equal to the same rule with float32 moments."""
    weight = nn.Parameter(torch.randn(64, 128))
    grad = torch.randn_like(weight)
    expected = weight.detach() * (1 - 1e-3 * 1e-2)
    m, v = grad * (1 - 0.9), grad * grad * (1 - 0.999)
    root = v.double().sqrt().float()
    expected = expected - m / (root * (1 / (1 - 0.999) ** 0.5) + 1e-8) * (1e-3 / (1 - 0.9))
    weight.grad = grad
    AdamW8bit([weight]).step()
    assert_bitwise_equal(weight.detach(), expected)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_schedulers_and_assignment_of_the_learning_rate(lr):
    model, x, target = regression()
    optimizer = AdamW8bit(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    train(model, optimizer, x, target, 10, scheduler)
    assert float(optimizer.param_groups[0]["lr"]) < 1e-6
    optimizer.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, x, target, 1)
    for name, value in model.state_dict().items():
        assert_bitwise_equal(value, before[name])


def test_groups_extra_keys_and_string_options():
    model, x, target = regression()
    groups = [
        {"params": [model[0].weight], "weight_decay": 0.0, "param_names": ["0.weight"], "fused": True},
        {"params": [model[2].weight], "block_size": 64, "param_names": ["2.weight"]},
        {"params": [model[0].bias, model[2].bias], "lr": 0.0, "param_names": ["0.bias", "2.bias"]},
    ]
    optimizer = AdamW8bit(groups, block_size="128", bf16_stochastic_round=0)
    bias = model[0].bias.detach().clone()
    train(model, optimizer, x, target, 2)
    assert torch.equal(model[0].bias, bias)
    assert optimizer.state[model[0].weight]["exp_avg_scale"].shape == (96, 1)
    assert optimizer.state[model[2].weight]["exp_avg_scale"].shape == (70, 2)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight"]


def test_closure_sees_gradients():
    model, x, target = regression()
    optimizer = AdamW8bit(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_parameters_without_gradient_are_left_alone():
    model, x, target = regression()
    model[0].weight.requires_grad_(False)
    optimizer = AdamW8bit(model.parameters())
    before = model[0].weight.detach().clone()
    train(model, optimizer, x, target, 2)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight not in optimizer.state


def test_stochastic_rounding_moves_weights_that_nearest_rounding_freezes():
    """Updates of 2^-12 of the weight: a quarter of what moves a bfloat16. Nearest loses all of them."""
    final = {}
    for stochastic in (False, True):
        weight = nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
        optimizer = AdamW8bit([weight], lr=2.0**-12, weight_decay=0.0, bf16_stochastic_round=stochastic)
        for _ in range(64):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        final[stochastic] = weight.detach().float().mean().item()
    assert final[False] == 1.0
    assert abs(final[True] - (1 - 64 * 2.0**-12)) < 0.1 * 64 * 2.0**-12


def test_stochastic_rounding_repeats_with_the_seed_and_differs_between_seeds_steps_and_parameters():
    def run(seed: int) -> list[torch.Tensor]:
        weights = [nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = AdamW8bit(weights, lr=2.0**-10, bf16_stochastic_round=True, seed=seed)
        snapshots = []
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optimizer.step()
            snapshots.append(torch.stack([weight.detach().clone() for weight in weights]))
        return snapshots

    first, again, other = run(1), run(1), run(2)
    assert_bitwise_equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(first[0][0], first[0][1])
    assert not torch.equal(first[0] == 1, (first[1] - first[0]) == 0)


def test_overflowed_bfloat16_weight_stays_visible():
    weight = nn.Parameter(torch.full((64, 128), 3e38, dtype=torch.bfloat16))
    weight.grad = -torch.ones_like(weight)
    AdamW8bit([weight], lr=1e38, bf16_stochastic_round=True, weight_decay=0.0).step()
    assert bool(weight.isinf().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (70, 100), (16, 3, 9, 11), (5000, 64)], ids=str)
def test_shapes_and_dtypes(shape, dtype):
    weight = nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = AdamW8bit([weight], block_size=48)
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    assert weight.dtype == dtype
    assert bool(weight.isfinite().all())


def test_non_contiguous_parameter_and_gradient():
    base = torch.randn(96, 80)
    straight, transposed = nn.Parameter(base.clone()), nn.Parameter(base.t().contiguous().t())
    grad = torch.randn(96, 80)
    for weight, g in ((straight, grad), (transposed, grad.t().contiguous().t())):
        weight.grad = g
        AdamW8bit([weight]).step()
    assert_bitwise_equal(straight.detach(), transposed.detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"eps": -1e-8}, "Invalid epsilon value"),
        ({"betas": (1.0, 0.9)}, "beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, "beta parameter at index 1"),
        ({"weight_decay": -1}, "Invalid weight_decay"),
        ({"block_size": 0}, "Invalid block_size: 0"),
    ],
)
def test_bad_hyperparameters(options, message: str):
    with pytest.raises(ValueError, match=message):
        AdamW8bit([nn.Parameter(torch.ones(2))], **options)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        AdamW8bit(embedding.parameters()).step()
