"""Any optimizer with its state, and its arithmetic, in host memory."""

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from aotrain.optim.offload_checks import (
    IMPLEMENTATION_FLAGS,
    check_arguments,
    check_max_norm,
    check_optimizer_class,
    check_state,
)
from aotrain.optim.offload_clip import clip_factor, total_norm
from aotrain.optim.offload_param import DeviceGradient, HostGradient, OffloadedParam
from aotrain.optim.offload_transfer import OffloadReport, StagingPool, Transfers, transfers_for
from aotrain.optim.sharding import local_of

# Chunks in flight: one is copied here, one is stepped, one is copied back, one is spare for uneven sizes.
_CHUNKS = 4
# The hook on each parameter whose gradients are taken to the host.
_HOOKS = WeakTensorKeyDictionary()


class CPUOffloadOptimizer(torch.optim.Optimizer):
    """Runs an optimizer of any class on the CPU, with its state and a copy of the weights in host memory.

    Gradients travel to the host, and weights back, while others are stepped; with `offload_gradients`, gradients travel
    while the backward pass runs.
    Each parameter's result is that of `optimizer_class` itself on the CPU, bit for bit, and `state_dict` is that of
    `optimizer_class`, so checkpoints move freely between the two. Sharded (DTensor) parameters stay sharded: each rank
    steps its own part.

    Weights may be loaded at any time, by anything that torch counts as an in-place modification; call
    `refresh_weights` after a write that it does not see (`param.data.copy_`).

    Args:
        params: parameters, named parameters or parameter groups. Frozen parameters cost nothing.
        optimizer_class: any optimizer that treats each parameter on its own.
        offload_gradients: take gradients to host memory, and accumulate them there, as soon as they are computed:
            `param.grad` is None after backward. Clip with `max_grad_norm` or `clip_grad_norm_` then.
        minimal_size: parameters with fewer elements (of the global parameter) are stepped on their device.
        max_grad_norm: clip the norm over all gradients, on host and device, of all ranks, in each step.
        staging_bytes: bound of the pinned buffers that gradients travel through, per device.
        **kwargs: for `optimizer_class`; `fused=True` is the default for `torch.optim.AdamW`.

    Raises:
        ValueError: no parameters, or an argument out of range.
        TypeError: an argument that `optimizer_class` does not take.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        offload_gradients: bool = False,
        minimal_size: int = 4096,
        max_grad_norm: float | None = None,
        staging_bytes: int = 256 * 1024 * 1024,
        **kwargs: Any,
    ) -> None:
        check_optimizer_class(optimizer_class, kwargs)
        check_arguments(minimal_size, max_grad_norm, staging_bytes)
        self.optimizer_class = optimizer_class
        self.offload_gradients = offload_gradients
        self.minimal_size = minimal_size
        self.max_grad_norm = max_grad_norm
        self._staging_bytes = staging_bytes
        self._inner: torch.optim.Optimizer | None = None
        self._offloaded: dict[torch.Tensor, OffloadedParam] = {}
        self._transfers: dict[torch.device, tuple[Transfers, StagingPool]] = {}
        # Offloaded parameters in the order in which their gradients arrived.
        self._arrived: dict[torch.Tensor, None] = {}
        self._cpu_seconds = 0.0
        self._stepped = 0
        # Has GradScaler hand its scale to `step`, which refuses, instead of unscaling the gradients that it sees.
        self._step_supports_amp_scaling = offload_gradients
        super().__init__(params, {})
        members = [param for group in self.param_groups for param in group["params"]]
        if (
            optimizer_class is torch.optim.AdamW
            and not IMPLEMENTATION_FLAGS & kwargs.keys()
            and all(param.is_floating_point() for param in members)
        ):
            kwargs["fused"] = True
        for param in members:
            self._offload(param)
        self._inner = optimizer_class([self._mirror(group) for group in self.param_groups], **kwargs)
        self.defaults = self._inner.defaults
        self._groups_from_inner()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        if self._inner is None:
            return
        group = self.param_groups[-1]
        for param in group["params"]:
            self._offload(param)
        try:
            self._inner.add_param_group(self._mirror(group))
        except Exception:
            self.param_groups.pop()
            raise
        self._groups_from_inner()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient.

        Args:
            closure: recomputes and returns the loss, with gradients enabled.

        Raises:
            RuntimeError: the gradient of an offloaded parameter is sparse, or GradScaler is used with
                `offload_gradients`; nothing has been modified.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if hasattr(self, "found_inf"):
            raise RuntimeError(
                "GradScaler cannot unscale gradients that are in host memory; train in bfloat16 without it, or with "
                "offload_gradients=False."
            )
        for item in self._offloaded.values():
            item.gradient.check()
        for transfers, _ in self._transfers.values():
            transfers.begin_step()
        if self.max_grad_norm is not None:
            self.clip_grad_norm_(self.max_grad_norm)
        self._cpu_seconds, self._stepped = 0.0, 0
        self._groups_to_inner()
        options = [_options(group) for group in self.inner.param_groups]
        self.inner.step()
        self._step_offloaded(options)
        for transfers, _ in self._transfers.values():
            transfers.finish_step()
        for group, before, mirror in zip(self.param_groups, options, self.inner.param_groups, strict=True):
            # Counters that some optimizers keep in their groups.
            group.update({key: value for key, value in _options(mirror).items() if value is not before.get(key)})
        self._publish_state()
        return loss

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Scale all gradients, on host and device, so that their norm is at most `max_norm`.

        `torch.nn.utils.clip_grad_norm_` over the optimizer's parameters gives the same, without `offload_gradients`.

        Returns:
            The norm before clipping, over all ranks; a float32 host scalar.

        Raises:
            ValueError: max_norm or norm_type is not positive.
            RuntimeError: the norm is not finite and `error_if_nonfinite`.
        """
        check_max_norm(max_norm, norm_type)
        params = [param for group in self.param_groups for param in group["params"]]
        on_host = [item for item in self._offloaded.values() if item.gradient.present]
        on_device = [param for param in params if param not in self._offloaded and param.grad is not None]
        grads = [(item.param, item.gradient.for_norm()) for item in on_host]
        grads += [(param, local_of(param.grad)) for param in on_device]
        norm = total_norm(params, grads, float(norm_type))
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(
                f"The norm of the gradients is {norm.item()}, want it finite; skip the step, or pass "
                "error_if_nonfinite=False to scale them anyway."
            )
        factor = clip_factor(norm, float(max_norm))
        # Multiplying by one changes nothing but costs a pass; NaN must spread, as it does in torch.
        if not factor >= 1.0:
            for item in on_host:
                item.gradient.scale(factor)
            for param in on_device:
                local_of(param.grad).mul_(factor.to(param.grad.device))
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, those in host memory included; see `torch.optim.Optimizer.zero_grad`."""
        super().zero_grad(set_to_none)
        with torch.no_grad():
            for item in self._offloaded.values():
                item.gradient.drop(set_to_none)
        self._arrived.clear()

    def refresh_weights(self) -> None:
        """Have the next step copy all weights from the device.

        Only needed after writes that torch does not count, as to `param.data`; and not before the first step, nor after
        `load_state_dict`.
        """
        for item in self._offloaded.values():
            item.forget()

    def report(self) -> OffloadReport:
        """Where the time of the last step went; waits until its weights are back on the device."""
        times = [transfers.seconds() for transfers, _ in self._transfers.values()]
        transfer = sum(copying for copying, _ in times)
        step = max((elapsed for _, elapsed in times), default=0.0)
        return OffloadReport(
            step_seconds=step,
            cpu_seconds=self._cpu_seconds,
            transfer_seconds=transfer,
            hidden_seconds=max(0.0, transfer + self._cpu_seconds - step),
            offloaded=self._stepped,
        )

    def state_dict(self) -> dict[str, Any]:
        """What `optimizer_class` would return; the state of offloaded parameters is on the CPU."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._groups_to_inner()
        state_dict = self.inner.state_dict()
        for hook in self._optimizer_state_dict_post_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class or of `optimizer_class` returned; all of it or, on a mismatch, nothing.

        How to compute (`fused`, `foreach`, `capturable`) is not loaded: that depends on where, not on what.

        Raises:
            ValueError: the state is of other parameters or of another optimizer.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        check_state(state_dict, self.param_groups, self.inner)
        self._groups_to_inner()
        groups = [
            saved | {flag: group[flag] for flag in IMPLEMENTATION_FLAGS & group.keys()}
            for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True)
        ]
        self.inner.load_state_dict({**state_dict, "param_groups": groups})
        self._groups_from_inner()
        self._publish_state()
        # Weights are usually loaded too.
        self.refresh_weights()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer of class `optimizer_class`, over host weights and small parameters."""
        if self._inner is None:
            raise RuntimeError("got a CPUOffloadOptimizer that is not constructed; want __init__ to have run")
        return self._inner

    def _offload(self, param: torch.Tensor) -> None:
        if param.is_meta:
            raise ValueError(
                f"CPUOffloadOptimizer got a parameter of shape {tuple(param.shape)} on the meta device, want one with "
                "memory; call model.to_empty(device=...) and load or initialize its weights first."
            )
        # An optimizer that this one replaces, and that is still alive, would take the gradients away.
        previous = _HOOKS.pop(param, None)
        if previous is not None:
            previous.remove()
        # A frozen parameter that is unfrozen later is stepped on its device.
        if param.numel() < self.minimal_size or not param.requires_grad or not param.is_floating_point():
            return
        device = local_of(param.detach()).device
        if device not in self._transfers:
            transfers = transfers_for(device)
            self._transfers[device] = (transfers, StagingPool(self._staging_bytes, transfers.pin_memory))
        transfers, pool = self._transfers[device]
        item = OffloadedParam(param, transfers)
        if self.offload_gradients:
            item.gradient = HostGradient(param, transfers, pool)
        else:
            item.gradient = DeviceGradient(param, transfers, pool)
        self._offloaded[param] = item
        if self.offload_gradients:
            _HOOKS[param] = param.register_post_accumulate_grad_hook(self._arrival_hook())

    def _arrival_hook(self) -> Callable[[torch.Tensor], None]:
        # Weak: a model must not keep the state of an optimizer that was thrown away.
        this = weakref.ref(self)

        @torch.no_grad()
        def arrived(param: torch.Tensor) -> None:
            optimizer = this()
            if optimizer is not None and param in optimizer._offloaded:
                optimizer._arrived.setdefault(param)
                optimizer._offloaded[param].gradient.stage()

        return arrived

    def _step_offloaded(self, options: Sequence[dict[str, Any]]) -> None:
        """Step the offloaded parameters in chunks: while one is computed, others are on their way."""
        for item in self._offloaded.values():
            item.refresh_if_changed()
        # In the order in which gradients arrived: the first copies are the first to be complete.
        order = list(self._arrived) + [param for param in self._offloaded if param not in self._arrived]
        queue = [self._offloaded[param] for param in order if self._offloaded[param].gradient.present]
        self._arrived.clear()
        # The inner optimizer steps whatever has a gradient: only one chunk at a time may.
        hidden = [
            (param, param.grad)
            for group in self.inner.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        for param, _ in hidden:
            param.grad = None
        try:
            while queue:
                chunk = self._next_chunk(queue)
                for item in chunk:
                    item.set_host_grad()
                _restore(self.inner.param_groups, options)
                started = time.perf_counter()
                self.inner.step()
                self._cpu_seconds += time.perf_counter() - started
                for item in chunk:
                    self._stepped += local_of(item.host).numel()
                    item.upload()
        finally:
            for item in self._offloaded.values():
                item.host.grad = None
                item.gradient.release()
            for param, grad in hidden:
                param.grad = grad

    def _next_chunk(self, queue: list[OffloadedParam]) -> list[OffloadedParam]:
        """Start as many copies as there is room for, and take from the queue what can be stepped together."""
        started = 0
        while started < len(queue) and queue[started].gradient.stage():
            started += 1
        count, size = 0, 0
        while count < started and (count == 0 or size + queue[count].nbytes <= self._staging_bytes // _CHUNKS):
            size += queue[count].nbytes
            count += 1
        if count == 0:
            raise RuntimeError("got no buffer for a gradient although none is in use; want a free staging pool")
        chunk = queue[:count]
        del queue[:count]
        return chunk

    def _mirror(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group as the inner optimizer has it: host twins in place of offloaded parameters."""
        twins = [self._offloaded[param].host if param in self._offloaded else param for param in group["params"]]
        return {**group, "params": twins}

    def _groups_to_inner(self) -> None:
        for group, mirror in zip(self.param_groups, self.inner.param_groups, strict=True):
            # Tensor options (lr) on a device would make every host step wait for it.
            options = {
                key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in _options(group).items()
            }
            _replace_options(mirror, options)

    def _groups_from_inner(self) -> None:
        for group, mirror in zip(self.param_groups, self.inner.param_groups, strict=True):
            _replace_options(group, _options(mirror))

    def _publish_state(self) -> None:
        """Make `self.state` what the inner optimizer has, under the model's parameters; the dicts are shared."""
        self.state.clear()
        for group, mirror in zip(self.param_groups, self.inner.param_groups, strict=True):
            for param, twin in zip(group["params"], mirror["params"], strict=True):
                if self.inner.state.get(twin):
                    self.state[param] = self.inner.state[twin]


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _replace_options(group: dict[str, Any], options: dict[str, Any]) -> None:
    params = group["params"]
    group.clear()
    group.update({"params": params, **options})


def _restore(groups: Sequence[dict[str, Any]], options: Sequence[dict[str, Any]]) -> None:
    for group, saved in zip(groups, options, strict=True):
        _replace_options(group, saved)
