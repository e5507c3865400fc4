"""Keeping the quantized copies of a weight while it does not change.

With gradient accumulation, pipeline microbatches or evaluation a weight is used many times between two optimizer steps;
it has to be quantized once. Copies are only kept once a layer has been seen to need them: a layer used once per step
quantizes anew and holds no memory.
"""

import functools
import sys
import weakref
from typing import Any, Self

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from aotrain.formats import ScaledTensor, Scaling
from aotrain.ops import cast_weight, transpose_quantized

_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


@functools.lru_cache(maxsize=1)
def _count_steps() -> None:
    # Fused optimizers, torch's among them, write parameters without changing their version.
    register_optimizer_step_post_hook(_count_step)


class WeightCastCache:
    """Gives a quantized weight, from memory if the weight is what it was.

    A change is seen by the parameter's identity, address and version counter, and by any optimizer's step. Writing
    through `weight.data` outside of an optimizer is seen by none of them: call `clear` then.

    Copying or pickling a module that holds one gives an empty cache.
    """

    def __init__(self) -> None:
        _count_steps()
        self._weight: weakref.ref[torch.Tensor] | None = None
        self._state: tuple[int, ...] = ()
        self._casts: dict[tuple[Scaling, bool], ScaledTensor] = {}
        self._used = False
        self._keeps = False

    def __call__(
        self, weight: torch.Tensor, scaling: Scaling, *, transposed: bool, after: torch.Tensor | None = None
    ) -> ScaledTensor:
        """The weight [N, K], or its transposition [K, N], quantized. `after` is for compiled graphs, which use none."""
        if _fully_shard_in_use() or weight.is_inference():
            # An unsharded parameter changes with neither a new version nor a new address, and a tensor of inference
            # mode has no version.
            return cast_weight(weight, scaling, transposed=transposed)
        state = (weight.data_ptr(), weight._version, _optimizer_steps)
        if self._weight is None or self._weight() is not weight or state != self._state:
            self.clear()
            self._weight, self._state = weakref.ref(weight), state
        # Activation checkpointing repeats a forward inside backward, to save memory: that is no second use.
        if not transposed and torch._C._current_graph_task_id() == -1:
            self._keeps = self._keeps or self._used
            self._used = True
        key = scaling, transposed
        found = self._casts.get(key)
        if found is None:
            found = self._quantize(weight, scaling, transposed)
            if self._keeps:
                self._casts[key] = found
        return found

    def clear(self) -> None:
        """Forget the copies."""
        self._weight, self._used = None, False
        self._casts.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()

    def _quantize(self, weight: torch.Tensor, scaling: Scaling, transposed: bool) -> ScaledTensor:
        other = self._casts.get((scaling, not transposed))
        reused = None if other is None else transpose_quantized(other)
        return cast_weight(weight, scaling, transposed=transposed) if reused is None else reused


def _fully_shard_in_use() -> bool:
    """Whether this process holds modules sharded by FSDP2."""
    registry = sys.modules.get("torch.distributed._composable_state")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if registry is None or fsdp is None:
        return False
    return any(isinstance(module, fsdp.FSDPModule) for module in registry._module_state_mapping)
