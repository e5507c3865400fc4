"""export: a dense checkpoint folder in, a folder that servers read out, some rows of one tensor in memory at a time.

Every weight goes through `scheme.weight.encode` and a format's `pack`, nothing else; what servers see is then read back
from the files and compared with what training saw, `scheme.weight.values(weight)`, bit for bit. The folder is written
under another name beside its destination and renamed at the end.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from aotrain.export.base import ExportFormat, Layer, Plan
from aotrain.export.checkpoint import INDEX, PICKLED, SINGLE, Checkpoint
from aotrain.export.compressed_tensors import FLOAT, weight_layout
from aotrain.export.gguf_grid import GgufGrid, survives_conversion
from aotrain.export.parts import entries_for, row_parts, rows_of
from aotrain.export.planning import make_plan
from aotrain.export.report import ExportReport, LayerReport
from aotrain.export.safetensors_writer import SafetensorsWriter
from aotrain.export.snapped import looks_snapped
from aotrain.export.stored_tensor import StoredTensor, stored_tensors
from aotrain.export.table import check_format, get_format
from aotrain.formats import BLOCKWISE_1X32
from aotrain.quantization.fused_groups import fused_groups, shared_global_scale
from aotrain.quantization.schemes import AffineScheme, Encoded, Nvfp4Scheme, ScaledScheme, Scheme, get_scheme

# Neither weights nor state of a trainer.
_NOT_COPIED = (
    *("*.safetensors", "*.index.json", *PICKLED, "config.json", "trainer_state.json", "*.pkl", "*.gguf", "*.h5"),
    "*.msgpack",
)


def export(
    source: Path | str,
    destination: Path | str,
    *,
    scheme: str | Scheme,
    format: str = "compressed-tensors",
    exclude: Sequence[str] = ("lm_head",),
    embeddings: bool = False,
    dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    scales: Mapping[str, torch.Tensor] | None = None,
    verify: bool = True,
) -> ExportReport:
    """Quantize the linear layers of a checkpoint and write it for a server.

    Args:
        source: folder of a dense Hugging Face checkpoint: config.json and safetensors files, with the masters that
            were trained. Weights are encoded as they are there.
        destination: folder to write; must not exist.
        scheme: name or scheme, that of training.
        format: `compressed-tensors`, `torchao`, `gguf-grid` or `float8-block`; docs/export.md says which carries what.
        exclude: fnmatch patterns of module names that stay dense; norms and routers always do.
        embeddings: quantize the embedding of tokens too, as `prepare_qat(model, scheme, embeddings=True)` trains it;
            where the format's readers take it.
        dtype: of the model when it is served, and of scales of integer codes; None: `weight_dtype`, or that of the
            source's weights, float32 for gguf-grid. Train with `get_scheme(name, scale_dtype=dtype)` where it is not
            the weights' own.
        weight_dtype: in which training quantized, where layers got a copy of the masters in another dtype, as under
            FSDP2 with `param_dtype`: weights are converted to it before they are encoded. None: as they are.
        scales: scales by weight key to use in place of those of the weights, where training learned them.
        verify: read everything back and compare.

    Raises:
        ValueError: whatever readers would get wrong or cannot be done, before anything is written where the headers
            show it; the destination is never there in part.
        RuntimeError: what was read back differs from what was written.
        ImportError: safetensors is not installed.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    chosen, scheme = get_format(format), get_scheme(scheme)
    check_format(chosen, scheme)
    checkpoint = Checkpoint(source)
    plan, source_dtype, skipped = make_plan(
        checkpoint, scheme, chosen, exclude, dtype, weight_dtype, embeddings=embeddings
    )
    unknown = sorted(set(scales or {}) - set(plan.layers))
    if unknown:
        raise ValueError(f"export got scales for {', '.join(unknown[:5])}, which it does not quantize.")
    if destination.exists():
        raise ValueError(f"{destination} exists; want a new folder: remove it, or name another.")
    job = _Export(checkpoint, plan, chosen, source_dtype, weight_dtype, dict(scales or {}))
    job.share_global_scales()
    with _appears_whole(destination) as folder:
        job.write(folder)
        if verify:
            job.verify(folder)
        notes = (*job.notes(), *_copy_other_files(source, folder))
    return job.report(destination, scheme, skipped, notes, verified=verify)


