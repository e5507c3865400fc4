"""A recipe through TRL: what is trained, saved, measured and refused. `aotrain.qat` and `aotrain.export` stand in."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("trl", reason="needs the [hf] extra: pip install -e '.[hf]'")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aotrain.integrations.byte_tokenizer import byte_tokenizer_dir
from aotrain.integrations.config_file import ConfigError, JobError
from aotrain.integrations.finetune import describe, load_recipe, problems, run
from aotrain.integrations.huggingface import finetune
from aotrain.nn import Float8Linear
from aotrain.qat import prepare_qat
from aotrain.testing import assert_bitwise_equal
from tests.integrations.huggingface import recorder

RECIPE = """\
model:
  path: null
  dtype: float32
  tokenizer: byte
  config: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 2, max_position_embeddings: 128}
data: {path: stdlib-pairs, max_rows: 40, max_chars: 200}
quantize: {scheme: int2-g32, start_step: 2, anneal_steps: 1}
optimizer: {name: adamw_8bit, lr: 3e-3, betas: [0.8, 0.95], eps: 1e-7, weight_decay: 0.1}
trainer:
  output_dir: OUT
  max_steps: 4
  per_device_train_batch_size: 4
  per_device_eval_batch_size: 2
  max_length: 64
  logging_steps: 1
  save_strategy: "no"
  use_cpu: true
  bf16: false
  report_to: none
  disable_tqdm: true
