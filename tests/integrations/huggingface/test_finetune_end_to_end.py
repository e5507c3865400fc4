"""A recipe through the real quantization and export: what training saw is what transformers serves, bit for bit."""

import pytest
import torch

pytest.importorskip("trl", reason="needs the [hf] extra: pip install -e '.[hf]'")
pytest.importorskip("compressed_tensors", reason="transformers reads the exported checkpoint with it")

from transformers import AutoModelForCausalLM

from aotrain.export.table import FORMATS, formats_for
from aotrain.integrations.finetune import describe, load_recipe, problems, run
from aotrain.integrations.finetune.names import EXPORT_FORMATS
from aotrain.qat import convert_qat, prepare_qat
from aotrain.quantization import SCHEMES
from aotrain.testing import assert_bitwise_equal
from tests.integrations.finetune.test_recipe import CONFIGS

TINY = next(path for path in CONFIGS if path.stem == "tiny_int2_offline_cpu")


def load(folder, *overrides: str):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = [f"model.config.{key}={value}" for key, value in sizes.items()]
    small += ["data.max_rows=60", "evaluate.heldout=6", "trainer.max_length=64", "trainer.bf16=false"]
    small += [
        "trainer.max_steps=6",
        "quantize.start_step=2",
        "trainer.logging_steps=1",
        "trainer.per_device_train_batch_size=4",
    ]
    paths = [f"trainer.output_dir={folder / 'out'}", f"export.path={folder / 'out' / 'served'}"]
    return load_recipe(TINY, [*small, *paths, *overrides], check=problems)


def test_the_table_of_formats_is_that_of_the_exporter():
    assert set(EXPORT_FORMATS) == set(FORMATS)
    for name, scheme in SCHEMES.items():
        assert {format for format, carried in EXPORT_FORMATS.items() if name in carried} == set(formats_for(scheme))


def test_trained_converted_and_served_are_the_same_bits(tmp_path, capsys):
    recipe = load(tmp_path)
    described = describe(recipe)
    assert "QAT int2-g32: converted 7 layers, skipped 1 (1 excluded)" in described
    assert "pack-quantized W2A16, int2 group 32 weights; vLLM: CompressedTensorsWNA16" in described
    assert "self_attn: q_proj + k_proj + v_proj (1 group)\n  mlp: gate_proj + up_proj (1 group)" in described
    summary = run(recipe)
    nll = summary["nll"]
    assert set(nll) == {"qat", "control", "control_rounded", "exported"}
    assert nll["exported"] == nll["qat"]
    assert nll["control"] != nll["control_rounded"]
    assert nll["qat"] != nll["control_rounded"]
    assert summary["losses"]["last"] < summary["losses"]["first"]
    assert "exported and reloaded" in capsys.readouterr().out
    served = AutoModelForCausalLM.from_pretrained(recipe.export.path, dtype=torch.float32)
    tokens = torch.arange(32, 64).unsqueeze(0)
    dense = AutoModelForCausalLM.from_pretrained(recipe.output_dir, dtype=torch.float32)
    prepare_qat(dense, recipe.quantize.scheme)
    prepared = dense(tokens).logits
    convert_qat(dense)
    assert_bitwise_equal(dense(tokens).logits, prepared)
    assert_bitwise_equal(served(tokens).logits, prepared)


def test_nvfp4_trains_with_the_scales_of_joined_layers(tmp_path):
    """In full, then adapters on what that has saved; in bfloat16, to which transformers decodes NVFP4."""
    changes = ["quantize.scheme=nvfp4", "quantize.start_step=0", "evaluate.control=false", "optimizer.lr=1e-2"]
    first = load(tmp_path / "full", *changes, "model.dtype=bfloat16")
    nll = run(first)["nll"]
    assert nll["exported"] == nll["qat"]
    model = [f"model={{path: {first.output_dir}, dtype: bfloat16}}", "lora={r: 4}"]
    nll = run(load(tmp_path / "adapters", *changes, *model))["nll"]
    assert nll["exported"] == nll["qat"]


def test_low_rank_adapters_train_the_grid_that_is_served(tmp_path):
    first = load(tmp_path / "base", "quantize=null", "export=null", "evaluate=null")
    run(first)
    change = [f"model.path={first.output_dir}", "model.config=null", "model.tokenizer=null", "lora={r: 4}"]
    recipe = load(tmp_path, *change, "evaluate.control=false", "quantize.start_step=0", "optimizer.lr=1e-2")
    nll = run(recipe)["nll"]
    assert set(nll) == {"start", "start_rounded", "qat", "exported"}
    assert nll["exported"] == nll["qat"]
    assert nll["qat"] < nll["start_rounded"]
