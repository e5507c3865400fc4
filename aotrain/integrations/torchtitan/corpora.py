"""Where training text comes from: the standard library's source, local files, or the hub.

Each function returns a Hugging Face dataset with one text column per document. Map-style datasets (everything but hub
streams) come shuffled by a fixed seed. A path or name that gives no text raises ``JobError``.
"""

from __future__ import annotations

import glob
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from aotrain.integrations.config_file import JobError
from aotrain.integrations.stdlib_source import stdlib_files
from aotrain.integrations.torchtitan.job import Data

# One document in this many is held out for validation.
_HELD_OUT = 20

# Local text files are cut into documents of about this many characters, at line ends, so that even a single file has
# something to hold out.
_DOCUMENT_CHARS = 16384

# The standard library's files are cut finer: its jobs read a few hundred kilobytes, which must not be twenty files.
# With whole files, a batch of the debug job was one file and the validation loss rose from 2.8 to 3.4 between steps 50
# and 100.
_STDLIB_DOCUMENT_CHARS = 512


def load_corpus(data: Data, split: str, seed: int) -> Dataset | IterableDataset:
    """Documents of one split, in reading order of the first epoch.

    Args:
        data: the job's data section.
        split: "train" or "validation".
        seed: order of a map-style dataset.

    Raises:
        JobError: no such dataset or path, no such column, or nothing to read.
    """
    if data.dataset in ("c4", "hub"):
        return _hub(data, split)
    if data.dataset == "stdlib":
        dataset = _from_texts(stdlib_documents(split))
    elif data.dataset == "text":
        dataset = _from_texts(_text_documents(data, split))
    else:
        dataset = _local_rows(data, split)
    if len(dataset) == 0:
        raise JobError(
            f"data: no {split} documents in {data.path or data.dataset}; give more text or data.validation_path"
        )
    shuffled = dataset.shuffle(seed=seed)
    assert isinstance(shuffled, Dataset)
    return shuffled


def text_column(data: Data) -> str:
    """Name of the column that holds the text of a dataset made by ``load_corpus``."""
    return data.text_field if data.dataset in ("json", "parquet", "hub") else "text"


@lru_cache(maxsize=2)
def stdlib_documents(split: str) -> tuple[str, ...]:
    """Source of the running interpreter's standard library in short documents, ordered by path.

    Differs between Python versions. A file is held out whole, and what it shares with other files (the library keeps
    copies of some of its own code) is not trained on.
    """
    excluded = set(stdlib_documents("validation")) if split == "train" else set()
    texts = []
    for name, path in stdlib_files():
        if _is_held_out(name) != (split == "validation"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        documents = _cut(text, _STDLIB_DOCUMENT_CHARS)
        texts += [document for document in documents if document.strip() and document not in excluded]
    return tuple(texts)


def _is_held_out(name: str) -> bool:
    """Decided by the name alone, so that a document never moves between the splits."""
    return zlib.crc32(name.encode()) % _HELD_OUT == 0


def _from_texts(texts: Iterable[str]) -> Dataset:
    return Dataset.from_dict({"text": list(texts)})


def _files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that a path, folder or glob names, sorted."""
    found: list[Path] = []
    for match in sorted(glob.glob(path, recursive=True)):
        entry = Path(match)
        if entry.is_dir():
            found += sorted(p for p in entry.rglob("*") if p.suffix in suffixes and p.is_file())
        else:
            found.append(entry)
    if not found:
        raise JobError(f"data: no files in {path!r}; want {', '.join(suffixes)} files, a folder of them or a glob")
    return found


def _text_documents(data: Data, split: str) -> Iterator[str]:
    own_file = split == "validation" and data.validation_path is not None
    path = data.validation_path if own_file else data.path
    assert path is not None  # the job's check requires it
    for file in _files(path, (".txt", ".md", ".py")):
        for index, document in enumerate(_cut(file.read_text(encoding="utf-8", errors="replace"), _DOCUMENT_CHARS)):
            # With a validation file of its own, nothing is held out of either.
            held_out = data.validation_path is None and _is_held_out(f"{file.name}:{index}")
            if own_file or held_out == (split == "validation"):
                yield document


def _cut(text: str, chars: int) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= chars:
            yield "".join(lines)
            lines, size = [], 0
    if size:
        yield "".join(lines)


def _local_rows(data: Data, split: str) -> Dataset:
    suffixes = (".json", ".jsonl") if data.dataset == "json" else (".parquet",)
    own_file = split == "validation" and data.validation_path is not None
    path = data.validation_path if own_file else data.path
    assert path is not None
    files = [str(file) for file in _files(path, suffixes)]
    dataset = load_dataset(data.dataset, data_files=files, split="train")
    assert isinstance(dataset, Dataset)
    _require_column(data, dataset.column_names)
    rows = dataset.select_columns([data.text_field])
    if data.validation_path is None:
        wanted = split == "validation"
        rows = rows.filter(lambda text: _is_held_out(text) == wanted, input_columns=data.text_field)
    assert isinstance(rows, Dataset)
    return rows


def _hub(data: Data, split: str) -> IterableDataset:
    path, config = ("allenai/c4", "en") if data.dataset == "c4" else (data.path, data.hub_config)
    assert path is not None  # the job's check requires it
    try:
        dataset = load_dataset(path, name=config, split=split, streaming=True)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise JobError(
            f"data: cannot stream {path!r} ({split}) from the hub: {reason}. "
            "Check the name and the network, or set data.dataset to stdlib or to local files"
        ) from error
    assert isinstance(dataset, IterableDataset)
    if dataset.column_names is not None:
        _require_column(data, dataset.column_names)
    return dataset


def _require_column(data: Data, columns: list[str]) -> None:
    column = text_column(data)
    if column not in columns:
        raise JobError(
            f"data.text_field: no column {column!r} in {data.path or data.dataset}; it has {', '.join(columns)}"
        )
