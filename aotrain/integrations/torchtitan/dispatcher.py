"""torchtitan's all-to-all token dispatcher with low-precision payload and padded groups, without torchao.

What is replaced in ``AllToAllTokenDispatcher`` (expert_parallel_comm_backend "standard"), and what stays:

| step                                   | here                                                            |
|----------------------------------------|-----------------------------------------------------------------|
| sort tokens by expert, exchange counts | torchtitan's                                                    |
| all-to-all of tokens and of outputs    | ``ops.all_to_all_dispatch`` and ``_combine``: codes and scales  |
| sort by local expert, pad, and undo it | ``ops.permute``: one kernel each way, no gradient of padding    |
| weight and sum the outputs of a token  | torchtitan's                                                    |

A collective without a payload in either direction is torchtitan's own, which does not wait for its result before the
result is used. Plug it in with ``overrides.token_dispatcher``, by the job key ``precision.expert_dispatch``, or by
``quantize_dispatch`` of a config tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torchtitan.config.override import derive
from torchtitan.models.common.token_dispatcher import (
    AllToAllDispatchMetadata,
    AllToAllTokenDispatcher,
    LocalDispatchMetadata,
    LocalTokenDispatcher,
)
from torchtitan.protocols.module import Module

from aotrain.ops import PAYLOADS, all_to_all_combine, all_to_all_dispatch
from aotrain.ops.permute import apply_permutation, token_permutation, unpermute_indexed


class QuantizedTokenDispatcher(AllToAllTokenDispatcher):
    """``AllToAllTokenDispatcher`` whose tokens and gradients travel in ``payload``; groups padded for grouped GEMMs.

    With expert_parallel_degree 1 nothing travels; groups are padded all the same.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(AllToAllTokenDispatcher.Config):
        payload: str = "mxfp8"
        """A name in ``aotrain.ops.PAYLOADS``: "mxfp8", "float8_rowwise" or "high_precision"."""

        pad_multiple: int = 1
        """Rows that every expert's group is padded to a multiple of; 1 pads nothing."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        check_payload(config.payload)
        self.payload = PAYLOADS[config.payload]
        self.pad_multiple = config.pad_multiple

    def dispatch(
        self,
        x_TD: torch.Tensor,
        topk_scores_TK: torch.Tensor,
        topk_expert_ids_TK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, AllToAllDispatchMetadata | LocalDispatchMetadata]:
        """torchtitan's; without an expert-parallel mesh the local one, with padding."""
        routed = (x_TD, topk_scores_TK, topk_expert_ids_TK)
        if self.ep_mesh is not None or self.pad_multiple == 1:
            return super().dispatch(*routed, num_local_tokens_per_expert_E)
        rows, tokens, scores = self._local_reorder(*routed)
        shape, rows, indices, sizes = self._permute(rows, num_local_tokens_per_expert_E)
        metadata = AllToAllDispatchMetadata(
            token_indices_experts_sorted_N=tokens,
            topk_scores_experts_sorted_N=scores,
            input_shape=shape,
            permuted_indices=indices,
            input_splits=[],
            output_splits=[],
        )
        return rows, sizes, metadata

    def combine(
        self,
        routed_output_RD: torch.Tensor,
        metadata: AllToAllDispatchMetadata | LocalDispatchMetadata,
        x_TD: torch.Tensor,
    ) -> torch.Tensor:
        """torchtitan's, after taking local padding out."""
        if self.ep_mesh is None and isinstance(metadata, AllToAllDispatchMetadata):
            rows = self._unpermute(routed_output_RD, metadata.input_shape, metadata.permuted_indices)
            return LocalTokenDispatcher.combine(self, rows, metadata, x_TD)
        return super().combine(routed_output_RD, cast(AllToAllDispatchMetadata, metadata), x_TD)

    def _dispatch_token_exchange(
        self, routed_input_ND: torch.Tensor, pg: dist.ProcessGroup, output_splits: list[int], input_splits: list[int]
    ) -> torch.Tensor:
        formats = {"forward": self.payload.dispatch, "backward": self.payload.dispatch_grad}
        if not any(formats.values()):
            return super()._dispatch_token_exchange(routed_input_ND, pg, output_splits, input_splits)
        return all_to_all_dispatch(routed_input_ND, output_splits, input_splits, pg, **formats)

    def _combine_token_exchange(
        self, routed_output_RD: torch.Tensor, pg: dist.ProcessGroup, input_splits: list[int], output_splits: list[int]
    ) -> torch.Tensor:
        formats = {"forward": self.payload.combine, "backward": self.payload.combine_grad}
        if not any(formats.values()):
            return super()._combine_token_exchange(routed_output_RD, pg, input_splits, output_splits)
        return all_to_all_combine(routed_output_RD, input_splits, output_splits, pg, **formats)

    def _permute(
        self, routed_input_RD: torch.Tensor, num_global_tokens_per_local_expert_E: torch.Tensor
    ) -> tuple[torch.Size, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(shape before, rows by local expert, their indices, rows of each group), with static bounds of sizes."""
        counts = num_global_tokens_per_local_expert_E
        num_ranks = 1 if self.ep_mesh is None else self.ep_mesh.size()
        permutation = token_permutation(
            routed_input_RD.shape[0], counts, counts.shape[0] // num_ranks, num_ranks, self.pad_multiple
        )
        rows = apply_permutation(routed_input_RD, permutation)
        return routed_input_RD.shape, rows, permutation.indices, permutation.sizes

    def _unpermute(
        self, routed_output_RD: torch.Tensor, input_shape: tuple[int, ...], permuted_indices: torch.Tensor
    ) -> torch.Tensor:
        return unpermute_indexed(routed_output_RD, permuted_indices, input_shape[0])


def check_payload(name: str) -> None:
    """Raise ValueError listing the payloads for a name that is none."""
    if name not in PAYLOADS:
        raise ValueError(f"payload got {name!r}; want one of {', '.join(map(repr, PAYLOADS))}.")


def dispatcher_config(
    config: AllToAllTokenDispatcher.Config, *, payload: str = "mxfp8", pad_multiple: int = 1
) -> QuantizedTokenDispatcher.Config:
    """The config of the same dispatcher with payload and padding.

    Raises:
        ValueError: an unknown payload, or a pad_multiple below 1.
    """
    check_payload(payload)
    if pad_multiple < 1:
        raise ValueError(f"pad_multiple got {pad_multiple}; want 1 for no padding, or what the grouped product needs.")
    return derive(config, QuantizedTokenDispatcher.Config, payload=payload, pad_multiple=pad_multiple)


def quantize_dispatch(model_config: Module.Config, payload: str) -> int:
    """Replace, in place, every all-to-all dispatcher of a model's config tree. Returns how many.

    Raises:
        ValueError: an unknown payload, or a model without such a dispatcher.
    """
    nodes = list(model_config.traverse(AllToAllTokenDispatcher.Config))
    if not nodes:
        raise ValueError("the model has no experts with the standard all-to-all dispatcher; set it to null")
    for _, dispatcher, parent, attr in nodes:
        assert isinstance(dispatcher, AllToAllTokenDispatcher.Config)
        assert isinstance(attr, str)
        setattr(parent, attr, dispatcher_config(dispatcher, payload=payload))
    return len(nodes)
