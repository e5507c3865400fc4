"""The order of copies: no result may depend on a copy before it was waited for, and buffers stay within their bound."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from aotrain.optim import AdamW8bit, cpu_offload
from aotrain.optim.cpu_offload import CPUOffloadOptimizer
from aotrain.optim.offload_transfer import DeviceTransfers, StagingPool, Ticket, Transfers
from aotrain.testing import assert_bitwise_equal
from tests.optim.test_cpu_offload import MODES, STAGING, assert_same_weights, backward, pair, train, twins


class LateTransfers(Transfers):
    """A device as slow as it may be: each copy happens when somebody waits for it, in the order of its stream."""

    pin_memory = False

    def __init__(self) -> None:
        self.down: list[Callable[[], object]] = []
        self.up: list[Callable[[], object]] = []
        self.waits = 0

    def begin_step(self) -> None:
        assert not self.up

    def download(self, host: torch.Tensor, device: torch.Tensor) -> Ticket:
        # What is modified after this call would be, on a device, modified after the copy.
        source = device.clone()
        host.fill_(float("nan"))
        self.down.append(lambda: host.copy_(source))
        position = len(self.down)
        return SimpleNamespace(synchronize=lambda: self._run(position))

    def upload(self, device: torch.Tensor, host: torch.Tensor) -> None:
        device.fill_(float("nan"))
        self.up.append(lambda: device.copy_(host))

    def finish_step(self) -> None:
        for copy in self.up:
            copy()
        self.up.clear()

    def seconds(self) -> tuple[float, float]:
        return (1.0, 2.0)

    def _run(self, position: int) -> None:
        self.waits += 1
        for index in range(position):
            self.down[index]()
            self.down[index] = lambda: None


@MODES
@STAGING
@pytest.mark.parametrize("max_grad_norm", [None, 1e6])
def test_every_copy_is_waited_for(monkeypatch, offload_gradients: bool, staging_bytes: int, max_grad_norm):
    late = LateTransfers()
    monkeypatch.setattr(cpu_offload, "transfers_for", lambda device: late)
    models = twins()
    options = {"offload_gradients": offload_gradients, "staging_bytes": staging_bytes, "max_grad_norm": max_grad_norm}
    for model, optimizer in zip(models, pair("adamw8bit", models, **options), strict=True):
        train(model, optimizer, range(3), micro=3)
        backward(model, 7)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        # Abandoned gradients are not added to the next ones.
        backward(model, 8)
        backward(model, 9)
        optimizer.zero_grad()
        train(model, optimizer, [4], micro=2)
    assert late.waits > 0
    assert_same_weights(models)


@MODES
def test_streams_and_events_are_used_as_torch_defines_them(monkeypatch, offload_gradients: bool):
    """The device's transfers over stand-ins for streams and events, which record what waits for what."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.name = ""

        def record(self, stream) -> None:
            self.name = stream.name

        def synchronize(self) -> None:
            log.append(f"host waits for {self.name}")

        def elapsed_time(self, end) -> float:
            return 1000.0

    class Stream:
        made = 0

        def __init__(self, device=None, name: str = "") -> None:
            Stream.made += not name
            self.name = name or ("down", "up")[Stream.made - 1]

        def wait_event(self, event) -> None:
            log.append(f"{self.name} waits for {event.name}")

        def wait_stream(self, stream) -> None:
            log.append(f"{self.name} waits for {stream.name}")

    main = Stream(name="main")
    api = SimpleNamespace(
        Event=Event, Stream=Stream, current_stream=lambda device: main, stream=lambda stream: nullcontext()
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: api)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.append("recorded"), raising=False)
    monkeypatch.setattr(DeviceTransfers, "pin_memory", False)
    monkeypatch.setattr(cpu_offload, "transfers_for", DeviceTransfers)

    models = twins()
    optimizers = pair("adamw8bit", models, offload_gradients=offload_gradients)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2))
    assert_same_weights(models)
    assert Stream.made == 2  # once, not per step
    assert log[-1] == "main waits for up"
    assert {"down waits for main", "up waits for main", "host waits for up", "host waits for down"} <= set(log)
    assert log.count("recorded") == log.count("down waits for main")
    report = optimizers[0].report()
    assert report.transfer_seconds == 6.0  # three gradients down, three weights up, each one second
    assert report.step_seconds == 1.0
    assert report.hidden_seconds == pytest.approx(5.0 + report.cpu_seconds)


def test_pool_is_bounded_reuses_buffers_and_serves_anything_when_empty():
    pool = StagingPool(100, pin_memory=False)
    first = pool.acquire(torch.zeros(4, 4))
    assert first.shape == (4, 4)
    assert first.dtype == torch.float32
    assert pool.acquire(torch.zeros(10)) is None
    small = pool.acquire(torch.zeros(9, dtype=torch.bfloat16))
    assert small.dtype == torch.bfloat16
    pool.release(first)
    again = pool.acquire(torch.zeros(16))
    assert again.data_ptr() == first.data_ptr()
    pool.release(again)
    pool.release(small)
    assert pool.used == 0
    large = pool.acquire(torch.zeros(1000))
    assert pool.used == 4000
    assert pool.acquire(torch.zeros(1)) is None
    pool.release(large)
    assert pool.used == 0
    assert pool.acquire(torch.zeros(0)).numel() == 0


@pytest.mark.gpu
@MODES
def test_device_weights_follow_the_host_optimizer(offload_gradients: bool):
    """On a GPU: the plain optimizer on the CPU, given the gradients of the GPU, makes the same bits."""
    model, reference = twins(torch.bfloat16)
    model = model.cuda()
    plain = AdamW8bit(reference.parameters(), lr=1e-2)
    seen: dict[int, torch.Tensor] = {}

    def keep(position: int) -> Callable[[torch.Tensor], None]:
        return lambda param: seen.update({position: param.grad.cpu()})

    # Before the optimizer's own hooks, which take the gradient away.
    for position, param in enumerate(model.parameters()):
        param.register_post_accumulate_grad_hook(keep(position))
    optimizer = CPUOffloadOptimizer(
        model.parameters(), AdamW8bit, lr=1e-2, minimal_size=0, offload_gradients=offload_gradients
    )
    for seed in range(4):
        optimizer.zero_grad()
        x = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()
        model(x).float().square().mean().backward()
        optimizer.step()
        for position, param in enumerate(reference.parameters()):
            param.grad = seen[position]
        plain.step()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert_bitwise_equal(ours.detach().cpu(), theirs.detach())
    assert optimizer.report().offloaded == sum(param.numel() for param in model.parameters())
