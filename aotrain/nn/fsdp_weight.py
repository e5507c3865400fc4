"""FsdpWeight: a weight that FSDP2 gathers as float8 (or int8) codes instead of high-precision values.

FSDP2 asks the local tensor of a sharded parameter for what to gather, if it has `fsdp_pre_all_gather`; that takes a
tensor subclass. This one is a plain tensor in all else: it has memory of its own, optimizers update it in place,
results of operations are plain tensors, and what is pickled is a plain tensor.

What a layer gets is bit for bit what gathering in the dtype of mixed precision and casting afterwards would give: the
scales are those of the whole weight in that dtype. They follow from tables of largest magnitudes that all ranks hold
(`aotrain.nn.shard_amax`), one small all-reduce for all weights together after each optimizer step, done by a hook on
optimizers. A weight that was changed by other means is noticed by its version and reduced on its own when it is needed.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from aotrain.formats import ScaledTensor, Scaling
from aotrain.formats.scaling import scales_from_amax
from aotrain.kernels import scaled_cast
from aotrain.nn.gathered_plane import GatheredPlane
from aotrain.nn.gathered_weight import GatheredWeight, Planes
from aotrain.nn.shard_amax import Part, Splits, all_reduce_amax, all_reduce_over_splits, part_amax, scaling_of_part

aten = torch.ops.aten
# Results that FSDP2 and nn.Module put back into a parameter. `view` is not one: FSDP2 keeps a flat view of each
# parameter, which it handles best as a plain tensor.
_KEPT = {
    aten.detach.default,
    aten.clone.default,
    aten.slice.Tensor,
    aten.new_zeros.default,
    aten.empty_like.default,
    aten._to_copy.default,
    aten._pin_memory.default,
}
# `param.data` is a view too, through which many loops update parameters.
_VIEWS = {aten.detach.default, aten.slice.Tensor}


@dataclass(frozen=True, slots=True)
class _Shard:
    """Where a rank's shard lies, the ranks that hold the others, and the device they exchange on."""

    device: torch.device
    part: Part
    padded: tuple[int, int]
    group: dist.ProcessGroup


# From fsdp_pre_all_gather to fsdp_post_all_gather.
_Metadata = tuple[Scaling, torch.Tensor, _Shard]


