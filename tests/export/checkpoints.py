"""Small dense checkpoints, made without a model library."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

ROWS, COLUMNS = 128, 256


def layer_names(layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one block of a Llama-like model."""
    prefix = f"model.layers.{layer}."
    return {
        f"{prefix}self_attn.q_proj.weight": (ROWS, COLUMNS),
        f"{prefix}self_attn.k_proj.weight": (64, COLUMNS),
        f"{prefix}mlp.down_proj.weight": (COLUMNS, ROWS),
        f"{prefix}input_layernorm.weight": (COLUMNS,),
    }


def tensors_of(layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (32, COLUMNS), "lm_head.weight": (32, COLUMNS)}
    for layer in range(layers):
        shapes |= layer_names(layer)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1, config: dict | None = None) -> Path:
    """A checkpoint folder with so many shards, a configuration, and a tokenizer's file."""
    folder.mkdir(parents=True)
    names = [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]
    names = names if shards > 1 else ["model.safetensors"]
    places = {key: names[index * shards // len(tensors)] for index, key in enumerate(tensors)}
    for name in names:
        held = {key: tensor for key, tensor in tensors.items() if places[key] == name}
        save_file(held, folder / name, metadata={"format": "pt"})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"} | (config or {})))
    (folder / "tokenizer.json").write_text("{}")
    return folder