evaluate: {heldout: 6}
"""


@pytest.fixture(autouse=True)
def _recorders(monkeypatch):
    recorder.install(monkeypatch)


@pytest.fixture
def load(tmp_path):
    def load_it(*overrides: str, check=problems):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.replace("OUT", str(tmp_path / "out")))
        return load_recipe(path, overrides, check=check)

    return load_it


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=259, num_key_value_heads=2, pad_token_id=258, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(byte_tokenizer_dir()).save_pretrained(folder)
    return folder


def test_a_run_trains_saves_exports_and_measures(load, tmp_path, capsys):
    recipe = load(f"export.path={tmp_path / 'served'}", "evaluate.control=true")
    summary = run(recipe)
    assert summary == json.loads((recipe.output_dir / "summary.json").read_text())
    assert summary["losses"]["last"] < summary["losses"]["first"]
    assert summary["steps"] == 4
    assert set(summary["nll"]) == {"qat", "control", "control_rounded", "exported"}
    assert summary["nll"]["qat"] != summary["nll"]["control"]
    # The stand-in for export copies the dense weights, which differ from the quantized ones that the run measured.
    assert summary["nll"]["exported"] != summary["nll"]["qat"]
    (exported,) = recorder.EXPORTS
    assert exported["source"] == recipe.output_dir
    assert exported["scheme"] == "int2-g32"
    assert (exported["format"], exported["exclude"], exported["verify"]) == ("compressed-tensors", ("lm_head",), True)
    shown = capsys.readouterr().out
    assert "trained through quantization (QAT)" in shown
    assert "control, rounded to the scheme (PTQ)" in shown


def test_the_saved_model_is_an_ordinary_checkpoint(load):
    recipe = load()
    run(recipe)
    model, info = AutoModelForCausalLM.from_pretrained(recipe.output_dir, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(load_file(recipe.output_dir / "model.safetensors")) == set(model.state_dict())
    assert AutoTokenizer.from_pretrained(recipe.output_dir).decode([104, 105]) == "hi"
    saved = json.loads((recipe.output_dir / "recipe.json").read_text())
    assert saved["optimizer"]["lr"] == 3e-3


def test_the_same_recipe_repeats_bit_for_bit_and_the_control_sees_the_same_batches(load, tmp_path):
    first = run(load())
    again = run(load(f"trainer.output_dir={tmp_path / 'again'}"))
    assert first["nll"] == again["nll"]
    never = run(load(f"trainer.output_dir={tmp_path / 'dense'}", "quantize=null"))
    control = run(load(f"trainer.output_dir={tmp_path / 'control'}", "evaluate.control=true"))
    assert control["nll"]["control"] == never["nll"]["trained"]
    assert control["nll"]["qat"] == first["nll"]["qat"]


def test_the_schedule_is_applied_before_every_step(load):
    run(load("evaluate=null"))
    assert recorder.QATSchedule.calls == [(2, 1, step) for step in range(4)]


def test_hyper_parameters_reach_the_optimizer(load):
    recipe = load("trainer.optim_args=block_size=128")
    args = finetune.training_arguments(recipe)
    rows, heldout = finetune.load_rows(recipe)
    trainer = finetune.build_trainer(recipe, args, finetune.load_tokenizer(recipe.model), rows, heldout)
    optimizer = trainer.create_optimizer()
    assert type(optimizer).__name__ == "AdamW8bit"
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["block_size"]) == (3e-3, (0.8, 0.95), 1e-7, 128)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    assert len(heldout) == 6


def test_offload_and_torchs_adamw(load, tmp_path):
    for number, change in enumerate((["optimizer.offload=cpu"], ["optimizer.name=adamw"])):
        summary = run(load("evaluate=null", f"trainer.output_dir={tmp_path / str(number)}", *change))
        assert summary["losses"]["last"] < summary["losses"]["first"]


def test_float8(load):
    recipe = load("quantize=null", "float8=rowwise")
    assert "float8 training: converted 7 layers, skipped 1" in describe(recipe)
    rows, heldout = finetune.load_rows(recipe)
    tokenizer = finetune.load_tokenizer(recipe.model)
    trainer = finetune.build_trainer(recipe, finetune.training_arguments(recipe), tokenizer, rows, heldout)
    assert type(trainer.model.model.layers[0].mlp.up_proj) is Float8Linear
    assert type(trainer.model.lm_head) is torch.nn.Linear
    assert set(run(recipe)["nll"]) == {"trained"}


def test_a_pretrained_model_is_measured_before_and_after(load, pretrained):
    summary = run(load(f"model.path={pretrained}", "model.config=null", "model.tokenizer=null"))
    assert set(summary["nll"]) == {"start", "start_rounded", "qat"}
    assert summary["recovered"] is None
    assert summary["recovered_note"] == "needs evaluate.control: true"
    assert summary["nll"]["qat"] < summary["nll"]["start_rounded"]


@pytest.mark.parametrize(
    ("fsdp", "bf16", "dtype", "expected"),
    [
        (True, True, torch.float32, torch.bfloat16),
        (True, True, torch.bfloat16, torch.bfloat16),
        (True, False, torch.float32, torch.float32),
        (False, True, torch.float32, torch.float32),
        (False, True, torch.bfloat16, torch.bfloat16),
    ],
)
def test_layers_get_copies_of_the_weights_under_fsdp_only(load, monkeypatch, fsdp, bf16, dtype, expected):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(fsdp).lower())
    args = dataclasses.replace(finetune.training_arguments(load()), bf16=bf16)
    assert finetune.layer_dtype(args, dtype) == expected


def test_lora_saves_the_adapter_and_the_merged_model_that_was_measured(load, pretrained, tmp_path):
    local = (f"model.path={pretrained}", "model.config=null", "model.tokenizer=null", "lora={r: 4}")
    recipe = load(*local, f"export.path={tmp_path / 'served'}", "quantize.start_step=0", "quantize.anneal_steps=0")
    summary = run(recipe)
    assert (recipe.output_dir / "adapter_model.safetensors").is_file()
    merged = AutoModelForCausalLM.from_pretrained(recipe.output_dir / "merged")
    base = AutoModelForCausalLM.from_pretrained(pretrained)
    before, after = (dict(model.named_parameters()) for model in (base, merged))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert recorder.EXPORTS[0]["source"] == recipe.output_dir / "merged"
    # The grid of the merged weights is the one that training saw.
    prepare_qat(merged, "int2-g32")
    rows, heldout = finetune.load_rows(recipe)
    again = dataclasses.replace(recipe, trainer={**recipe.trainer, "output_dir": str(tmp_path / "again")})
    tokenizer = finetune.load_tokenizer(recipe.model)
    trainer = finetune.build_trainer(again, finetune.training_arguments(again), tokenizer, rows, heldout)
    assert finetune.mean_nll(merged, trainer) == summary["nll"]["qat"]


def test_held_out_rows_are_other_files_and_are_not_trained_on(load):
    train, heldout = finetune.load_rows(load("evaluate.heldout=0.25"))
    assert (len(train), len(heldout)) == (30, 10)
    assert not {row["completion"] for row in train} & {row["completion"] for row in heldout}


def test_local_rows(load, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(8)))
    recipe = load("data.path=json", f"data.data_files={file}", "data.max_rows=6", "data.max_chars=null")
    with pytest.raises(JobError, match=r"evaluate\.heldout: got 6 rows, and there are only 6"):
        finetune.load_rows(recipe)
    train, heldout = finetune.load_rows(load(*["data.path=json", f"data.data_files={file}", "data.max_chars=null"]))
    assert (len(train), len(heldout)) == (2, 6)
    with pytest.raises(JobError, match="data: cannot read 'json', split 'nothing'"):
        finetune.load_rows(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, split="nothing")))


def test_an_interrupted_run_is_not_overwritten_and_continues(load, tmp_path):
    saving = ("trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.max_steps=6", "evaluate=null")
    whole = load(*saving, f"trainer.output_dir={tmp_path / 'whole'}")
    run(whole)
    (tmp_path / "out").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(JobError, match=r"did not finish, up to checkpoint-2; continue it with --trainer.resume_from"):
        run(load(*saving))
    resumed = load(*saving, "trainer.resume_from_checkpoint=true")
    run(resumed)
    want, got = (load_file(folder / "model.safetensors") for folder in (whole.output_dir, resumed.output_dir))
    for name, value in want.items():
        assert_bitwise_equal(got[name], value, what=name)
    with pytest.raises(JobError, match="holds a finished run; remove it or give another"):
        run(load(*saving, "trainer.resume_from_checkpoint=true"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_step=3"], "trainer.max_step: unknown key of trl.SFTConfig; did you mean 'trainer.max_steps'?"),
        (["model.tokenizer=no/such-tokenizer"], "model.tokenizer: no tokenizer in 'no/such-tokenizer'"),
        (["model.config.model_type=lama"], "model.config: "),
        (["model.config.hidden_size=48"], "down_proj [48, 128]"),
        (["quantize.exclude=[lm_head, router]"], "quantize.exclude: 'router' matches no layer; there are"),
        (
            ["quantize.embeddings=true", "export.path=never"],
            "quantize.embeddings: export.format compressed-tensors cannot carry them: transformers 5.23 loads packed",
        ),
        (
            [
                *("quantize.embeddings=true", "export.path=never", "export.format=torchao"),
                "model.config.tie_word_embeddings=true",
            ],
            "quantize.embeddings: the output layer is tied to the embedding",
        ),
    ],
    ids=["trainer key", "tokenizer", "kind of model", "group size", "pattern", "embeddings", "tied embeddings"],
)
def test_mistakes_that_the_libraries_know_have_their_place_too(load, monkeypatch, overrides, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    text = str(caught.value)
    if "hidden_size" in overrides[0]:
        # 48 inputs are not groups of 32; every layer that they reach is named.
        assert text.count("quantize.scheme: ") == 6
        assert "q_proj [48, 48]" in text
    else:
        assert message in text


def test_missing_models_and_tokenizers(load, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"model\.path: no tokenizer in 'no/such-model'"):
        load("model.path=no/such-model", "model.config=null", "model.tokenizer=null")
    with pytest.raises(ConfigError, match=r"model\.path: cannot read the configuration of 'no/such-model'"):
        load("model.path=no/such-model", "model.config=null")
    only_model = tmp_path / "only_model"
    AutoModelForCausalLM.from_pretrained(pretrained).save_pretrained(only_model)
    with pytest.raises(ConfigError, match=r"model.path: no tokenizer in .*only_model.*or model.tokenizer: byte"):
        load(f"model.path={only_model}", "model.config=null", "model.tokenizer=null")


def test_lora_targets_that_the_model_does_not_have(load, pretrained):
    local = (f"model.path={pretrained}", "model.config=null", "model.tokenizer=null")
    with pytest.raises(ConfigError, match=r"lora\.targets: 'q_pro' is no layer of the model; did you mean 'q_proj'"):
        load(*local, "lora={targets: [q_pro, v_proj]}")


def test_fsdp_that_accelerate_would_not_do_is_an_error(load, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(JobError, match=r"FSDP was asked for, but .* as LlamaForCausalLM on cpu"):
        run(load())