class FsdpWeight(torch.Tensor):
    """A high-precision weight, or a rank's shard of it.

    Changes are seen by the next gather, with two exceptions: in-place operations on the DTensors of a state_dict, and
    on `.data` of the local tensor. Call `precompute_float8_dynamic_scale_for_fsdp` after those, or copy the state_dict
    back with `load_state_dict`.

    Args:
        tensor: the values; shared, not copied.
        planes: what is gathered.
        requires_grad: as for any tensor.
        splits: of the weight, where the tensor is a part of it on top of FSDP2's sharding.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override]
    planes: Planes
    # Where the weight is itself a part of a tensor-parallel layer's, whose scales it has.
    splits: Splits
    _tensor: torch.Tensor
    # Of the last gather; None before the first.
    _shard: _Shard | None
    # One table per distinct plane, of the values at `_amax_version`.
    _amax: list[torch.Tensor]
    _amax_version: tuple[int, int] | None
    # In-place operations so far, which inside a DTensor do not count as versions; shared with views.
    _writes: list[int]

    @staticmethod
    def __new__(
        cls, tensor: torch.Tensor, planes: Planes, requires_grad: bool = False, splits: Splits = ()
    ) -> "FsdpWeight":
        _refresh_after_optimizer_steps()
        # A view: memory and version counter are the tensor's.
        self = torch.Tensor._make_subclass(cls, tensor, requires_grad)
        self._tensor, self.planes, self.splits = tensor.detach(), planes, splits
        self._shard, self._amax, self._amax_version, self._writes = None, [], None, [0]
        return self

    @property
    def plain(self) -> torch.Tensor:
        """The same values as an ordinary tensor."""
        return self._tensor

    @property
    def _values_version(self) -> tuple[int, int]:
        # Moves alike on all ranks, which therefore agree on when to reduce: no addresses or identities in it.
        return self._version, self._writes[0]

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore[bad-override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        plain_args, plain_kwargs = tree_map_only(cls, lambda weight: weight._tensor, (args, kwargs or {}))
        result = func(*plain_args, **plain_kwargs)
        if func in _KEPT:
            kept = FsdpWeight(result, args[0].planes, False, args[0].splits)
            if func in _VIEWS:
                kept._writes = args[0]._writes
            return kept
        if func._schema.is_mutable:
            for leaf in tree_leaves((args, kwargs or {})):
                if isinstance(leaf, cls):
                    leaf._writes[0] += 1
        written = bool(args) and isinstance(args[0], cls) and result is plain_args[0]
        return args[0] if written else result

    def __deepcopy__(self, memo: dict[int, Any]) -> "FsdpWeight":
        if id(self) not in memo:
            copied = FsdpWeight(self._tensor.clone(), self.planes, self.requires_grad, self.splits)
            copied._is_param = getattr(self, "_is_param", False)  # pyrefly: ignore[missing-attribute]
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, proto: Any) -> Any:
        plain = self._tensor.detach().requires_grad_(self.requires_grad)
        is_param = getattr(self, "_is_param", False)
        return (torch.nn.Parameter(plain, self.requires_grad) if is_param else plain).__reduce_ex__(proto)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"FsdpWeight({self._tensor!r})"

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[torch.Tensor, ...], "_Metadata"]:
        """Called by FSDP2: this rank's codes, padded to the size of the largest shard, and what they mean."""
        self._shard = _shard_of(self._tensor, (outer_size[0], outer_size[1]), mesh)
        # Inside backward, the layer's own forward is over. Where it is repeated there (activation checkpointing), the
        # plane for it is gathered as it is needed.
        in_backward = torch._C._current_graph_task_id() != -1
        scaling = self.planes.grad_input if in_backward else self.planes.output
        codes, scale = self._quantize(scaling, mp_policy.param_dtype or self.dtype)
        return (codes,), (scaling, scale, self._shard)

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[torch.Tensor, ...],
        metadata: "_Metadata",
        param_dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """Called by FSDP2: the whole weight, or with `out` the new content of the one it has."""
        # With CPU offload, what was asked for its codes is a copy of this weight on the device.
        (codes,), (scaling, scale, self._shard) = all_gather_outputs, metadata
        if scale.is_cuda:  # made on FSDP2's stream, used on this one
            scale.record_stream(torch.cuda.current_stream(scale.device))
        gathered = GatheredPlane(self._whole(codes, scaling, scale), functools.partial(self._gather, dtype=param_dtype))
        if out is None:
            # FSDP2 frees the codes with its own buffer, of which they are a view.
            return GatheredWeight(gathered, param_dtype), ()
        weight: Any = getattr(out, "_local_tensor", out)
        # Views that autograd saved in forward share this object.
        weight.gathered.q, weight.gathered.gather = gathered.q, gathered.gather
        return None

    @torch.no_grad()
    def _gather(self, scaling: Scaling, *, dtype: torch.dtype) -> ScaledTensor:
        """A plane of the whole weight, gathered now."""
        assert self._shard is not None
        source = self
        if self.device != self._shard.device:
            source = FsdpWeight(self._tensor.to(self._shard.device), self.planes, False, self.splits)
            source._shard = self._shard
        codes, scale = source._quantize(scaling, dtype)
        shards = [torch.empty_like(codes) for _ in range(dist.get_world_size(self._shard.group))]
        dist.all_gather(shards, codes, group=self._shard.group)
        columns = self._shard.padded[1] != self._shard.part.whole[1]
        return self._whole(torch.cat(shards, dim=1 if columns else 0), scaling, scale)

    def _quantize(self, scaling: Scaling, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's codes of a plane as padded bytes, and the scales of the whole plane."""
        assert self._shard is not None
        part, padded = self._shard.part, self._shard.padded
        if self._amax_version != self._values_version:
            refresh_amax([self])
        # The table is of the master weight. Rounding is monotonic: this is the table of the rounded weight.
        amax = self._amax[self.planes.distinct.index(scaling)].to(dtype).float()
        local, local_amax = scaling_of_part(scaling, amax, part)
        codes = scaled_cast(self._tensor.to(dtype), local, amax=local_amax).data.view(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, padded[1] - part.shape[1], 0, padded[0] - part.shape[0]))
        return codes, scales_from_amax(amax, scaling)[0]

    def _whole(self, codes: torch.Tensor, scaling: Scaling, scale: torch.Tensor) -> ScaledTensor:
        assert self._shard is not None
        rows, columns = self._shard.part.whole
        data = codes.view(-1)[: rows * columns].view(rows, columns)  # padding is at the end
        return ScaledTensor(data.view(scaling.element.dtype), scale, scaling)


