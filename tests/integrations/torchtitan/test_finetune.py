"""A recipe through torchtitan on the CPU: what is trained, saved, served and measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

from aotrain.integrations.finetune import describe, run
from aotrain.integrations.torchtitan.metrics_file import read_rows
from aotrain.qat import QATSchedule, prepare_qat
from aotrain.testing import assert_bitwise_equal

from .tiny_checkpoint import LLAMA3, QWEN3
from .tiny_finetune import auto_model, loader, read_weights

TOKENS = torch.arange(32, 96).unsqueeze(0)


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


@pytest.mark.parametrize("config", [LLAMA3, QWEN3], ids=["llama", "qwen3"])
def test_trained_saved_and_served_are_one_model(load, config, capsys):
    reader = auto_model()
    recipe = load("evaluate.control=true", config=config)
    assert "QAT int4-g32: converted 14 layers, skipped 1 (1 excluded)" in describe(recipe)
    summary = run(recipe)
    assert summary == json.loads((recipe.output_dir / "summary.json").read_text())
    assert summary["losses"]["last"] < summary["losses"]["first"] - 0.3
    assert summary["steps"] == 6
    nll = summary["nll"]
    assert list(nll) == ["start", "start_rounded", "qat", "control", "control_rounded", "exported"]
    assert nll["qat"] < nll["start_rounded"] - 0.3
    assert len(set(list(nll.values())[:-1])) == 5
    # The same weights to the bit; torchtitan and transformers sum in another order.
    assert nll["exported"] == pytest.approx(nll["qat"], abs=1e-5)
    shown = capsys.readouterr().out
    assert "trained through quantization (QAT)" in shown
    # The saved folder is an ordinary one, and what it is rounded to is what is served.
    dense, info = reader.from_pretrained(recipe.output_dir, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    prepare_qat(dense, recipe.quantize.scheme)
    served = reader.from_pretrained(recipe.export.path, dtype=torch.float32)
    with torch.no_grad():
        assert_bitwise_equal(served(TOKENS).logits, dense(TOKENS).logits)


def test_the_schedule_is_applied_before_every_step(load, monkeypatch):
    calls = []

    def apply(self, model, step):
        calls.append((self.start_step, self.anneal_steps, step))

    monkeypatch.setattr(QATSchedule, "apply", apply)
    run(load("evaluate=null", "export=null", "quantize.start_step=2", "quantize.anneal_steps=1"))
    assert calls == [(2, 1, step) for step in range(6)]


def test_before_its_start_training_is_dense_training(load, tmp_path):
    no_export = ("export=null", "evaluate=null", "trainer.max_steps=4")
    late = load(*no_export, "quantize.start_step=3")
    run(late)
    never = load(*no_export, "quantize=null", f"trainer.output_dir={tmp_path / 'never'}")
    run(never)
    got, want = ([row["loss"] for row in read_rows(each.output_dir / "metrics.jsonl")] for each in (late, never))
    assert got[:3] == want[:3]
    assert got[3] != want[3]


def test_random_weights_float8_packing_and_torchs_adamw(load):
    sizes = {key: LLAMA3[key] for key in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 128}
    recipe = load(
        *("model.path=null", f"model.config={json.dumps(sizes)}", "model.tokenizer=byte", "quantize=null"),
        *("float8=rowwise", "export=null", "trainer.packing=true", "optimizer.name=adamw"),
    )
    assert "converted" in describe(recipe)
    summary = run(recipe)
    assert list(summary["nll"]) == ["trained"]
    assert summary["losses"]["last"] < summary["losses"]["first"]
    saved = read_weights(recipe.output_dir)
    assert not torch.equal(
        saved["model.layers.0.self_attn.k_proj.weight"], saved["model.layers.0.self_attn.v_proj.weight"]
    )
    assert json.loads((recipe.output_dir / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_without_transformers_the_export_is_written_and_not_measured(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "aotrain.integrations.huggingface.served", None)
    recipe = load("trainer.max_steps=2")
    summary = run(recipe)
    assert summary["nll"]["exported"] is None
    assert "transformers cannot read it here" in summary["exported_note"]
    assert (Path(recipe.export.path) / "model.safetensors").is_file()
