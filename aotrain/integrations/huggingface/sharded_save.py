"""Saving what training quantized, whole, where FSDP shards a model and gathers it in a narrower dtype.

With mixed precision, accelerate keeps float32 masters (it makes them where the model came in bfloat16), and FSDP2
gathers them as bfloat16 for every layer. Fake quantizers saw the gathered weights, and gathered factors of adapters;
codes of the masters would be others, wherever rounding to bfloat16 crosses a boundary between codes. Exporters encode
what a checkpoint holds, so the checkpoint is saved in the dtype that was gathered.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Trainer


def save_whole(trainer: Trainer, folder: Path, *, quantized: bool) -> None:
    """Save the trainer's model, or adapter, as one process would; every rank calls it.

    Args:
        trainer: after training.
        folder: to write.
        quantized: trained through quantization, so that the numbers that layers got are what is to be saved.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:  # the Trainer saves nothing at all where the plugin is for shards
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    dtype = getattr(getattr(plugin, "mixed_precision_policy", None), "param_dtype", None)
    if quantized and dtype is not None and trainer.args.should_save:
        cast_checkpoint(folder, dtype)


def cast_checkpoint(folder: Path, dtype: torch.dtype) -> None:
    """Round the floating-point tensors of a checkpoint's safetensors files, in place, one file in memory at a time.

    Args:
        folder: a checkpoint, or an adapter.
        dtype: to round to; config.json says so then.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
        scratch = path.with_suffix(".tmp")
        save_file(cast, scratch, metadata=metadata)
        os.replace(scratch, path)
    config = folder / "config.json"
    if config.exists():  # an adapter has none
        content = json.loads(config.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
        scratch = config.with_suffix(".tmp")
        scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(scratch, config)