@dataclass
class _Export:
    """One export under way."""

    checkpoint: Checkpoint
    plan: Plan
    chosen: ExportFormat
    source_dtype: torch.dtype
    # In which weights are encoded, if not as they are.
    weight_dtype: torch.dtype | None
    scales: dict[str, torch.Tensor]
    global_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: dict[str, LayerReport] = field(default_factory=dict)
    # Where each stored tensor is.
    written: dict[str, str] = field(default_factory=dict)
    bytes_after: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.plan.layers.values())).dtype

    def share_global_scales(self) -> None:
        """A first pass over the weights, for a scheme whose layers share a scale with those they are fused with."""
        if not isinstance(self.plan.scheme.weight, Nvfp4Scheme) or not self.plan.scheme.weight.two_level:
            return
        for group in fused_groups(self.plan.layers):
            parts = (self._weight(part) for key in group for part in self.checkpoint.entries[key].parts())
            largest = [torch.maximum(part.amax(), -part.amin()) for part in parts]
            self.global_scales |= dict.fromkeys(group, shared_global_scale(largest))

    def write(self, folder: Path) -> None:
        """All shards, their index, and config.json."""
        metadata = self.chosen.metadata(self.plan)
        for shard in self.checkpoint.shards:
            keys = self.checkpoint.keys_of(shard)
            name = SINGLE if len(self.checkpoint.shards) == 1 else shard
            with SafetensorsWriter(folder / name, keys, metadata) as file:
                for key in keys:
                    layer, source = self.plan.layers.get(key), self.checkpoint.entries[key]
                    sizes = self._write_dense(file, key, source) if layer is None else self._write(file, layer, source)
                    self.written |= dict.fromkeys(sizes, name)
                    self.bytes_after += sum(sizes.values())
        if len(self.checkpoint.shards) > 1:
            index = {"metadata": {"total_size": self.bytes_after}, "weight_map": dict(sorted(self.written.items()))}
            _write_json(folder / INDEX, index)
        config = json.loads(json.dumps(self.checkpoint.config))
        _set_dtype(config, self.dtype)
        self.chosen.update_config(config, self.plan)
        _write_json(folder / "config.json", config)

    def _write(self, file: SafetensorsWriter, layer: Layer, source: StoredTensor) -> dict[str, int]:
        """What replaces a weight; returns the bytes of each stored tensor."""
        snapped, sizes = looks_snapped(source), dict[str, int]()
        for part in row_parts(source.shape):
            weight = self._weight(source[part])
            encoded = self._encode(layer.key, weight, part, layer.shape[0])
            _refuse_unfit(layer.key, weight, self.plan.scheme.weight.decode(encoded, weight.dtype) if snapped else None)
            packed = self.chosen.pack(layer, self.plan.scheme, encoded)
            if part.start == 0:
                constants = self.chosen.constants(layer, self.plan.scheme, encoded.global_scale)
                for name, tensor in constants.items():
                    file.add(name, tensor)
                    sizes[name] = tensor.nbytes
                for name, rows in packed.items():
                    shape = (entries_for(rows.shape[0], part, layer.shape[0]), *rows.shape[1:])
                    file.begin(name, rows.dtype, shape)
                    sizes[name] = math.prod(shape) * rows.dtype.itemsize
            for name, rows in packed.items():
                file.append(name, rows)
        self.layers[layer.key] = LayerReport(
            layer.name, layer.shape, source.nbytes, sum(sizes.values()), embedding=layer.embedding
        )
        return sizes

    def _write_dense(self, file: SafetensorsWriter, key: str, source: StoredTensor) -> dict[str, int]:
        """A tensor that stays dense; returns its bytes."""
        dtype = self._dense_dtype(source)
        file.begin(key, dtype, source.shape)
        for part in source.parts():
            file.append(key, self._dense(key, part))
        return {key: math.prod(source.shape) * dtype.itemsize}

    def _weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Rows of a weight as training saw them."""
        return weight if self.weight_dtype is None else weight.to(self.weight_dtype)

    def _encode(self, key: str, weight: torch.Tensor, part: slice, rows: int) -> Encoded:
        """Codes of a part of so many rows."""
        scale = self.scales.get(key)
        scale = None if scale is None else rows_of(scale, rows, part)
        return self.plan.scheme.weight.encode(weight, scale=scale, global_scale=self.global_scales.get(key))

    def _dense_dtype(self, tensor: StoredTensor | torch.Tensor) -> torch.dtype:
        """Of a tensor that stays dense; those in a dtype of their own keep it."""
        return self.dtype if tensor.dtype == self.source_dtype else tensor.dtype

    def _dense(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        converted = tensor.to(self._dense_dtype(tensor))
        if converted.dtype == torch.float16 and bool((converted.isinf() & tensor.isfinite()).any()):
            raise ValueError(f"{key} has values beyond the range of float16; want dtype float32 or bfloat16.")
        return converted

    def verify(self, folder: Path) -> None:
        """Read all tensors back and compare them with the source's, decoded."""
        stored: dict[str, StoredTensor] = {}
        for name in sorted(set(self.written.values())):
            stored |= stored_tensors(folder / name)
        missing = sorted(set(self.written) - set(stored))
        if missing:
            raise RuntimeError(f"{missing[0]} was not written to {folder}.")
        for key, source in self.checkpoint.entries.items():
            layer = self.plan.layers.get(key)
            if layer is None:
                same = self._verify_dense(key, source, stored[key])
            else:
                same = self._verify_layer(layer, source, stored)
            if not same:
                raise RuntimeError(
                    f"{key} reads back from {folder} other than it was written: the disk is faulty, or aotrain is."
                )

    def _verify_dense(self, key: str, source: StoredTensor, stored: StoredTensor) -> bool:
        if (stored.shape, stored.dtype) != (source.shape, self._dense_dtype(source)):
            return False
        pairs = zip(source.parts(), stored.parts(), strict=True)
        return all(torch.equal(_bits(served), _bits(self._dense(key, part))) for part, served in pairs)

    def _verify_layer(self, layer: Layer, source: StoredTensor, stored: Mapping[str, StoredTensor]) -> bool:
        """Compare a layer that was read back, by parts; also its distance from the source."""
        scheme, same = self.plan.scheme.weight, True
        signal, noise = 0.0, 0.0
        for part in row_parts(source.shape):
            weight = self._weight(source[part])
            encoded = self._encode(layer.key, weight, part, layer.shape[0])
            served = self.chosen.decode(layer, self.plan.scheme, stored.__getitem__, part)
            same = same and torch.equal(served, scheme.decode(encoded, layer.dtype))
            if isinstance(self.chosen, GgufGrid):
                same = same and survives_conversion(encoded, served)
            original = weight.float()
            signal += original.square().sum().item()
            noise += (served.float() - original).square().sum().item()
        sqnr = 10 * math.log10(signal / noise) if noise else math.inf
        self.layers[layer.key] = replace(self.layers[layer.key], sqnr_db=sqnr)
        return same

    def notes(self) -> Iterator[str]:
        """What readers of the files need."""
        weight = self.plan.scheme.weight
        if isinstance(self.chosen, GgufGrid) and any(layer.embedding for layer in self.plan.layers.values()):
            yield "llama-quantize stores the embedding in another format unless told --token-embedding-type q4_0."
        in_blocks = isinstance(weight, ScaledScheme) and weight.scaling.block == BLOCKWISE_1X32
        small = in_blocks or isinstance(weight, Nvfp4Scheme)
        if self.chosen.name == "compressed-tensors" and small and self.dtype != torch.bfloat16:
            yield "transformers decodes this scheme to bfloat16 whatever the dtype of the model: load it as bfloat16."
        if weight_layout(self.plan.scheme) == FLOAT and self.chosen.name == "compressed-tensors":
            yield (
                "scales are float32, as servers use them; transformers rounds them to the dtype of the model unless "
                "told CompressedTensorsConfig(dequantize=True)."
            )
        if self.dtype == torch.float32 and isinstance(weight, AffineScheme):
            yield "scales are float32; a server that runs in bfloat16 rounds them: export with that dtype instead."

    def report(
        self,
        destination: Path,
        scheme: Scheme,
        skipped: tuple[tuple[str, str], ...],
        notes: tuple[str, ...],
        *,
        verified: bool,
    ) -> ExportReport:
        """What was done."""
        return ExportReport(
            destination=destination,
            scheme=scheme.name or str(scheme),
            format=self.chosen.name,
            dtype=self.dtype,
            layers=tuple(self.layers.values()),
            skipped=skipped,
            bytes_before=sum(at.nbytes for at in self.checkpoint.entries.values()),
            bytes_after=self.bytes_after,
            verified=verified,
            notes=notes,
        )


