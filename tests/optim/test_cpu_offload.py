"""CPUOffloadOptimizer against the optimizer it offloads: the same bits after every step, whatever the options."""

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from aotrain.optim import AdamW4bit, AdamW8bit
from aotrain.optim.cpu_offload import CPUOffloadOptimizer
from aotrain.testing import assert_bitwise_equal

# fused=True is what the offloaded AdamW uses by default.
CLASSES = {
    "adamw": (torch.optim.AdamW, {"fused": True, "weight_decay": 0.1}),
    "adamw_loop": (torch.optim.AdamW, {"fused": False, "amsgrad": True}),
    "adamw8bit": (AdamW8bit, {"weight_decay": 0.1}),
    "adamw8bit_sr": (AdamW8bit, {"bf16_stochastic_round": True}),
    "adamw4bit": (AdamW4bit, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adafactor": (torch.optim.Adafactor, {}),
}
MODES = pytest.mark.parametrize("offload_gradients", [False, True], ids=["grads_on_device", "grads_on_host"])
EVERY_CLASS = pytest.mark.parametrize("name", CLASSES)
# Smaller than any gradient here, one or two gradients, all gradients.
STAGING = pytest.mark.parametrize("staging_bytes", [1, 100_000, 1 << 28])


def twins(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Matrices of 12288, 6720 and 11200 elements, which are offloaded, and biases, which are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96), nn.Tanh(), nn.Linear(96, 70), nn.Tanh(), nn.Linear(70, 160)).to(dtype)
    return model, copy.deepcopy(model)


def pair(name: str, models: tuple[nn.Module, nn.Module], groups: Callable = nn.Module.parameters, **options):
    """(offloaded, plain) optimizers of the same class and options; `offload_*` options are for the first only."""
    cls, defaults = CLASSES[name]
    own = {
        key: options.pop(key)
        for key in ("offload_gradients", "staging_bytes", "minimal_size", "max_grad_norm")
        if key in options
    }
    options = {"lr": 1e-2, **defaults, **options}
    # A scheduler modifies a tensor in place.
    own["lr"] = copy.deepcopy(options["lr"])
    return CPUOffloadOptimizer(groups(models[0]), cls, **{**options, **own}), cls(groups(models[1]), **options)


def backward(model: nn.Module, seed: int) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed)).to(dtype)
    loss = model(x).float().square().mean() * 100
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds, scheduler=None, micro: int = 1) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        for part in range(micro):
            backward(model, 10 * seed + part)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same_weights(models: tuple[nn.Module, nn.Module]) -> None:
    for (name, ours), plain in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert_bitwise_equal(ours.detach(), plain.detach(), what=name)


def assert_same_state(ours: dict, plain: dict) -> None:
    assert [group["params"] for group in ours["param_groups"]] == [group["params"] for group in plain["param_groups"]]
    assert ours["state"].keys() == plain["state"].keys()
    for index, want in plain["state"].items():
        assert ours["state"][index].keys() == want.keys()
        for key, value in want.items():
            if isinstance(value, torch.Tensor):
                assert_bitwise_equal(ours["state"][index][key], value, what=f"{index}.{key}")


@MODES
@EVERY_CLASS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_step_has_the_bits_of_the_plain_optimizer(name: str, offload_gradients: bool, dtype):
    models = twins(dtype)
    optimizers = pair(name, models, offload_gradients=offload_gradients)
    for seed in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, [seed], micro=3)
        assert_same_weights(models)
    assert_same_state(optimizers[0].state_dict(), optimizers[1].state_dict())


@MODES
@STAGING
def test_the_size_of_the_buffers_changes_nothing(staging_bytes: int, offload_gradients: bool):
    models = twins()
    optimizers = pair("adamw8bit", models, offload_gradients=offload_gradients, staging_bytes=staging_bytes)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(3), micro=3)
    assert_same_weights(models)
    (_, pool), *_ = optimizers[0]._transfers.values()
    assert pool.used == 0


@MODES
def test_gradients_leave_the_device_only_when_asked(offload_gradients: bool):
    models = twins()
    optimizer, _ = pair("adamw", models, offload_gradients=offload_gradients)
    assert optimizer.offload_gradients == offload_gradients
    backward(models[0], 0)
    for param in models[0].parameters():
        assert (param.grad is None) == (offload_gradients and param.numel() >= 4096)


@pytest.mark.parametrize(("minimal_size", "offloaded"), [(0, 6), (4096, 3), (6721, 2), (10**9, 0)])
def test_minimal_size_decides_what_is_offloaded(minimal_size: int, offloaded: int):
    models = twins()
    optimizers = pair("adamw8bit", models, minimal_size=minimal_size)
    assert len(optimizers[0]._offloaded) == offloaded
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2))
    assert_same_weights(models)


