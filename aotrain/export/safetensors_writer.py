"""Write a safetensors file tensor by tensor, so that no more than one of them is in memory.

The library's own `save_file` takes all tensors of a file at once, and copies them. Here space for the header is set
aside first, tensors are appended as they come, and the header is written last, filled up with spaces, as the format
allows. Readers map tensors in place, which needs each to start at a multiple of its element size, and the format has
no gaps: a tensor whose size would put the next one out of step waits until the end, where they go by element size.

Source: the format's description in the safetensors repository.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

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
        self._late: dict[str, torch.Tensor] = {}
        self._offset = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor of any device and strides."""
        if tensor.nbytes % _ALIGNMENT:
            self._late[name] = tensor
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        assert name not in self._header, f"{name} twice"
        end = self._offset + tensor.nbytes
        self._header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, end],
        }
        if tensor.nbytes:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            self._file.write(flat.view(torch.uint8).numpy().data)
        self._offset = end

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
        for name, tensor in sorted(self._late.items(), key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        header = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(header) <= self._room, f"a header of {len(header)} bytes in {self._room}"
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        # A file without tensors ends with its header.
        self._file.truncate(8 + self._room + self._offset)
