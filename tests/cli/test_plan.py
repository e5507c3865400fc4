"""`aotrain plan`: its output, its mistakes, and that `aotrain pretrain` takes the filter that it writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aotrain.cli.plan import plan

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = ROOT / "configs" / "pretrain"
JOB_8B = CONFIGS / "llama3_8b_float8_rowwise_8xh100.yaml"
JOB_70B = CONFIGS / "llama3_70b_float8_rowwise_256xh100.yaml"


def test_a_job_gives_its_tokens_parallelism_recipe_and_skips(capsys):
    assert plan(str(JOB_70B), gpu="H100") == 0
    output = capsys.readouterr().out
    assert "float8_rowwise, 32768 tokens, tp 8, H100, modelled" in output
    for part in ("layers.*.feed_forward.w1", "3584", "convert", "matches skip 'lm_head'", "whole step x1."):
        assert part in output


def test_a_mixture_of_experts_is_planned_without_its_gates(capsys):
    assert plan(str(CONFIGS / "qwen3_30b_moe_float8_rowwise_8xh200.yaml"), gpu="H200") == 0
    output = capsys.readouterr().out
    assert "float8_rowwise, 8192 tokens, tp 1, H200" in output
    assert "layers.*.attention.qkv_linear.wqkv" in output
    assert "gate" not in output


def test_options_and_overrides_win_over_the_job(capsys):
    assert plan(str(JOB_8B), recipe="int8_rowwise", tokens=4096, tp=2, gpu="a100") == 0
    assert "int8_rowwise, 4096 tokens, tp 2, A100" in capsys.readouterr().out
    assert plan(str(JOB_8B), set=("data.batch_size=2",), gpu="H100") == 0
    assert "16384 tokens" in capsys.readouterr().out


def test_a_job_without_a_batch_size_says_what_it_assumes(capsys):
    overrides = ("data.batch_size=null",)
    assert plan(str(JOB_8B), set=overrides, gpu="H100") == 0
    assert "one data-parallel rank; --tokens" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["llama3/8b", "llama3/8B", "qwen3/0.6B", "llama3/debug", "deepseek_v3/debug"])
def test_torchtitan_models(capsys, model):
    assert plan(model, gpu="H100") == 0
    assert f"{model}: float8_rowwise, 16384 tokens, tp 1" in capsys.readouterr().out


def test_a_folder_with_a_hugging_face_config(capsys, tmp_path):
    config = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in (tmp_path, tmp_path / "config.json"):
        assert plan(str(name), recipe="rowwise", gpu="H100") == 0
        output = capsys.readouterr().out
        assert "model.layers.*.mlp.down_proj" in output
        assert "28672" in output
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    assert plan(str(tmp_path), gpu="H100") == 2
    assert "not a model that transformers knows" in capsys.readouterr().err


def test_experts_of_torchtitan_and_hugging_face_models(capsys, tmp_path):
    assert plan("deepseek_v3/16b", gpu="H200", ep=8) == 0
    output = capsys.readouterr().out
    assert "layers.*.moe.routed_experts.inner_experts (8 experts)" in output
    config = {"model_type": "qwen3_moe", "hidden_size": 4096, "moe_intermediate_size": 1536, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 64, "num_experts": 16, "num_experts_per_tok": 8, "vocab_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan(str(tmp_path), gpu="H200", tokens=131072) == 0
    output = capsys.readouterr().out
    assert "model.layers.*.mlp.experts (16 experts)" in output
    assert "3072" in output


def test_a_model_without_a_language_head(capsys, tmp_path):
    config = {"model_type": "vit", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    assert plan(str(tmp_path), gpu="H100") == 0
    captured = capsys.readouterr()
    assert "keep" in captured.out
    assert "less than 3 %" in captured.err


def test_times_of_the_local_gpu_are_measured_and_kept(capsys, tmp_path, monkeypatch):
    import torch

    import aotrain.nn.plan
    from aotrain.nn.measure import Measured

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        aotrain.nn.plan, "times_for", lambda gpu, refresh: Measured(torch.device("cpu"), refresh=refresh)
    )
    for remeasure in (False, True):
        assert plan("llama3/debug", tokens=16, remeasure=remeasure) == 0
        captured = capsys.readouterr()
        assert "CPU, measured" in captured.out
        assert f"times are kept in {tmp_path}" in captured.err


def test_a_config_json_without_transformers_says_what_to_install(capsys, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert plan(str(tmp_path), gpu="H100") == 2
    assert "pip install 'aotrain[hf]'" in capsys.readouterr().err


def test_a_gain_below_three_percent_is_a_warning(capsys, tmp_path):
    assert plan("llama3/1b", tokens=1024, gpu="H100", out=tmp_path / "filter.yaml") == 0
    assert "less than 3 %: train in bfloat16" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "filter.yaml").read_text()) == {"precision": {"recipe": None}}


def test_a_gpu_without_float8_suggests_int8(capsys):
    assert plan("llama3/8b", gpu="A100") == 0
    captured = capsys.readouterr()
    assert "A100 has compute capability 8.0" in captured.err
    assert "Use int8_rowwise." in captured.err


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ({"model": "llama3/8"}, ["unknown size '8' of llama3", "70B", "did you mean '8B'"]),
        ({"model": "lama3/8b"}, ["unknown model", "FAMILY/SIZE", "qwen3", "did you mean 'llama3/8b'"]),
        ({"model": "no_such.yaml"}, ["no_such.yaml"]),
        ({"model": "."}, ["no config.json"]),
        ({"recipe": "float8_rowwize"}, ["unknown recipe", "int8_rowwise", "did you mean 'float8_rowwise'"]),
        ({"gpu": "h20"}, ["Unknown GPU", "MI300X", "did you mean 'H200'"]),
        ({"tokens": 0}, ["--tokens got 0"]),
        ({"tp": -1}, ["--tp got -1"]),
        ({"other_share": 1.0}, ["--other-share got 1.0"]),
        ({"out": Path("/no/such/folder/filter.yaml")}, ["no such folder"]),
        ({"skip": ("nothing",)}, ["'nothing' matches no linear layer", "lm_head"]),
        ({"set": ("model.size=8b",)}, ["changes a job file"]),
    ],
)
def test_mistakes(capsys, arguments, messages):
    call = {"model": "llama3/8b", "gpu": "H100"} | arguments
    assert plan(**call) == 2
    captured = capsys.readouterr()
    for message in messages:
        assert message in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("job", "arguments", "converted"),
    [
        (JOB_70B, {}, {"w1", "w2", "w3"}),
        (JOB_8B, {"recipe": "float8_tensorwise"}, {"wqkv", "wo", "w1", "w2", "w3"}),
        (JOB_8B, {"skip": ("layers.0.", "feed_forward.w2")}, {"wqkv", "wo", "w1", "w3", "lm_head"}),
        (JOB_8B, {"tokens": 256}, set()),
    ],
    ids=["70b", "tensorwise", "own skips", "nothing"],
)
def test_pretrain_converts_exactly_what_the_plan_says(tmp_path, job, arguments, converted):
    from aotrain.integrations.torchtitan import compat

    compat.install()
    from aotrain.integrations.torchtitan.build import build_config
    from aotrain.integrations.torchtitan.job import load_job
    from aotrain.integrations.torchtitan.linear import Float8Linear

    out = tmp_path / "filter.yaml"
    assert plan(str(job), gpu="H100", out=out, **arguments) == 0
    document = yaml.safe_load(job.read_text()) | yaml.safe_load(out.read_text())
    planned = tmp_path / "job.yaml"
    planned.write_text(yaml.safe_dump(document))
    loaded = load_job(planned)
    layout = loaded.parallelism
    ranks = layout.tp * max(layout.dp_shard, 1)
    config = build_config(loaded, device_type="cuda", num_ranks=ranks, tokenizer_dir=Path("unused"))
    assert config.model_spec is not None
    found = {fqn for fqn, *_ in config.model_spec.model.traverse(Float8Linear.Config)}
    assert {fqn.rpartition(".")[2] for fqn in found} == converted
    if "skip" in arguments:
        assert not any(fqn.startswith("layers.0.") or fqn.endswith("w2") for fqn in found)


def test_mistakes_are_shown_without_torch():
    script = (
        "import sys; sys.argv = ['aotrain', 'plan', *sys.argv[1:]]\n"
        "from aotrain.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 2, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    for arguments in (["llama3/8"], ["x.yaml"], ["llama3/8b", "--gpu", "x"], ["llama3/8b", "--recipe", "x"]):
        command = [sys.executable, "-c", script, *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stderr.startswith("error: ")
