"""What an export did, as numbers and as text."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One quantized layer, or embedding.

    Attributes:
        name: of the module.
        shape: (out_features, in_features).
        bytes_before: of its weight in the source.
        bytes_after: of all tensors that replace it.
        sqnr_db: signal to quantization noise of what was read back, against the source; NaN if it was not read back.
        embedding: whether it is one.
    """

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    sqnr_db: float = math.nan
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class ExportReport:
    """Result of `export`; `str()` gives a table.

    Attributes:
        destination: the folder that was written.
        scheme: name of the scheme.
        format: name of the format.
        dtype: of the model when it is served.
        layers: what was quantized.
        skipped: (name, reason) of matrices that stayed dense.
        bytes_before: of all tensors of the source.
        bytes_after: of all tensors that were written.
        verified: whether every tensor was read back and equals what the scheme says, bit for bit.
        notes: what a user should know.
    """

    destination: Path
    scheme: str
    format: str
    dtype: torch.dtype
    layers: tuple[LayerReport, ...]
    skipped: tuple[tuple[str, str], ...]
    bytes_before: int
    bytes_after: int
    verified: bool
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        ratio = self.bytes_after / max(self.bytes_before, 1)
        state = "read back, bit for bit as the scheme says" if self.verified else "not read back"
        tables = sum(layer.embedding for layer in self.layers)
        count = layers_text(len(self.layers) - tables, tables)
        lines = [
            f"{self.destination}: {self.scheme} as {self.format}, {str(self.dtype).removeprefix('torch.')}",
            f"{count}, {_size(self.bytes_before)} -> {_size(self.bytes_after)} ({100 * ratio:.0f} %), {state}",
            *self._layer_lines(),
        ]
        if self.skipped:
            lines += ["dense:", *self._skipped_lines()]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def _layer_lines(self) -> list[str]:
        """One line for layers of one kind: the same last component and shape."""
        kinds: dict[tuple[str, tuple[int, int]], list[LayerReport]] = {}
        for layer in self.layers:
            kinds.setdefault((layer.name.rsplit(".", 1)[-1], layer.shape), []).append(layer)
        lines = [f"  {'layer':<16} {'count':>5} {'shape':>14} {'before':>10} {'after':>10} {'SQNR, lowest':>13}"]
        for (leaf, shape), members in kinds.items():
            before, after = sum(each.bytes_before for each in members), sum(each.bytes_after for each in members)
            sqnr = min(each.sqnr_db for each in members)
            shown = "-" if math.isnan(sqnr) else f"{sqnr:.1f} dB"
            size = f"{shape[0]} x {shape[1]}"
            sizes = f"{_size(before):>10} {_size(after):>10}"
            lines.append(f"  {leaf:<16} {len(members):>5} {size:>14} {sizes} {shown:>13}")
        return lines

    def _skipped_lines(self) -> list[str]:
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped:
            reasons.setdefault(reason, []).append(name)
        return [
            f"  {reason}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for reason, names in reasons.items()
        ]


def layers_text(linear: int, embeddings: int) -> str:
    """So many linear layers and embeddings."""
    return f"{linear} linear layers" + (f" and {embeddings} embeddings" if embeddings else "")


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
