"""What `--check` says of a recipe that torchtitan cannot run: by name, all at once, before anything is trained."""

import json

import pytest
import torch

from aotrain.cli.main import main
from aotrain.integrations.config_file import ConfigError, JobError
from aotrain.integrations.finetune import run
from aotrain.integrations.finetune.rules import SET_ELSEWHERE
from aotrain.integrations.torchtitan import finetune
from aotrain.integrations.torchtitan.finetune_keys import NAMES, TrainerKeys
from aotrain.integrations.torchtitan.finetune_optim import lr_factor, optimizer_config

from .tiny_checkpoint import LLAMA, LLAMA3, QWEN3, weights, write_checkpoint
from .tiny_finetune import loader, write_recipe


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


def complaints(load, *overrides: str, **options) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, **options)
    return [str(problem) for problem in caught.value.problems]


def check(recipe, *options: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(["finetune", str(recipe), "--check", *options])
    return exited.value.code


def test_check_says_what_happens_to_each_layer_and_trains_nothing(tmp_path, capsys):
    recipe = write_recipe(tmp_path, LLAMA3)
    recipe.write_text(recipe.read_text().replace("engine: torchtitan\n", ""))
    assert check(recipe, "--engine", "torchtitan") == 0
    shown = capsys.readouterr().out
    assert "torchtitan's llama, 0.1 M parameters in float32" in shown
    assert "QAT int4-g32: converted 14 layers, skipped 1 (1 excluded)" in shown
    assert "model.layers.0.self_attn.k_proj: 64 -> 32" in shown
    assert shown.endswith("recipe.yaml: ok\n")
    assert not (tmp_path / "out").exists()


def test_every_key_that_has_no_meaning_is_named_at_once(load):
    lines = complaints(
        load,
        *("trainer.max_step=3", "trainer.neftune_noise_alpha=5", "trainer.lr_scheduler_type=polynomial"),
        *("trainer.save_total_limit=1", "trainer.fsdp=false", "model.attn_implementation=sdpa", "lora={r: 4}"),
        *("optimizer.offload=cpu", "quantize.embeddings=true", "trainer.optim_args=blocksize=3"),
    )
    starts = (
        "trainer.max_step: has no meaning for engine torchtitan",
        "trainer.neftune_noise_alpha: has no meaning for engine torchtitan",
        "trainer.lr_scheduler_type: Input should be 'linear', 'cosine', 'constant' or 'constant_with_warmup'",
        "trainer.save_total_limit: Input should be greater than or equal to 2 (got 1)",
        "trainer.fsdp: Input should be",
        "model.attn_implementation: is for from_pretrained, which engine torchtitan does not call; remove it",
        "lora: is not offered by engine torchtitan",
        "optimizer.offload: does not go with FSDP2",
        "quantize.embeddings: is not offered by engine torchtitan",
        "trainer.optim_args: unknown key 'blocksize'",
    )
    for start in starts:
        assert any(start in line for line in lines), (start, lines)
    assert len(lines) == len(starts)
    assert "did you mean 'trainer.max_steps'?" in next(line for line in lines if "max_step:" in line)
    assert "or use engine: trl" in next(line for line in lines if "neftune" in line)


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (LLAMA3 | {"model_type": "gemma3"}, (), "model.path: torchtitan cannot be this model: model_type got 'gemma3'"),
        (LLAMA3 | {"attention_bias": True}, (), "attention_bias got True, torchtitan's llama has False"),
        (LLAMA3, ("trainer.max_length=256",), "trainer.max_length: got 256, but the model has max_position_embeddings"),
        (LLAMA3, ("model.path=null", "model.config={model_type: llama}", "model.tokenizer=byte"), "model.config: "),
        (LLAMA3, ("model.dtype=float16",), "model.dtype: got 'float16', whose gradients need loss scaling"),
        (LLAMA3, ("quantize.exclude=[lm_head, router]",), "quantize.exclude: 'router' matches no layer; there are "),
        (LLAMA3, ("quantize.exclude=['*k_proj']",), "k_proj without model.layers.0.self_attn.v_proj: torchtitan makes"),
        (LLAMA3, ("quantize.scheme=int4-g128",), "model.layers.1.mlp.up_proj [128, 64]: "),
        (QWEN3 | {"head_dim": 24}, ("quantize.scheme=int4-g128",), "model.layers.0.self_attn.o_proj [64, 96]: "),
        (LLAMA | {"vocab_size": 200}, (), "model.tokenizer: it has 259 tokens, but the model embeds 200"),
    ],
)
def test_models_and_layers_that_do_not_fit(load, config, overrides, message):
    assert any(message in line for line in complaints(load, *overrides, config=config))


