"""An optimizer that is built before Accelerate shards the model by FSDP2, as the Trainer does it: same bits, saved."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the [hf] extra: pip install -e '.[hf]'")

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, load_fsdp_optimizer, save_fsdp_optimizer
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)

from aotrain.integrations.huggingface import optimizer_cls_and_kwargs
from aotrain.testing import assert_bitwise_equal
from tests.distributed.ranks import run_ranks
from tests.integrations.huggingface.tiny import arguments, tiny_llama, token_rows

FULL = StateDictOptions(full_state_dict=True)


def build(folder: str):
    args = arguments(folder)
    factory, settings = optimizer_cls_and_kwargs("adamw_8bit", args)
    model = tiny_llama()
    return model, factory()(model, **settings)


def train(model, optimizer, steps: int, share: float = 1.0) -> None:
    tokens = torch.stack([row["input_ids"] for row in token_rows(8)])
    for _ in range(steps):
        (model(input_ids=tokens, labels=tokens).loss * share).backward()
        optimizer.step()
        optimizer.zero_grad()


def state(model, optimizer) -> dict:
    options = get_optimizer_state_dict(model, optimizer, options=FULL)["state"]
    flat = {f"{name}.{key}": value for name, entry in options.items() for key, value in entry.items()}
    return {key: value.clone() for key, value in (flat | get_model_state_dict(model, options=FULL)).items()}


def sharded(rank: int, world_size: int, folder: str) -> dict:
    # What torchrun sets and Accelerate reads; the process group exists already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT",
    )
    # Gradients are averaged over ranks and only rank 0 has any, so the mean is exactly the gradient of one process.
    share = float(world_size) if rank == 0 else 0.0

    def prepared():
        built = build(folder)
        accelerator = Accelerator(cpu=True)
        # Accelerate takes FSDP for GPUs only; what it then does runs on any device.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        return accelerator, *accelerator.prepare(*built)

    accelerator, model, optimizer = prepared()
    train(model, optimizer, 2, share)
    weights = get_model_state_dict(model, options=FULL)
    save_fsdp_optimizer(plugin, accelerator, optimizer.optimizer, model, folder)
    train(model, optimizer, 2, share)
    whole = state(model, optimizer.optimizer)
    accelerator, model, optimizer = prepared()
    set_model_state_dict(model, weights, options=FULL)
    load_fsdp_optimizer(plugin, accelerator, optimizer.optimizer, model, folder)
    train(model, optimizer, 2, share)
    return {"whole": whole, "resumed": state(model, optimizer.optimizer)}


def test_two_ranks_have_the_bits_of_one_process_and_resume(tmp_path: Path):
    model, optimizer = build(str(tmp_path))
    train(model, optimizer, 4)
    want = state(model, optimizer)
    assert "model.layers.0.mlp.up_proj.weight.exp_avg_codes" in want
    assert "model.embed_tokens.weight.exp_avg" in want
    for result in run_ranks(sharded, 2, str(tmp_path)):
        for run in result.values():
            assert run.keys() == want.keys()
            for key, value in want.items():
                assert_bitwise_equal(run[key], value, what=key)
