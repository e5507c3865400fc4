"""A dense Hugging Face checkpoint folder as a list of tensors that are read by rows.

Only safetensors files are read, one or several with their index; pickled weights are refused, as loading them runs what
they say. Headers of all shards are checked when the folder is opened, so that a truncated download is found before
anything is written.
"""

import json
from pathlib import Path
from typing import Any

from aotrain.export.stored_tensor import StoredTensor, stored_tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """A folder with `config.json` and weights.

    Attributes:
        folder: where it is.
        config: contents of `config.json`.
        entries: its tensors by key, in the order of shards.
        shards: file names, sorted.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder and read the headers of its files.

        Raises:
            ValueError: no such folder, no config.json, no safetensors weights, missing or damaged shards.
        """
        self.folder = folder
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; want a checkpoint folder with config.json and *.safetensors.")
        self.config = _read_json(folder / "config.json")
        self.shards, index = _find_shards(folder)
        self.entries: dict[str, StoredTensor] = {}
        for shard in self.shards:
            self.entries.update(stored_tensors(folder / shard))
        missing = sorted(set(index) - set(self.entries))
        if missing:
            raise ValueError(f"{folder}: the index names {', '.join(missing[:5])}, which no shard holds.")

    def keys_of(self, shard: str) -> list[str]:
        """Keys of the tensors of a shard."""
        return [key for key, entry in self.entries.items() if entry.path.name == shard]


def _find_shards(folder: Path) -> tuple[list[str], dict[str, str]]:
    """File names of the shards, and the index of a checkpoint that has one."""
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ValueError(f"{folder / INDEX} has no weight_map; want the index of the shards.")
        shards = sorted(set(index.values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ValueError(f"{folder} misses {len(missing)} of {len(shards)} shards: {', '.join(missing)}.")
        return shards, index
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE in found:  # others are the same weights in another layout, or adapters
        return [SINGLE], {}
    if found:
        raise ValueError(f"{folder} has {found[0]}, but neither {SINGLE} nor {INDEX}; want one of the two.")
    if any(path for pattern in PICKLED for path in folder.glob(pattern)):
        raise ValueError(
            f"{folder} has pickled weights only, which are not read: loading them runs what they say. Save the model "
            "as safetensors (save_pretrained does)."
        )
    raise ValueError(f"{folder} has no *.safetensors weights; want a dense Hugging Face checkpoint.")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; want a dense Hugging Face checkpoint folder.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object.")
    return value
