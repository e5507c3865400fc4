"""Copies between a device and host memory: streams, events and bounded pinned buffers, and their twin without a device.

Everything that knows about streams is here. `HostTransfers` makes the same calls finish at once, so the optimizer runs,
and is tested, on a machine without an accelerator.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadReport:
    """Where the time of one `CPUOffloadOptimizer.step` went.

    Attributes:
        step_seconds: from the begin of the step until the last weight was back on the device. On an accelerator the
            clock starts when the device has finished what was enqueued before, the backward pass.
        cpu_seconds: the optimizer's arithmetic on the host.
        transfer_seconds: copies in both directions, those during the backward pass included.
        hidden_seconds: arithmetic and copies that ran beside each other or beside the backward pass.
        offloaded: elements stepped on the host, on this rank.
    """

    step_seconds: float
    cpu_seconds: float
    transfer_seconds: float
    hidden_seconds: float
    offloaded: int

    def __str__(self) -> str:
        return (
            f"step {self.step_seconds:.3f} s for {self.offloaded / 1e6:.1f} M offloaded elements: "
            f"cpu {self.cpu_seconds:.3f} s + transfers {self.transfer_seconds:.3f} s, "
            f"{self.hidden_seconds:.3f} s hidden"
        )


class Ticket(Protocol):
    """A copy that was started."""

    def synchronize(self) -> None:
        """Block until the copy is complete."""


class _Done:
    def synchronize(self) -> None:
        pass


class Transfers(ABC):
    """Copies between one device and the host, and how long they took."""

    pin_memory: bool

    @abstractmethod
    def begin_step(self) -> None:
        """After this, uploads may overwrite what the device has been reading, and host weights may be modified."""

    @abstractmethod
    def download(self, host: torch.Tensor, device: torch.Tensor) -> Ticket:
        """Start copying to the host what is enqueued to be computed; the source may be freed at once."""

    @abstractmethod
    def upload(self, device: torch.Tensor, host: torch.Tensor) -> None:
        """Start copying to the device."""

    @abstractmethod
    def finish_step(self) -> None:
        """Make whatever is enqueued on the device from now on see all uploads."""

    @abstractmethod
    def seconds(self) -> tuple[float, float]:
        """Of the last finished step: seconds of copying, and seconds from its begin until the last upload was done."""


class HostTransfers(Transfers):
    """The "device" is the host: every copy is complete when the call returns."""

    pin_memory = False

    def __init__(self) -> None:
        self._copying = self._started = 0.0
        self._last = (0.0, 0.0)

    def begin_step(self) -> None:
        """Start the clock, but count the copies since the last step: nothing ran beside them."""
        self._started = time.perf_counter() - self._copying

    def download(self, host: torch.Tensor, device: torch.Tensor) -> Ticket:
        """Copy."""
        self._copy(host, device)
        return _Done()

    def upload(self, device: torch.Tensor, host: torch.Tensor) -> None:
        """Copy."""
        self._copy(device, host)

    def finish_step(self) -> None:
        """Stop the clock."""
        self._last = (self._copying, time.perf_counter() - self._started)
        self._copying = 0.0

    def seconds(self) -> tuple[float, float]:
        """See the base class."""
        return self._last

    def _copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        started = time.perf_counter()
        destination.copy_(source)
        self._copying += time.perf_counter() - started


class DeviceTransfers(Transfers):
    """One stream per direction, made once: streams made per step grow the allocator's pools without bound."""

    pin_memory = True

    def __init__(self, device: torch.device) -> None:
        self._api = torch.get_device_module(device)
        self._device = device
        self._down = self._api.Stream(device=device)
        self._up = self._api.Stream(device=device)
        # (begin, end) events of each copy since the last step finished, and those of the last step.
        self._running: list[tuple[torch.Event, torch.Event]] = []
        self._last: list[tuple[torch.Event, torch.Event]] = []
        self._begin: torch.Event | None = None
        self._end: torch.Event | None = None

    def begin_step(self) -> None:
        """Uploads wait for the device; the host waits for the uploads of the previous step."""
        if self._end is not None:
            self._end.synchronize()
        begin = self._event(self._api.current_stream(self._device))
        self._up.wait_event(begin)
        self._begin = begin

    def download(self, host: torch.Tensor, device: torch.Tensor) -> Ticket:
        """Enqueue behind the current stream, on a stream of its own."""
        self._down.wait_stream(self._api.current_stream(self._device))
        ticket = self._copy(self._down, host, device)
        # The gradient may be freed while it is being copied; its memory must not be reused before.
        device.record_stream(self._down)
        return ticket

    def upload(self, device: torch.Tensor, host: torch.Tensor) -> None:
        """Enqueue on a stream of its own."""
        self._copy(self._up, device, host)

    def finish_step(self) -> None:
        """The current stream waits; the host does not."""
        end = self._event(self._up)
        self._api.current_stream(self._device).wait_event(end)
        self._end = end
        self._last, self._running = self._running, []

    def seconds(self) -> tuple[float, float]:
        """See the base class; on the device's clock, so a step that starts while the device is busy costs nothing."""
        if self._begin is None or self._end is None:
            return (0.0, 0.0)
        self._end.synchronize()
        copying = sum(begin.elapsed_time(end) for begin, end in self._last)
        return copying / 1e3, self._begin.elapsed_time(self._end) / 1e3

    def _copy(self, stream: torch.Stream, destination: torch.Tensor, source: torch.Tensor) -> torch.Event:
        with self._api.stream(stream):
            begin = self._event(stream)
            destination.copy_(source, non_blocking=True)
            end = self._event(stream)
        self._running.append((begin, end))
        return end

    def _event(self, stream: torch.Stream) -> torch.Event:
        event = self._api.Event(enable_timing=True)
        event.record(stream)
        return event


