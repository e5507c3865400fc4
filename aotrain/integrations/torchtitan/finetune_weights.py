"""Weights from a Hugging Face folder into a sharded model, and back into such a folder.

One tensor at a time is whole on a rank. Writing goes file by file into a temporary folder; what is complete is moved to
its place, config.json last, so a folder with config.json has everything.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.finetune_layout import HFConfig, Layout

# Of one file, as transformers splits them, in bytes.
_LARGEST_FILE = 5 * 10**9
_INDEX = "model.safetensors.index.json"
# Beside weights and config.json.
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
# Of old checkpoints; computed from config.json.
_COMPUTED = "rotary_emb.inv_freq"


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder's safetensors files, from their headers.

    Raises:
        JobError: no such file, or a damaged one.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        with _opened(path) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {name: shape for name, shape in shapes.items() if not name.endswith(_COMPUTED)}


def model_shapes(model: torch.nn.Module, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a checkpoint of a model has."""
    return {layout.hf_name(name): tuple(param.shape) for name, param in _parameters(model, layout)}


@torch.no_grad()
def load_weights(model: torch.nn.Module, layout: Layout, folder: Path) -> None:
    """Fill a model, sharded or not, in its own dtype; every rank reads the files.

    Raises:
        JobError: a tensor that is missing or of another shape, or a damaged file.
    """
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for path in _weight_files(folder):
            file = stack.enter_context(_opened(path))
            where |= dict.fromkeys(file.keys(), file)
        for titan, param in _parameters(model, layout):
            name = layout.hf_name(titan)
            if name not in where:
                raise JobError(f"model.path: {folder} has no tensor {name}")
            whole = where[name].get_tensor(name)
            if whole.shape != param.shape:
                raise JobError(f"model.path: {name} got shape {list(whole.shape)}, want {list(param.shape)}")
            whole = layout.from_hf(titan, whole).to(param.dtype)
            if isinstance(param, DTensor):
                # Every rank has read the same tensor, so nothing is sent.
                whole = distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)
            param.copy_(whole)


@torch.no_grad()
def save_weights(
    model: torch.nn.Module,
    layout: Layout,
    folder: Path,
    *,
    config: HFConfig,
    others: list[Path],
    dtype: torch.dtype,
    largest_file: int = _LARGEST_FILE,
) -> None:
    """Write weights, config.json and what belongs to them; every rank calls, the first writes.

    Args:
        model: sharded or not.
        layout: names and rows of the checkpoint.
        folder: exists; files of the same names are replaced.
        config: what config.json says; its dtype is set.
        others: folders that generation settings and the tokenizer are copied from, the later over the earlier.
        dtype: of the weights in the file.
        largest_file: in bytes, unless one tensor is larger.
    """
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    scratch = folder / ".saving"
    if writes:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    plan = _plan(model, layout, dtype, largest_file)
    for file_name, params in plan.items():
        tensors = {}
        for titan, param in params:
            whole = param.full_tensor() if isinstance(param, DTensor) else param
            if writes:
                tensors[layout.hf_name(titan)] = layout.to_hf(titan, whole.detach()).to("cpu", dtype).contiguous()
            del whole
        if writes:
            save_file(tensors, scratch / file_name, metadata={"format": "pt"})
    if not writes:
        return
    if len(plan) > 1:
        _write_index(scratch / _INDEX, plan, layout, dtype)
    for source in others:
        for pattern in _COPIED:
            for path in source.glob(pattern):
                shutil.copy(path, scratch / path.name)
    name = str(dtype).removeprefix("torch.")
    said = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": name, "torch_dtype": name}
    (scratch / "config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, folder / path.name)
    scratch.rmdir()


def _parameters(model: torch.nn.Module, layout: Layout) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters that a checkpoint has, by torchtitan's names without wrappers; a tied output layer is left out."""
    for name, param in model.named_parameters():
        yield name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""), param


def _plan(
    model: torch.nn.Module, layout: Layout, dtype: torch.dtype, largest: int
) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
    """File name -> the parameters in it."""
    files: list[list[tuple[str, torch.nn.Parameter]]] = [[]]
    size = 0
    for titan, param in _parameters(model, layout):
        bytes_of = param.numel() * dtype.itemsize
        if files[-1] and size + bytes_of > largest:
            files.append([])
            size = 0
        files[-1].append((titan, param))
        size += bytes_of
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    count = len(files)
    return {f"model-{number:05}-of-{count:05}.safetensors": params for number, params in enumerate(files, start=1)}


def _write_index(
    path: Path, plan: dict[str, list[tuple[str, torch.nn.Parameter]]], layout: Layout, dtype: torch.dtype
) -> None:
    total = sum(param.numel() * dtype.itemsize for params in plan.values() for _, param in params)
    where = {layout.hf_name(titan): name for name, params in plan.items() for titan, _ in params}
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")


def _weight_files(folder: Path) -> list[Path]:
    """Those of the index if there is one: a folder may hold the same weights in a second form."""
    if (folder / _INDEX).is_file():
        where = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        found = [folder / name for name in sorted(set(where.values()))]
    else:
        found = [path for path in [folder / "model.safetensors"] if path.is_file()] or sorted(
            folder.glob("*.safetensors")
        )
    missing = [path.name for path in found if not path.is_file()]
    if missing or not found:
        raise JobError(f"model.path: {folder} has no {missing[0] if missing else '*.safetensors'}; want all weights")
    return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise JobError(f"model.path: {path} is damaged or incomplete ({error}); copy or download it again") from error
