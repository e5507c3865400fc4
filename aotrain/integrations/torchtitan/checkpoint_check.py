"""Look at a DCP checkpoint before it is loaded, and say in one message what is wrong with it.

DCP finds a missing file or a tensor of another shape in the middle of loading, on every rank, with a message about its
own planner. Here the checkpoint's table of contents is compared with the files on disk and with the state that the
run wants to fill.

The table of contents (``.metadata``) is a pickle. It is read with an unpickler that knows only DCP's own record types,
so a file of unknown origin cannot run code here, and one that tries is refused before DCP sees it.
"""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from aotrain.integrations.config_file import JobError

_ALLOWED_GLOBALS = {
    "collections": {"OrderedDict"},
    "builtins": {"set"},
    "pathlib": {"PosixPath", "WindowsPath", "Path", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "Path"},
    "torch": {
        "Size",
        *(str(value).removeprefix("torch.") for value in vars(torch).values() if type(value) is torch.dtype),
    },
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}

# What to do about a damaged checkpoint.
REMEDY = "Remove this step's folder to continue from the one before it"

# How many differing keys a message names.
_NAMED = 4


class CheckpointError(JobError):
    """A checkpoint that this run cannot load; the message says why and what to do."""


def read_metadata(folder: Path) -> Metadata:
    """The table of contents of a DCP checkpoint.

    Raises:
        CheckpointError: it is missing, cut off, or holds anything but DCP's records.
    """
    path = folder / ".metadata"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: cannot read {path.name}: {error.strerror}. {REMEDY}") from error
    try:
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {folder}: {path.name} ({len(data)} bytes) is damaged or no DCP metadata: {error}. {REMEDY}"
        ) from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"checkpoint {folder}: {path.name} holds a {type(metadata).__name__}, not DCP metadata")
    return metadata


def check_files(folder: Path, metadata: Metadata) -> None:
    """Every file that the metadata names exists and is long enough.

    Raises:
        CheckpointError: naming each missing or short file with expected and found bytes.
    """
    expected: dict[str, int] = defaultdict(int)
    for info in metadata.storage_data.values():
        expected[info.relative_path] = max(expected[info.relative_path], info.offset + info.length)
    wrong = []
    for name, size in sorted(expected.items()):
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found is None:
            wrong.append(f"{name} is missing ({size} bytes expected)")
        elif found < size:
            wrong.append(f"{name} has {found} bytes, expected {size}")
    if wrong:
        raise CheckpointError(f"checkpoint {folder} is incomplete: {_some(wrong)}. {REMEDY}")


def check_fits(folder: Path, metadata: Metadata, wanted: Mapping[str, Any]) -> None:
    """The checkpoint holds every entry that the run wants to fill, with the same global shape and dtype.

    Args:
        folder: for the message.
        metadata: of the checkpoint.
        wanted: DCP key -> value; tensors and DTensors are compared, other values only need to exist.

    Raises:
        CheckpointError: naming the first few entries that differ and what that usually means.
    """
    saved = metadata.state_dict_metadata
    missing = {key: key for key in wanted if key not in saved}
    differing = {}
    for key, value in wanted.items():
        entry = saved.get(key)
        if not isinstance(value, torch.Tensor) or not isinstance(entry, TensorStorageMetadata):
            continue
        if tuple(entry.size) != tuple(value.shape) or entry.properties.dtype != value.dtype:
            differing[key] = (
                f"{key} is {list(entry.size)} {_dtype(entry.properties.dtype)} in the checkpoint, "
                f"{list(value.shape)} {_dtype(value.dtype)} in this run"
            )
    if not missing and not differing:
        return
    # Optimizer state follows the weights, so where weights differ they are the reason, and enough to name.
    weights = [key for key in (*missing, *differing) if not key.startswith("optimizer.")]
    if weights:
        missing, differing = ({k: v for k, v in group.items() if k in weights} for group in (missing, differing))
    parts = [f"{len(differing)} entries differ: {_some(differing.values())}"] if differing else []
    parts += [f"{len(missing)} entries are not in it: {_some(missing.values())}"] if missing else []
    what, remedy = _OTHER_MODEL if weights else _OTHER_OPTIMIZER
    raise CheckpointError(f"checkpoint {folder} was {what}: {'; '.join(parts)}. {remedy}")


_OTHER_MODEL = ("of another model", "Use the model of the checkpoint, or another output_dir")
_OTHER_OPTIMIZER = (
    "written with another optimizer",
    "Use the optimizer of the checkpoint, or only its weights: checkpoint.init_from in a new output_dir",
)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED_GLOBALS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of DCP metadata")


def _some(texts: Iterable[str]) -> str:
    texts = list(texts)
    rest = len(texts) - _NAMED
    return "; ".join(texts[:_NAMED]) + (f"; and {rest} more" if rest > 0 else "")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