def transfers_for(device: torch.device) -> Transfers:
    """Copies between this device and the host."""
    return HostTransfers() if device.type == "cpu" else DeviceTransfers(device)


class Settling(Protocol):
    """Holds buffers until it settles."""

    def settle(self) -> torch.Tensor:
        """Wait for the copies into the buffers, use them and give them back."""
        ...


class StagingPool:
    """Host buffers for tensors on their way, at most `limit` bytes of them, reused from step to step.

    A buffer given back may still be the target of a copy: all users of a pool copy on one stream, so the next copy into
    it starts later.
    """

    def __init__(self, limit: int, pin_memory: bool) -> None:
        self.limit = limit
        self.used = 0
        # Who would give buffers back if asked to settle, in the order in which they got them.
        self.reclaimable: dict[Settling, None] = {}
        self._pin_memory = pin_memory
        self._held = 0
        self._free: dict[int, list[torch.Tensor]] = {}

    def acquire(self, like: torch.Tensor) -> torch.Tensor | None:
        """A contiguous host tensor of this shape and dtype, or None if that would exceed the limit.

        An empty pool serves any size: a tensor larger than the limit has to pass too.
        """
        size = like.numel() * like.element_size()
        if self.used > 0 and self.used + size > self.limit:
            return None
        free = self._free.get(size)
        if free:
            buffer = free.pop()
        else:
            if self._held + size > self.limit:
                self._held = self.used
                self._free.clear()
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._pin_memory)
            self._held += size
        self.used += size
        return buffer.view(like.dtype).view(like.shape)

    def acquire_waiting(self, like: torch.Tensor) -> torch.Tensor:
        """The same, but waits until others have given enough back."""
        buffer = self.acquire(like)
        while buffer is None:
            if not self.reclaimable:
                raise RuntimeError(f"got a staging pool with {self.used} bytes lost, want it empty once all settled")
            next(iter(self.reclaimable)).settle()
            buffer = self.acquire(like)
        return buffer

    def release(self, tensor: torch.Tensor) -> None:
        """Give back what `acquire` returned."""
        size = tensor.numel() * tensor.element_size()
        self.used -= size
        if self._held > self.limit:
            self._held -= size
        else:
            self._free.setdefault(size, []).append(tensor.view(-1).view(torch.uint8))


def host_empty(shape: Sequence[int], dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
    """Uninitialized contiguous host memory."""
    return torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