def groups_of(model: nn.Module) -> list[dict]:
    matrices = [(name, param) for name, param in model.named_parameters() if param.ndim == 2]
    vectors = [(name, param) for name, param in model.named_parameters() if param.ndim == 1]
    return [{"params": matrices, "lr": 3e-3, "note": "kept"}, {"params": vectors, "weight_decay": 0.0}]


SCHEDULERS = {
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
    "onecycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10),
    "sequential": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        ],
        milestones=[2],
    ),
}


@MODES
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_groups_and_schedulers(name: str, scheduler: str, offload_gradients: bool, tensor_lr: bool):
    models = twins()
    lr = torch.tensor(1e-2) if tensor_lr else 1e-2
    optimizers = pair(name, models, groups_of, offload_gradients=offload_gradients, lr=lr)
    assert optimizers[0].param_groups[0]["note"] == "kept"
    assert optimizers[0].param_groups[0]["param_names"] == ["0.weight", "2.weight", "4.weight"]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(5), SCHEDULERS[scheduler](optimizer))
    assert_same_weights(models)
    ours, plain = (
        [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        for optimizer in optimizers
    )
    assert ours == plain


def test_lr_can_be_assigned_as_float_or_tensor():
    models = twins()
    optimizers = pair("adamw8bit", models)
    for lr in (1e-3, torch.tensor(2e-3), 0.0, 5e-3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            train(model, optimizer, [1])
        assert_same_weights(models)


@MODES
@EVERY_CLASS
def test_frozen_parameters_and_parameters_without_gradient(name: str, offload_gradients: bool):
    models = twins()
    for model in models:
        model[2].weight.requires_grad_(False)
        model.unused = nn.Parameter(torch.ones(80, 80))
    optimizers = pair(name, models, offload_gradients=offload_gradients)
    assert models[0][2].weight not in optimizers[0]._offloaded  # costs no host memory
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2))
        model[2].weight.requires_grad_(True)
        train(model, optimizer, range(2, 4))
    assert_same_weights(models)
    assert_same_state(optimizers[0].state_dict(), optimizers[1].state_dict())


@MODES
def test_a_step_without_zero_grad_uses_the_gradients_again(offload_gradients: bool):
    models = twins()
    optimizers = pair("adamw", models, offload_gradients=offload_gradients)
    for model, optimizer in zip(models, optimizers, strict=True):
        backward(model, 0)
        optimizer.step()
        optimizer.step()
        backward(model, 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
    assert_same_weights(models)


@MODES
def test_gradients_assigned_by_hand(offload_gradients: bool):
    models = twins()
    optimizers = pair("adamw", models, offload_gradients=offload_gradients)
    for seed in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            generator = torch.Generator().manual_seed(seed)
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(models)


def test_gradients_may_be_modified_after_backward():
    models = twins()
    optimizers = pair("adamw", models)
    for model, optimizer in zip(models, optimizers, strict=True):
        backward(model, 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        model[0].weight.grad[0] = 0.0
        model[2].weight.grad = model[2].weight.grad * 3
        model[4].weight.grad = None
        model[2].weight.grad.data.mul_(2.0)
        optimizer.step()
    assert_same_weights(models)


def test_grad_scaler():
    models = twins()
    optimizers = pair("adamw_loop", models)
    for model, optimizer in zip(models, optimizers, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for seed in range(3):
            optimizer.zero_grad()
            x = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed))
            loss = model(x).square().mean() * (float("inf") if seed == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_same_weights(models)


def test_grad_scaler_cannot_reach_the_host_and_is_refused():
    model, _ = twins()
    optimizer = CPUOffloadOptimizer(model.parameters(), offload_gradients=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.randn(8, 128)).square().mean()).backward()
    with pytest.raises(RuntimeError, match="offload_gradients=False"):
        scaler.step(optimizer)
    assert optimizer.state == {}


@MODES
def test_closure_runs_with_gradients_and_its_loss_is_returned(offload_gradients: bool):
    models = twins()
    losses = []
    for model, optimizer in zip(models, pair("adamw", models, offload_gradients=offload_gradients), strict=True):

        def closure(model=model, optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            return backward(model, 3)

        losses.append([optimizer.step(closure).item() for _ in range(3)])
    assert losses[0] == losses[1]
    assert_same_weights(models)


def test_step_hooks_and_added_groups():
    models = twins()
    calls = []
    optimizers = pair("adamw8bit", models, lambda model: model[0].parameters())
    optimizers[0].register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizers[0].register_step_post_hook(lambda *_: calls.append("post"))
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, [0])
        optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 3e-3})
        optimizer.add_param_group({"params": [model[4].weight], "bits": 4})
        train(model, optimizer, [1, 2])
    assert calls == ["pre", "post"] * 3
    assert_same_weights(models)
    with pytest.raises(ValueError, match="block_size"):
        optimizers[0].add_param_group({"params": [model[4].bias], "block_size": 0})
    assert len(optimizers[0].param_groups) == 3


