"""Fine-tuning recipes of a few seconds, and what they leave."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aotrain.integrations.finetune import Recipe, load_recipe, problems

from .tiny_checkpoint import LLAMA3, write_checkpoint

RECIPE = """\
model: {path: MODEL, dtype: float32}
data: {path: stdlib-pairs, max_rows: 40, max_chars: 200}
quantize: {scheme: int4-g32}
optimizer: {name: adamw_8bit, lr: 1e-2, betas: [0.9, 0.95], weight_decay: 0.1}
trainer:
  output_dir: OUT
  max_steps: 6
  per_device_train_batch_size: 4
  max_length: 96
  logging_steps: 1
  save_strategy: "no"
  use_cpu: true
  bf16: false
export: {path: SERVED}
evaluate: {heldout: 6}
engine: torchtitan
"""


def write_recipe(folder: Path, config: dict[str, Any]) -> Path:
    """The recipe of a tiny model, in a folder of its own with the model."""
    model = folder / config["model_type"]
    if not model.exists():
        write_checkpoint(model, config)
    text = RECIPE
    for word, path in {"MODEL": model, "OUT": folder / "out", "SERVED": folder / "served"}.items():
        text = text.replace(word, str(path))
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def loader(folder: Path) -> Callable[..., Recipe]:
    """``load("optimizer.lr=1e-3", config=QWEN3)``: the checked recipe with changes."""

    def load(*overrides: str, config: dict[str, Any] = LLAMA3) -> Recipe:
        return load_recipe(write_recipe(folder, config), overrides, check=problems)

    return load


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder with one file."""
    return load_file(Path(folder) / "model.safetensors")


def auto_model() -> Any:
    """transformers' class that reads checkpoints; skips the test where it cannot read ours."""
    transformers = pytest.importorskip("transformers", reason="reads checkpoints with it: pip install -e '.[hf]'")
    pytest.importorskip("compressed_tensors", reason="transformers reads the exported checkpoint with it")
    return transformers.AutoModelForCausalLM