@torch.no_grad()
def refresh_amax(weights: Iterable[FsdpWeight]) -> None:
    """Compute the tables of weights that have been gathered before, with one all-reduce for each group of ranks.

    With tensor parallelism there is one more for each way to split.

    A collective: every rank must call it for the same weights in the same order.
    """
    of_group: dict[dist.ProcessGroup, list[tuple[FsdpWeight, Part]]] = {}
    of_splits: dict[Splits, list[FsdpWeight]] = {}
    for weight in weights:
        # The table of an offloaded weight is made of the copy that FSDP2 asks for its codes, at each gather.
        if weight._shard is not None and weight._shard.device == weight.device:
            of_group.setdefault(weight._shard.group, []).append((weight, weight._shard.part))
            of_splits.setdefault(weight.splits, []).append(weight)
    for group, members in of_group.items():
        tables = [
            part_amax(weight._tensor, scaling.block, part)
            for weight, part in members
            for scaling in weight.planes.distinct
        ]
        _set_tables([weight for weight, _ in members], all_reduce_amax(tables, group))
    for splits, split in of_splits.items():
        if splits:
            blocks = [scaling.block for weight in split for scaling in weight.planes.distinct]
            tables = [table for weight in split for table in weight._amax]
            _set_tables(split, all_reduce_over_splits(tables, blocks, splits))


def _set_tables(weights: Iterable[FsdpWeight], tables: Iterable[torch.Tensor]) -> None:
    following = iter(tables)
    for weight in weights:
        weight._amax = [next(following) for _ in weight.planes.distinct]
        weight._amax_version = weight._values_version


def fsdp_weight_of(param: torch.Tensor) -> FsdpWeight | None:
    """The FsdpWeight that a parameter is, or of which it is the sharded DTensor."""
    local = getattr(param, "_local_tensor", param)
    return local if isinstance(local, FsdpWeight) else None


def _shard_of(tensor: torch.Tensor, whole: tuple[int, int], mesh: Any) -> _Shard:
    local = tensor.shape
    ranks, rank = mesh.size(), mesh.get_local_rank()
    dim = 1 if local[1] != whole[1] else 0
    size = -(-whole[dim] // ranks)
    start, padded = [0, 0], list(whole)
    start[dim], padded[dim] = min(rank * size, whole[dim]), size
    part = Part(whole=whole, start=(start[0], start[1]), shape=(local[0], local[1]))
    return _Shard(tensor.device, part, (padded[0], padded[1]), mesh.get_group())


@functools.lru_cache(maxsize=1)
def _refresh_after_optimizer_steps() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    params = (param for group in optimizer.param_groups for param in group["params"])
    # Not only those whose version changed: fused optimizers do not count their writes.
    refresh_amax([weight for param in params if (weight := fsdp_weight_of(param)) is not None])
