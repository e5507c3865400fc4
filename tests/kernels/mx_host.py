"""The CUDA kernel of MX casts, compiled for a CPU: its functions, and a run of it that checks every access."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from aotrain.kernels import _mx_cuda
from tests.kernels.native import library_or_skip

CUDA_SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
BOTH = (_mx_cuda.BLOCKWISE_1X32, _mx_cuda.BLOCKWISE_32X1)

# Of struct Report in csrc/cuda/group_host.h.
_VIOLATIONS = ("races", "uninitialized", "outside", "misaligned", "rewritten", "unwritten")
# Enum Access of csrc/cuda/mx_tile.cuh.
ACCESSES = (
    "read x", "read group ends", "tile write", "tile read row", "tile read column", "row scale write",
    "column scale write", "scale read", "codes write", "codes read", "write row codes", "write column codes",
    "write scale",
)  # fmt: skip


@dataclass(frozen=True)
class Traffic:
    """All accesses of one kind: instructions of a warp, bytes, transactions, and the fewest transactions."""

    instructions: int
    bytes: int
    transactions: int
    least: int


class Host:
    """The host library; `cast` is the interface that `_mx_cuda` has to the device library."""

    def __init__(self) -> None:
        self.library = _mx_cuda.declare(ctypes.CDLL(str(library_or_skip(CUDA_SOURCES / "mx_cast_host.cpp"))))
        assert self.library.aotrain_mx_accesses() == len(ACCESSES)

    def scale_bytes(self, amax: torch.Tensor, element: str, rounding: str) -> torch.Tensor:
        out = torch.empty(amax.shape, dtype=torch.uint8)
        kind = (_mx_cuda.ELEMENTS[element], _mx_cuda.ROUNDINGS[rounding])
        self._call("scale_bytes", amax, *kind, out)
        return out

    def inverses(self, byte: torch.Tensor) -> torch.Tensor:
        out = torch.empty(byte.shape, dtype=torch.float32)
        self._call("inverses", byte, out)
        return out

    def codes(self, y: torch.Tensor, element: str) -> torch.Tensor:
        out = torch.empty(y.shape, dtype=torch.uint8)
        self._call("codes", y, _mx_cuda.ELEMENTS[element], out)
        return out

    def halves(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=torch.float32)
        self._call("halves", x, out)
        return out

    def _call(self, name: str, x: torch.Tensor, *rest: torch.Tensor | int) -> None:
        arguments = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in rest]
        function = getattr(self.library, f"aotrain_mx_{name}")
        function(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.numel()), *arguments)

    def traced(
        self,
        x: torch.Tensor,
        element: str,
        blocks: tuple,
        blocked: bool,
        reverse: bool = False,
        barriers: bool = True,
        group_ends: torch.Tensor | None = None,
    ) -> tuple[dict[str, int], dict[str, Traffic], list[torch.Tensor]]:
        """(violations, traffic per access, results) of a cast with rceil scales."""
        results = {
            block: _mx_cuda._outputs(x if block == _mx_cuda.BLOCKWISE_1X32 else x.mT, element, blocked)
            for block in blocks
        }
        table, _kept = _mx_cuda.arguments(x, element, "rceil", results, blocked, group_ends)
        report = (ctypes.c_int64 * (len(_VIOLATIONS) + 4 * len(ACCESSES)))()
        address = ctypes.c_void_p(table.buffer_info()[0])
        assert self.library.aotrain_mx_cast_traced(address, int(reverse), int(barriers), report) == 0
        counts = list(report)
        violations = dict(zip(_VIOLATIONS, counts, strict=False))
        numbers = counts[len(_VIOLATIONS) :]
        traffic = {name: Traffic(*numbers[4 * i : 4 * i + 4]) for i, name in enumerate(ACCESSES)}
        return violations, traffic, [tensor for pair in results.values() for tensor in pair]
