"""Write a safetensors file by rows of its tensors, so that no more than some rows are in memory.

The library's own `save_file` takes all tensors of a file at once, and copies them. Here space for the header is set
aside first, then for each tensor as it is announced; rows of several tensors may come in turns, each at its own place.
The header is written last, filled up with spaces, as the format allows. Readers map tensors in place, which needs each
to start at a multiple of its element size, and the format has no gaps: a tensor whose size would put the next one out
of step is kept in memory until the end, where they go by element size.

Source: the format's description in the safetensors repository.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
# Room in the header for one tensor besides its name: dtype, shape, offsets.
_ENTRY = 192
# A format makes at most this many tensors of one, with names at most this much longer.
_TENSORS_PER_KEY, _SUFFIX = 4, 32


class _Late(NamedTuple):
    """A tensor that waits for the end."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: list[torch.Tensor]


class SafetensorsWriter:
    """An open file; use it in a `with` statement, which completes the file."""

    def __init__(self, path: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> None:
        """Open a new file.

        Args:
            path: of the file.
            keys: the tensors that those to be added are made of, which says how large the header may become.
            metadata: strings that go into the header.
        """
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)}
        room = len(json.dumps(self._header)) + sum(
            _TENSORS_PER_KEY * (len(json.dumps(key)) + _SUFFIX + _ENTRY) for key in keys
        )
        self._room = -(-room // _ALIGNMENT) * _ALIGNMENT
        self._file = path.open("xb")
        self._file.seek(8 + self._room)
        # Where the next rows of a tensor go, and what waits for the end.
        self._next: dict[str, int] = {}
        self._late: dict[str, _Late] = {}
        self._offset = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a whole tensor of any device and strides."""
        self.begin(name, tensor.dtype, tensor.shape)
        self.append(name, tensor)

    def begin(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Announce a tensor whose rows follow with `append`."""
        assert name not in self._header, f"{name} twice"
        assert name not in self._late, f"{name} twice"
        if math.prod(shape) * dtype.itemsize % _ALIGNMENT:
            self._late[name] = _Late(dtype, tuple(shape), [])
        else:
            self._place(name, dtype, shape)

    def append(self, name: str, rows: torch.Tensor) -> None:
        """The next rows of a tensor that has begun."""
        if name in self._late:
            self._late[name].rows.append(rows)
            return
        entry, start = self._header[name], self._next[name]
        end = start + rows.nbytes
        assert DTYPE_NAMES[rows.dtype] == entry["dtype"], f"{name} has rows of {rows.dtype}"
        assert end <= entry["data_offsets"][1], f"{name} has too many rows"
        if rows.nbytes:
            self._file.seek(8 + self._room + start)
            self._file.write(rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._next[name] = end

    def _place(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        end = self._offset + math.prod(shape) * dtype.itemsize
        offsets = [self._offset, end]
        self._header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        self._next[name], self._offset = self._offset, end

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def _finish(self) -> None:
        late, self._late = self._late, {}
        for name, each in sorted(late.items(), key=lambda item: -item[1].dtype.itemsize):
            self._place(name, each.dtype, each.shape)
            for rows in each.rows:
                self.append(name, rows)
        for name, end in self._next.items():
            assert end == self._header[name]["data_offsets"][1], f"{name} misses rows"
        header = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(header) <= self._room, f"a header of {len(header)} bytes in {self._room}"
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        # A file without tensors ends with its header.
        self._file.truncate(8 + self._room + self._offset)
