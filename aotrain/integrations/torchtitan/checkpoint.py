"""torchtitan's checkpoint manager with a look before the leap.

Saving, resuming, asynchronous writing and clean-up are torchtitan's. Before a checkpoint is loaded it is checked
(``checkpoint_check``), and its non-tensor entries are read with ``weights_only=True``, which DCP does not do by itself.
"""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.checkpointer.base import DATALOADER, MODEL

from aotrain.integrations.torchtitan.batch import SavedData
from aotrain.integrations.torchtitan.checkpoint_check import (
    REMEDY,
    CheckpointError,
    check_files,
    check_fits,
    read_metadata,
)


class CheckedCheckpoints(CheckpointManager):
    """``CheckpointManager`` that refuses a checkpoint it cannot load with one clear message."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        pass

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Check, then load. Hugging Face checkpoints take torchtitan's own way."""
        if from_hf or "://" in checkpoint_id:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        folder = Path(checkpoint_id)
        metadata = read_metadata(folder)
        check_files(folder, metadata)
        check_fits(folder, metadata, _flat(state_dict))
        _load(folder, state_dict)
        self.states[MODEL].load_state_dict(state_dict)


def read_saved_data(folder: Path) -> SavedData:
    """What a checkpoint remembers of its run's batches; needs no process group.

    Raises:
        CheckpointError: the checkpoint is damaged, or its data position belongs to a fixed number of ranks.
    """
    metadata = read_metadata(folder)
    check_files(folder, metadata)
    fields = dataclasses.fields(SavedData)
    if any(f"{DATALOADER}.{field.name}" not in metadata.state_dict_metadata for field in fields):
        raise CheckpointError(
            f"checkpoint {folder} keeps its data position in an older form, one per rank, or not at all; got no "
            f"{DATALOADER}.{fields[0].name}. Start a new output_dir from its weights with checkpoint.init_from, or "
            "finish the run with the version of aotrain that wrote it"
        )
    state: dict[str, Any] = {DATALOADER: {field.name: 0 for field in fields}}
    with warnings.catch_warnings():
        # DCP warns that it loads in one process, which is what is asked for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        _load(folder, state, no_dist=True)
    wrong = {name: value for name, value in state[DATALOADER].items() if not isinstance(value, int) or value < 1}
    if wrong:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {DATALOADER} got {wrong}, want positive numbers. {REMEDY}"
        )
    return SavedData(**state[DATALOADER])


def _load(folder: Path, state: dict[str, Any], *, no_dist: bool = False) -> None:
    try:
        dcp.load(state, checkpoint_id=str(folder), planner=_SafeLoadPlanner(), no_dist=no_dist)
    except CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {failure[0]!r}" for rank, failure in sorted(error.failures.items()))
        raise CheckpointError(f"checkpoint {folder} cannot be loaded: {reasons}") from error


class _SafeLoadPlanner(DefaultLoadPlanner):
    """Reads non-tensor entries without running code from the file."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded = torch.load(value, weights_only=True)
        # The default planner loads again, so give it bytes that are known to be harmless.
        harmless = io.BytesIO()
        torch.save(loaded, harmless)
        harmless.seek(0)
        super().load_bytes(read_item, harmless)


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries under the keys that DCP gives them: Stateful objects and mappings are opened, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Stateful) and not isinstance(value, torch.Tensor):
            value = value.state_dict()
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