def test_scales_of_row_blocks_and_heads_of_another_size(load):
    """A scale of 128 rows is of the same rows in torchtitan only if heads do not cross its edge."""
    lines = complaints(load, "quantize.scheme=fp8-block", config=LLAMA3 | {"head_dim": 48})
    assert len(lines) == 2  # q of two layers has 192 rows; k has one scale for all, v and the rest are in order
    assert "q_proj [192, 64]: torchtitan swaps rows within heads of 48, which moves them between" in lines[0]
    load("quantize.scheme=fp8-block", config=QWEN3 | {"head_dim": 48})


def test_a_checkpoint_with_other_tensors(tmp_path, load):
    tensors = weights(LLAMA3) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    del tensors["model.norm.weight"]
    write_checkpoint(tmp_path / "llama", LLAMA3, tensors)
    lines = complaints(load)
    assert any("the checkpoint lacks model.norm.weight" in line for line in lines)
    assert any(
        "tensors that torchtitan's model does not: model.layers.0.self_attn.q_proj.bias" in line for line in lines
    )
    with pytest.raises(JobError, match="the checkpoint lacks"):
        run(load_unchecked(tmp_path))


def load_unchecked(folder):
    from aotrain.integrations.finetune import load_recipe

    return load_recipe(write_recipe(folder, LLAMA3))


def test_missing_folders(load, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lines = complaints(load, "model.path=no/such-model")
    assert any("model.path: 'no/such-model' is no folder and cannot be fetched from the hub" in line for line in lines)
    (tmp_path / "llama" / "tokenizer.json").unlink()
    assert any("has no tokenizer.json; add it, or give model.tokenizer: byte" in line for line in complaints(load))
    load("model.tokenizer=byte")
    (tmp_path / "llama" / "config.json").write_text("{")
    assert any("model.path: cannot read" in line for line in complaints(load, "model.tokenizer=byte"))


def test_keys_and_defaults_are_those_of_trl(tmp_path):
    trl = pytest.importorskip("trl", reason="compares with it: pip install -e '.[hf]'")
    theirs = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True)
    ours = TrainerKeys(output_dir=str(tmp_path), use_cpu=True)
    # transformers renames the first and lists the second; fsdp is what this engine always does.
    for name in set(NAMES) - {"gradient_checkpointing", "activation_checkpointing", "report_to", "fsdp"}:
        want = getattr(theirs, name)
        assert getattr(ours, name) == (want or False if name == "resume_from_checkpoint" else want), name
    assert not set(NAMES) & set(SET_ELSEWHERE)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_schedules_are_those_of_transformers(kind):
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install -e '.[hf]'")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = transformers.get_scheduler(kind, optimizer, num_warmup_steps=3, num_training_steps=10)
    for step in range(11):
        assert lr_factor(step, kind=kind, warmup=3, total=10) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_parameter_groups_of_the_optimizer(load):
    recipe = load("trainer.optim_args='block_size=128,seed=7'")
    config = optimizer_config(recipe.optimizer, recipe.trainer["optim_args"])
    names = ("layers.0.ffn_norm.weight", "norm.weight", "tok_embeddings.weight", "layers.0.attention.wo.weight")
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.layers[0].ffn_norm, model.norm = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)
    model.tok_embeddings, model.layers[0].attention = torch.nn.Embedding(4, 4), torch.nn.Module()
    model.layers[0].attention.wo = torch.nn.Linear(4, 4, bias=False)
    (optimizer,) = config.build(model_parts=[model])
    found = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert {name: (found[name]["weight_decay"], found[name]["bits"]) for name in names} == {
        names[0]: (0.0, 8),
        names[1]: (0.0, 8),
        names[2]: (0.1, 32),
        names[3]: (0.1, 8),
    }
    assert {(group["lr"], group["betas"], group["seed"]) for group in optimizer.param_groups} == {
        (1e-2, (0.9, 0.95), 7)
    }
    assert found[names[3]]["block_size"] == 128


def test_every_optimizer_of_a_recipe_trains(load, tmp_path):
    for name in ("lion_8bit", "adamw_4bit"):
        recipe = load(
            *(f"optimizer.name={name}", "optimizer.lr=1e-3", "evaluate=null", "export=null", "trainer.max_steps=2"),
            f"trainer.output_dir={tmp_path / name}",
        )
        losses = run(recipe)["losses"]
        assert losses["last"] < losses["first"]
        assert json.loads((recipe.output_dir / "recipe.json").read_text())["optimizer"]["name"] == name


def test_the_engine_is_the_whole_interface():
    assert all(callable(getattr(finetune, name)) for name in ("run", "problems", "describe"))
