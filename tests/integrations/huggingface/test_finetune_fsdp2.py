"""A recipe on two ranks under FSDP2 with bfloat16: what is saved and exported is what the layers got.

Accelerate takes FSDP for GPUs only; what it then does runs on any device, so here it is told that it was asked on one.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs the [hf] extra: pip install -e '.[hf]'")
pytest.importorskip("compressed_tensors", reason="transformers reads the exported checkpoint with it")

from accelerate import state
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from aotrain.integrations.finetune import run
from aotrain.integrations.huggingface.sharded_save import cast_checkpoint
from aotrain.testing import assert_bitwise_equal
from tests.distributed.ranks import run_ranks
from tests.integrations.huggingface.test_finetune_end_to_end import load

FSDP = ("trainer.fsdp=true", "trainer.bf16=true", "trainer.max_steps=3", "quantize.start_step=0", "optimizer.lr=1e-2")
# What `accelerate launch` asks for by default, with which the Trainer would save nothing.
FSDP += ("trainer.fsdp_config={state_dict_type: SHARDED_STATE_DICT}", "evaluate.control=false")


def pretend_to_be_on_gpus() -> None:
    """Accelerate's state takes FSDP, in this process for good."""
    init = state.AcceleratorState.__init__

    def takes_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        if "fsdp_plugin" in self.__dict__:
            self.distributed_type = DistributedType.FSDP

    state.AcceleratorState.__init__ = takes_fsdp


def on_ranks(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    # What torchrun sets and Accelerate reads; the process group exists already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    pretend_to_be_on_gpus()
    full = load(Path(folder) / "full", *FSDP)
    results = {"full": run(full)["nll"]}
    base = [f"model={{path: {full.output_dir}, dtype: bfloat16}}", "lora={r: 4}"]
    results["lora"] = run(load(Path(folder) / "lora", *FSDP, *base))["nll"]
    return results


def test_what_is_exported_is_what_training_saw(tmp_path):
    nll = run_ranks(on_ranks, 2, str(tmp_path))[0]
    for kind, dense in (("full", "full/out"), ("lora", "lora/out/merged")):
        tensors = load_file(tmp_path / dense / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}, kind
        assert nll[kind]["exported"] == nll[kind]["qat"], kind


def test_a_checkpoint_is_rounded_whole(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(3)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    cast_checkpoint(tmp_path, torch.bfloat16)
    cast = load_file(tmp_path / "model.safetensors")
    assert_bitwise_equal(cast["a"], tensors["a"].bfloat16())
    assert_bitwise_equal(cast["b"], tensors["b"])
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "llama", "dtype": "bfloat16"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
