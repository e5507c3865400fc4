"""Sharing the quantized copies of an input between layers that follow each other: q, k and v, gate and up.

Without it each of them quantizes the same tensor again and, with `save_for_backward="quantized"`, keeps codes of its
own.
"""

import threading
import weakref
from typing import Literal

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from aotrain.formats import ScaledTensor, Scaling
from aotrain.ops import cast_operand

# (scaling, whether of the transposition, dtype that was quantized) -> copy
_Casts = dict[tuple[Scaling | None, bool, torch.dtype], ScaledTensor]


class _Last(threading.local):
    """Copies of the last input that a layer of this thread had."""

    def __init__(self) -> None:
        self.source: weakref.ref[torch.Tensor] | None = None
        self.version = -1
        self.casts: _Casts = {}

    def of(self, source: torch.Tensor) -> _Casts:
        """The copies of this tensor; none if it is another one, or has changed."""
        if self.source is None or self.source() is not source or self.version != source._version:
            self.source, self.version, self.casts = weakref.ref(source), source._version, {}
        return self.casts

    def clear(self) -> None:
        self.source, self.casts = None, {}


_last = _Last()


class SharedInputCasts:
    """`OperandCasts` of one call of a layer, which look first among the copies that the layer before made.

    Only the copies of the last input are held, and none during backward.

    Args:
        source: the layer's input as it was given; layers with the same tensor object share.
    """

    def __init__(self, source: torch.Tensor) -> None:
        # The call's autograd node holds this object: a reference would keep the input alive.
        self._source = weakref.ref(source)

    def __call__(
        self,
        x: torch.Tensor,
        scaling: Scaling | None,
        scaling_t: Scaling | None,
        *,
        operand: Literal["input", "grad_output"],
        after: torch.Tensor | None = None,
    ) -> tuple[ScaledTensor | None, ScaledTensor | None]:
        """x [M, K] quantized by `scaling` and its transposition by `scaling_t`, each where it has one.

        `after` is for compiled graphs, which share equal casts by themselves.
        """
        source = self._source()
        if operand != "input" or torch._C._current_graph_task_id() != -1:
            _last.clear()
            source = None
        # Selective checkpointing, a dispatch mode, wants the same operations again when it repeats a forward; whether a
        # copy is there depends on what came before. A tensor of inference mode has no version.
        if source is None or is_in_torch_dispatch_mode() or source.is_inference():
            return cast_operand(x, scaling, scaling_t, operand=operand)
        casts = _last.of(source)
        keys = (scaling, False, x.dtype), (scaling_t, True, x.dtype)
        missing = [None if key in casts else key[0] for key in keys]
        for key, q in zip(keys, cast_operand(x, *missing, operand=operand), strict=True):
            if q is not None:
                casts[key] = q
        return casts.get(keys[0]), casts.get(keys[1])
