"""Expert parallelism: the experts of a mixture-of-experts layer spread over the ranks of a group.

    expert ids [T, top_k]
      -> rows of tokens sorted by expert                              `ops.token_order`
      -> counts exchanged; all-to-all of codes and scales             `ops.quantized_all_to_all`
      -> rows sorted by local expert, groups padded                   `ops.permute`
      -> experts(rows, offsets)                                       the caller's, e.g. grouped products
      -> unpermute, all-to-all back, weighted sum of a token's rows

Of E experts, rank r of R has those from r * E / R to (r + 1) * E / R - 1. Rows of an expert are ordered by source rank
and then by token, which is the order that one process with the tokens of all ranks behind each other would have: with
payloads in high precision, outputs and gradients are those of that process bit for bit, as far as the experts compute
rows independently of their surroundings.

One host synchronization per forward, two short lists of row counts: NCCL and gloo take the sizes of a variable
all-to-all as host integers. Backward and combine reuse them. Without a group there is none.

Experts see gradients summed over the tokens of all ranks of the group: their parameters are not to be averaged over it.
With FSDP2, shard them over the mesh dimensions besides the group, everything else over all ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from aotrain.kernels import RowPermutation
from aotrain.ops import (
    Payload,
    QuantizedRows,
    all_to_all_combine,
    all_to_all_dispatch,
    all_to_all_dispatch_quantized,
    permute_quantized,
    unpermute,
)
from aotrain.ops.permute import apply_permutation, token_permutation
from aotrain.ops.quantized_all_to_all import exchange_rows
from aotrain.ops.token_order import TokenOrder, combine_rows, expand_rows, sort_by_expert

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# rows [R, K] sorted by local expert, end offsets int32 [local experts] -> [R, N]
Experts = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Route:
    """Where the rows of one forward pass went; what combine needs to bring them back."""

    order: TokenOrder
    permutation: RowPermutation
    # Rows to and from each rank; empty without a group.
    sent: tuple[int, ...]
    received: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertParallel:
    """How tokens reach their experts and come back. Holds no parameters.

    Attributes:
        num_experts: experts of all ranks together; a multiple of the number of ranks.
        group: a process group or one-dimensional mesh; None for all experts in this process.
        alignment: rows of each expert are padded with zeros to a multiple of it, as grouped products want.
        payload: formats in which rows and gradients travel. Without a group nothing travels and nothing is rounded.
    """

    num_experts: int
    group: "dist.ProcessGroup | DeviceMesh | None" = None
    alignment: int = 1
    payload: Payload = field(default_factory=Payload)

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.num_experts % self.num_ranks or self.alignment < 1:
            raise ValueError(
                f"ExpertParallel got {self.num_experts} experts for {self.num_ranks} ranks and alignment "
                f"{self.alignment}; want a multiple of the number of ranks, and an alignment of at least 1."
            )

    @property
    def num_ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    def __call__(
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """The layer: each token through its experts, outputs weighted and summed.

        Args:
            x: [T, K], float32, bfloat16 or float16; T may differ between ranks, and be 0.
            expert_ids: int64 [T, top_k] in [0, num_experts).
            weights: [T, top_k]; differentiable.
            experts: (rows [R, K], offsets int32 [local experts]) -> [R, N]. Rows of local expert e end at offsets[e];
                rows from offsets[-1] on are zeros, and what is returned for them is not read.

        Returns:
            [T, N] in the dtype that `experts` returned.
        """
        rows, offsets, route = self.dispatch(x, expert_ids)
        return self.combine(experts(rows, offsets), weights, route)

    def dispatch(self, x: torch.Tensor, expert_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Route]:
        """Tokens to the rows of this rank's experts: (rows, offsets, route). Differentiable in x."""
        route = self._route(x, expert_ids)
        if self.group is None:
            rows = expand_rows(x, route.order)
        else:
            payloads = {"forward": self.payload.dispatch, "backward": self.payload.dispatch_grad}
            splits = (route.received, route.sent)
            rows = all_to_all_dispatch(x, *splits, self.group, **payloads, order=route.order)
        return apply_permutation(rows, route.permutation), route.permutation.offsets, route

    def dispatch_quantized(
        self, x: torch.Tensor, expert_ids: torch.Tensor
    ) -> tuple[QuantizedRows, torch.Tensor, Route]:
        """`dispatch` that hands out codes, for a grouped product that takes its left operand as they are.

        Raises:
            ValueError: no group, or a payload whose dispatch is in high precision.
        """
        if self.group is None or self.payload.dispatch is None:
            raise ValueError(
                "dispatch_quantized got no group or no dispatch format: nothing is quantized; use dispatch."
            )
        route = self._route(x, expert_ids)
        payloads = {"forward": self.payload.dispatch, "backward": self.payload.dispatch_grad}
        splits = (route.received, route.sent)
        rows = all_to_all_dispatch_quantized(x, *splits, self.group, **payloads, order=route.order)
        return permute_quantized(rows, route.permutation), route.permutation.offsets, route

    def combine(self, y: torch.Tensor, weights: torch.Tensor, route: Route) -> torch.Tensor:
        """Outputs of the experts [R, N] back to their tokens, weighted and summed: [T, N]. Differentiable in both."""
        rows = unpermute(y, route.permutation)
        if self.group is not None:
            payloads = {"forward": self.payload.combine, "backward": self.payload.combine_grad}
            rows = all_to_all_combine(rows, route.sent, route.received, self.group, **payloads)
        return combine_rows(rows, weights, route.order)

    @torch.no_grad()
    def _route(self, x: torch.Tensor, expert_ids: torch.Tensor) -> Route:
        """Sort, count, tell the other ranks, and learn on the host how many rows go where."""
        if x.dim() != 2 or expert_ids.dim() != 2 or x.shape[0] != expert_ids.shape[0]:
            raise ValueError(
                f"ExpertParallel got x of shape {tuple(x.shape)} and expert_ids of shape {tuple(expert_ids.shape)}; "
                "want [tokens, columns] and [tokens, top_k]."
            )
        flat = expert_ids.flatten()
        # Not bincount, which waits for the device to learn its size.
        counts = flat.new_zeros(self.num_experts, dtype=torch.int64).scatter_add_(0, flat, torch.ones_like(flat))
        sent = received = ()
        num_rows = flat.numel()
        if self.group is not None:
            once = [1] * self.num_ranks
            mine = counts.view(self.num_ranks, -1)
            theirs = exchange_rows(mine, once, once, self.group)
            sent, received = torch.stack([mine.sum(1), theirs.sum(1)]).tolist()  # the one host synchronization
            counts, num_rows = theirs.flatten(), sum(received)
        groups = (counts, self.num_local_experts, self.num_ranks, self.alignment)
        return Route(sort_by_expert(expert_ids), token_permutation(num_rows, *groups), tuple(sent), tuple(received))
