"""One offloaded parameter: its weight on the host, and its gradient on the way there.

A gradient either stays on the device and is copied through a bounded buffer for the step (`DeviceGradient`), or moves
to host memory as soon as it is computed and is accumulated there (`HostGradient`).
"""

from abc import ABC, abstractmethod

import torch

from aotrain.optim.offload_transfer import StagingPool, Ticket, Transfers, host_empty
from aotrain.optim.sharding import is_dtensor, local_of


def fingerprint(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Changes whenever the tensor is modified in place by a torch operation, or gets other memory.

    A DTensor can be modified through itself or through its local tensor, which count separately. A write through
    `.data` or outside of torch does not show.
    """
    local = local_of(tensor)
    return (local.data_ptr(), tensor._version, local._version)


def like_param(param: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """`local`, or for a sharded parameter the DTensor on its mesh and with its placements that has this local part.

    It stays where it is, as in `aotrain.optim.sharding.shard_like`.
    """
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor(local, param._spec, requires_grad=False)


class Gradient(ABC):
    """The gradient of one parameter on its way to the host; all methods run without autograd."""

    def __init__(self, param: torch.Tensor, transfers: Transfers, pool: StagingPool) -> None:
        self.param = param
        self.transfers = transfers
        self.pool = pool

    @property
    @abstractmethod
    def present(self) -> bool:
        """Whether there is a gradient to step with."""

    @abstractmethod
    def stage(self) -> bool:
        """Start whatever copy is left; False if there is no buffer for it now."""

    @abstractmethod
    def settle(self) -> torch.Tensor:
        """Wait, and return this rank's gradient in host memory; valid after `stage` returned True."""

    @abstractmethod
    def release(self) -> None:
        """The host gradient has been used, or never will be: give its buffer back."""

    @abstractmethod
    def drop(self, set_to_none: bool) -> None:
        """Forget the gradient, or zero it."""

    @abstractmethod
    def for_norm(self) -> torch.Tensor:
        """This rank's gradient wherever it is complete without further copies."""

    @abstractmethod
    def scale(self, factor: torch.Tensor) -> None:
        """Multiply the gradient by a scalar, on both sides."""

    def check(self) -> None:
        """Raise RuntimeError if `param.grad` cannot be offloaded."""
        if self.param.grad is not None:
            self._local_grad()

    def _local_grad(self) -> torch.Tensor:
        grad = self.param.grad
        if grad is None:
            raise RuntimeError("got no gradient to copy, want one; ask `present` first")
        if grad.is_sparse:
            raise RuntimeError(
                f"CPUOffloadOptimizer got a sparse gradient for an offloaded parameter of shape {tuple(grad.shape)}, "
                "want a dense one; build the embedding with sparse=False, or raise minimal_size to keep it on device."
            )
        if is_dtensor(grad) and is_dtensor(self.param) and grad.placements != self.param.placements:
            grad = grad.redistribute(self.param.device_mesh, self.param.placements)
        return local_of(grad).detach()


class DeviceGradient(Gradient):
    """`param.grad` stays where it is; a bounded buffer carries it to the host during the step.

    It is not copied during the backward pass: what modifies gradients afterwards cannot be noticed reliably (unscaling
    by GradScaler does not count as a modification), and the copies hide behind the arithmetic of the step anyway.
    """

    def __init__(self, param: torch.Tensor, transfers: Transfers, pool: StagingPool) -> None:
        super().__init__(param, transfers, pool)
        self._buffer: torch.Tensor | None = None
        self._ticket: Ticket | None = None

    @property
    def present(self) -> bool:
        """See the base class."""
        return self.param.grad is not None

    def stage(self) -> bool:
        """See the base class."""
        if self._buffer is None:
            local = self._local_grad()
            self._buffer = self.pool.acquire(local)
            if self._buffer is None:
                return False
            self._ticket = self.transfers.download(self._buffer, local)
        return True

    def settle(self) -> torch.Tensor:
        """See the base class."""
        if self._buffer is None or self._ticket is None:
            raise RuntimeError("got a gradient whose copy was not started; want stage() before settle()")
        self._ticket.synchronize()
        return self._buffer

    def release(self) -> None:
        """See the base class."""
        if self._buffer is not None:
            self.pool.release(self._buffer)
        self._buffer = self._ticket = None

    def drop(self, set_to_none: bool) -> None:
        """Nothing: `param.grad` itself belongs to `Optimizer.zero_grad`."""

    def for_norm(self) -> torch.Tensor:
        """On the device."""
        return self._local_grad()

    def scale(self, factor: torch.Tensor) -> None:
        """See the base class."""
        if self.param.grad is not None:
            local_of(self.param.grad).mul_(factor.to(self.param.grad.device))


class HostGradient(Gradient):
    """The gradient lives in host memory; `param.grad` is None again as soon as the backward pass has made it."""

    def __init__(self, param: torch.Tensor, transfers: Transfers, pool: StagingPool) -> None:
        super().__init__(param, transfers, pool)
        self._total: torch.Tensor | None = None
        self._filled = False
        self._ticket: Ticket | None = None
        self._pending: list[tuple[torch.Tensor, Ticket]] = []

    @property
    def present(self) -> bool:
        """See the base class."""
        return self._filled or self.param.grad is not None

    def stage(self) -> bool:
        """Take `param.grad` away from the device; a second one is added to the first on the host."""
        if self.param.grad is None:
            return True
        local = self._local_grad()
        if self._total is None or (self._total.shape, self._total.dtype) != (local.shape, local.dtype):
            self._total = host_empty(local.shape, local.dtype, self.transfers.pin_memory)
            self._filled = False
        if not self._filled:
            self._ticket = self.transfers.download(self._total, local)
            self._filled = True
        else:
            buffer = self.pool.acquire_waiting(local)
            self._pending.append((buffer, self.transfers.download(buffer, local)))
            self.pool.reclaimable[self] = None
        self.param.grad = None
        return True

    def settle(self) -> torch.Tensor:
        """See the base class."""
        if self._total is None or self._ticket is None:
            raise RuntimeError("got no gradient in host memory; want stage() before settle()")
        self._ticket.synchronize()
        for buffer, ticket in self._pending:
            ticket.synchronize()
            self._total += buffer
        self._release_pending()
        return self._total

    def release(self) -> None:
        """Nothing: like `param.grad`, the sum lives until zero_grad."""

    def drop(self, set_to_none: bool) -> None:
        """See the base class."""
        if not set_to_none and self._filled and self._total is not None:
            self.settle().zero_()
            return
        self._release_pending()
        self._filled = False

    def for_norm(self) -> torch.Tensor:
        """On the host."""
        self.stage()
        return self.settle()

    def scale(self, factor: torch.Tensor) -> None:
        """See the base class."""
        self.settle().mul_(factor)

    def _release_pending(self) -> None:
        for buffer, _ in self._pending:
            self.pool.release(buffer)
        self._pending.clear()
        self.pool.reclaimable.pop(self, None)


class OffloadedParam:
    """A parameter on the device and its twin on the host, which is what the optimizer steps.

    Attributes:
        param: on the device.
        host: same shape, dtype and sharding, in host memory.
        gradient: of `param`, on its way to `host`.
    """

    def __init__(self, param: torch.Tensor, transfers: Transfers) -> None:
        local = local_of(param.detach())
        self.param = param
        self.transfers = transfers
        memory = host_empty(local.shape, local.dtype, transfers.pin_memory)
        self.host = torch.nn.Parameter(like_param(param, memory))
        self.gradient: Gradient
        # Some optimizers read the weights when they are made.
        self.refresh()
        # `param.data.copy_` is a common way to load weights and does not show in the fingerprint.
        self.forget()

    @property
    def nbytes(self) -> int:
        """Size of this rank's weight."""
        local = local_of(self.host)
        return local.numel() * local.element_size()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weight from the device to the host."""
        self.transfers.download(local_of(self.host), local_of(self.param)).synchronize()
        self._seen = fingerprint(self.param)

    def forget(self) -> None:
        """Take the host's copy for outdated."""
        self._seen: tuple[int, int, int] | None = None

    def refresh_if_changed(self) -> None:
        """Copy the weight from the device if anything but `upload` has modified it since the last copy."""
        if fingerprint(self.param) != self._seen:
            self.refresh()

    def set_host_grad(self) -> None:
        """Wait for the gradient and give it to the host's twin."""
        self.host.grad = like_param(self.param, self.gradient.settle())

    def upload(self) -> None:
        """Start copying the weight to the device; the host's gradient is no longer needed."""
        self.host.grad = None
        self.gradient.release()
        self.transfers.upload(local_of(self.param), local_of(self.host))
        self._seen = fingerprint(self.param)