def _refuse_unfit(key: str, weight: torch.Tensor, decoded: torch.Tensor | None) -> None:
    """Raise ValueError for rows that no codes can stand for, or, if decoded, that codes stood for before."""
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{key} has a NaN or an infinity: the training run diverged; export an earlier checkpoint.")
    if decoded is not None and not torch.equal(decoded, weight):
        raise ValueError(
            f"{key} lies on a quantized grid already, and scales of its own would give it other codes: export the "
            "checkpoint from before it was converted, or pass the scales that made it as `scales`."
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes: a NaN equals itself, and -0 is not 0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def _appears_whole(destination: Path) -> Iterator[Path]:
    """A new folder that gets its name when the block ends without an error, and goes away when it ends with one."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = destination.parent / f".{destination.name}.partial"
    try:
        folder.mkdir()
    except FileExistsError:
        raise ValueError(f"{folder} exists: another export is writing it, or was killed; remove it.") from None
    try:
        yield folder
        folder.rename(destination)
    except BaseException:  # an interrupt too must leave nothing half-written; it is raised again
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy_other_files(source: Path, folder: Path) -> list[str]:
    """Copy tokenizer, generation settings, code and licence; notes on what is missing."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in _NOT_COPIED):
            shutil.copy(path, folder / path.name)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return []
    return [f"{source} has no tokenizer; servers need one beside the weights."]


def _set_dtype(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Say the dtype wherever the configuration says one; transformers 5 calls it dtype, older ones torch_dtype."""
    name = str(dtype).removeprefix("torch.")
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key] = name
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = name


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