class Counting(torch.optim.Optimizer):
    """Keeps its step count in the group, as some optimizers do."""

    def __init__(self, params, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad * (group["lr"] / group["count"]))


@MODES
def test_counters_in_groups_count_steps_not_chunks(offload_gradients: bool):
    models = twins()
    ours = CPUOffloadOptimizer(
        models[0].parameters(), Counting, staging_bytes=1, offload_gradients=offload_gradients, lr=1e-2
    )
    plain = Counting(models[1].parameters(), lr=1e-2)
    for model, optimizer in zip(models, (ours, plain), strict=True):
        train(model, optimizer, range(3))
    assert ours.param_groups[0]["count"] == 3
    assert_same_weights(models)


def test_weights_may_be_loaded_at_any_time():
    models = twins()
    optimizers = pair("adamw", models)
    other = {name: torch.randn_like(value) for name, value in models[0].state_dict().items()}
    for model, optimizer in zip(models, optimizers, strict=True):
        model[0].weight.data.copy_(other["0.weight"])  # before the first step: any way
        train(model, optimizer, range(2))
        model.load_state_dict(other)
        train(model, optimizer, range(2))
        with torch.no_grad():
            model[2].weight.mul_(2.0)
        train(model, optimizer, range(2))
        model[4].weight.data.mul_(2.0)
        if isinstance(optimizer, CPUOffloadOptimizer):
            optimizer.refresh_weights()
        train(model, optimizer, range(2))
    assert_same_weights(models)


def test_report_adds_up():
    models = twins()
    optimizer, _ = pair("adamw8bit", models)
    train(models[0], optimizer, range(2))
    report = optimizer.report()
    assert report.offloaded == 12288 + 6720 + 11200
    assert 0.0 < report.cpu_seconds + report.transfer_seconds <= report.step_seconds
    assert report.hidden_seconds == 0.0  # nothing runs beside anything on one device
    assert "hidden" in str(report)


def test_an_optimizer_that_is_thrown_away_lets_the_model_go_on():
    model, _ = twins()
    optimizer = CPUOffloadOptimizer(model.parameters(), offload_gradients=True)
    reference = weakref.ref(optimizer)
    del optimizer
    assert reference() is None
    backward(model, 0)
    assert all(param.grad is not None for param in model.parameters())


@MODES
def test_the_last_optimizer_made_for_a_parameter_gets_its_gradients(offload_gradients: bool):
    models = twins()
    replaced = CPUOffloadOptimizer(models[0].parameters(), offload_gradients=True)
    optimizers = pair("adamw", models, offload_gradients=offload_gradients)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2))
    assert_same_weights(models)
    assert replaced.state == {}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"params": []}, ValueError, "optimizer got an empty parameter list"),
        ({"minimal_size": -1}, ValueError, "minimal_size: -1; want >= 0"),
        ({"staging_bytes": 0}, ValueError, "staging_bytes: 0; want >= 1"),
        ({"max_grad_norm": 0.0}, ValueError, r"max_grad_norm: 0.0; want > 0"),
        ({"learning_rate": 1e-3}, TypeError, "AdamW does not take learning_rate; .* lr"),
        ({"optimizer_class": AdamW8bit, "momentum": 0.9}, TypeError, "AdamW8bit does not take momentum; .*block_size"),
        ({"optimizer_class": "adamw"}, TypeError, "want a subclass of torch.optim.Optimizer"),
        ({"optimizer_class": torch.optim.LBFGS}, ValueError, "LBFGS evaluates the loss several times"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
        ({"params": [nn.Parameter(torch.empty(80, 80, device="meta"))]}, ValueError, "to_empty"),
    ],
)
def test_bad_arguments(options: dict, error: type[Exception], match: str):
    options = {"params": [nn.Parameter(torch.zeros(80, 80))], **options}
    with pytest.raises(error, match=match):
        CPUOffloadOptimizer(**options)


@MODES
def test_sparse_gradient_is_a_clear_error(offload_gradients: bool):
    embedding = nn.Embedding(100, 64, sparse=True)
    optimizer = CPUOffloadOptimizer(
        embedding.parameters(), torch.optim.SGD, offload_gradients=offload_gradients, lr=0.1
    )
    before = embedding.weight.detach().clone()

    def train_step() -> None:
        embedding(torch.tensor([1, 2])).sum().backward()
        optimizer.step()

    with pytest.raises(RuntimeError, match="sparse=False"):
        train_step()
    assert optimizer.state == {}
    assert_bitwise_equal(embedding.weight.detach(), before)
