"""A tensor in a safetensors file, read by rows.

The library maps a file into memory, and every page that was looked at counts as memory of the process until the mapping
goes: all of an embedding of half a gigabyte, where a few rows of it would do. So the library checks a file's header
here, and rows are read as a file is read.

Source: the format's description in the safetensors repository.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aotrain.export.parts import dense_parts
from aotrain.export.safetensors_writer import DTYPE_NAMES

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file; slices of its rows, its first dimension, are tensors of their own.

    Attributes:
        path: of the file.
        offset: of the first byte, from the beginning of the file.
        shape: of the tensor.
        dtype: of the tensor.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Read consecutive rows.

        Raises:
            ValueError: the file is shorter than it was.
        """
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1, f"consecutive rows only, got {rows}"
        return self._read(start, (max(stop - start, 0), *self.shape[1:]))

    def parts(self) -> Iterator[torch.Tensor]:
        """All of it, by parts of a few rows."""
        if not self.shape:
            yield self._read(0, ())
            return
        for part in dense_parts(self.shape):
            yield self[part]

    def _read(self, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        data = torch.empty(math.prod(shape) * self.dtype.itemsize, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(self.offset + start * math.prod(self.shape[1:]) * self.dtype.itemsize)
            if file.readinto(data.numpy().data) != data.numel():
                raise ValueError(f"{self.path} has become shorter while it was read.")
        return data.view(self.dtype).view(shape)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, from its header.

    Raises:
        ValueError: the file is damaged, or has a dtype that is unknown here.
        ImportError: safetensors is not installed.
    """
    with _checked(path), path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, dict[str, Any]] = json.loads(file.read(size))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}; want a dense checkpoint.")
        tensors[name] = StoredTensor(path, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), dtype)
    return tensors


@contextmanager
def _checked(path: Path) -> Iterator[None]:
    """A file that the library accepts: its header is whole and fits the file's length."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("aotrain.export needs safetensors: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}): copy or download it again.") from error
    yield
