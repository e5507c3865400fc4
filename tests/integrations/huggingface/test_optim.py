"""Our optimizers in transformers' Trainer: names, options, groups, scaler, offload and resumption."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="needs the [hf] extra: pip install -e '.[hf]'")

from transformers import Trainer

from aotrain import optim
from aotrain.integrations.huggingface import optimizer_cls_and_kwargs
from aotrain.integrations.optimizers import OPTIMIZERS
from aotrain.optim import AdamW8bit, CPUOffloadOptimizer
from aotrain.testing import assert_bitwise_equal
from tests.integrations.huggingface.tiny import arguments, losses, tiny_llama, token_rows, trainer


def created(name, args, model=None, **options):
    """What the Trainer makes of it, with the Trainer's own code."""
    chosen = optimizer_cls_and_kwargs(name, args, **options)
    return Trainer(model or tiny_llama(), args, optimizer_cls_and_kwargs=chosen).create_optimizer()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_the_table_trains(name: str, tmp_path):
    rate = 3e-4 if name.startswith("lion") else 3e-3
    trained = trainer(name, arguments(tmp_path, learning_rate=rate))
    trained.train()
    assert type(trained.optimizer.optimizer) is getattr(optim, OPTIMIZERS[name])
    assert losses(trained)[-1] < losses(trained)[0]


def test_hyperparameters_are_those_of_the_training_arguments(tmp_path):
    args = arguments(tmp_path, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.2)
    for name in ("adamw_8bit", "lion_8bit"):
        for group in created(name, args).param_groups:
            assert (group["lr"], group["betas"]) == (3e-3, (0.8, 0.95))
            assert group.get("eps", 1e-6) == 1e-6


def test_decayed_parameters_are_the_trainers(tmp_path):
    args, model = arguments(tmp_path), tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    names = {id(param): name for name, param in model.named_parameters()}

    def decay_by_name(optimizer):
        groups = optimizer.param_groups
        return {names[id(param)]: group["weight_decay"] for group in groups for param in group["params"]}

    want = decay_by_name(Trainer(model, args).create_optimizer())
    ours = created("adamw_8bit", args, model)
    assert decay_by_name(ours) == want
    assert set(want.values()) == {0.1, 0.0}
    for group in ours.param_groups:
        assert group["param_names"] == [names[id(param)] for param in group["params"]]


def test_embeddings_are_in_32_bits_unless_told_otherwise(tmp_path):
    def bits_by_name(optim_args="", bits=None, tied=False):
        args = arguments(tmp_path, optim_args=optim_args)
        groups = created("adamw_8bit", args, tiny_llama(tied), bits=bits).param_groups
        return {name: group["bits"] for group in groups for name in group["param_names"]}

    by_default = bits_by_name()
    assert {name for name, bits in by_default.items() if bits == 32} == {"model.embed_tokens.weight"}
    assert set(by_default.values()) == {8, 32}
    assert "lm_head.weight" not in bits_by_name(tied=True)
    assert set(bits_by_name("embedding_bits=own").values()) == {8}
    assert bits_by_name("bits=4, embedding_bits=fp8") == {name: "fp8" if "embed" in name else 4 for name in by_default}
    assert bits_by_name(bits={"lm_head": 32})["lm_head.weight"] == 32


def test_options_reach_the_optimizer(tmp_path):
    text = "block_size=128, bf16_stochastic_round=true,seed=7,amsgrad=1,maximize=False"
    want = {"block_size": 128, "bf16_stochastic_round": True, "seed": 7, "amsgrad": True, "maximize": False}
    for group in created("adamw_8bit", arguments(tmp_path, optim_args=text)).param_groups:
        assert {key: group[key] for key in want} == want


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("adamw_8bit", "blocksize=128", r"unknown key 'blocksize' for adamw_8bit; .*did you mean 'block_size'"),
        ("adamw_8bit", "block_size=wide", "block_size: got 'wide', want a whole number"),
        ("adamw_8bit", "block_size=0", "block_size: got '0', want at least 1"),
        ("adamw_8bit", "block_size", "got 'block_size', want key=value,key=value"),
        ("adamw_8bit", "seed=1,seed=2", "seed is given twice"),
        ("adamw_8bit", "offload=maybe", "offload: got 'maybe', want true or false"),
        ("adamw_8bit", "bits=3", r"bits: Invalid bits: '3'; want one of 8, 4, 'fp8', 32"),
        ("adamw_8bit", "lr=1", r"lr is set by TrainingArguments\(learning_rate"),
        ("adamw_8bit", "betas=0.9", r"betas is set by TrainingArguments\(adam_beta1"),
        ("lion_8bit", "amsgrad=true", "unknown key 'amsgrad' for lion_8bit"),
        ("adamw_9bit", "", r"unknown optimizer 'adamw_9bit'; want one of adamw_8bit.*did you mean 'adamw_8bit'"),
        (
            None,
            "",
            r"TrainingArguments\.optim: unknown optimizer 'adamw_torch_fused'.*optimizer_cls_and_kwargs\('adamw",
        ),
        ("paged_adamw_8bit", "", "not paged here"),
    ],
)
def test_mistakes_are_named_before_training(name, text: str, message: str, tmp_path):
    with pytest.raises(ValueError, match=message):
        optimizer_cls_and_kwargs(name, arguments(tmp_path, optim="adamw_torch_fused", optim_args=text))


def test_a_pattern_that_matches_nothing_is_named_where_the_model_is_known(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match=r"'experts' matches no trainable parameter; the model has model\.embed_tok"):
        optimizer_cls_and_kwargs("adamw_8bit", args, bits={"experts": 32}, model=tiny_llama())
    with pytest.raises(ValueError, match="'experts' matches no trainable parameter"):
        created("adamw_8bit", args, bits={"experts": 32})


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_torch_8bit", "adamw_torch_4bit", "adamw_bnb_8bit", "lion_8bit"])
def test_name_can_come_from_the_training_arguments(name: str, tmp_path):
    optimizer = created(None, arguments(tmp_path, optim=name))
    assert type(optimizer).__name__.lower() == name.replace("torch_", "").replace("bnb_", "").replace("_", "")


@pytest.mark.parametrize("optim_args", ["", "offload=true", "bits=4,bf16_stochastic_round=true"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(optim_args: str, tmp_path):
    options = {"optim_args": optim_args, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.5}
    whole = trainer("adamw_8bit", arguments(tmp_path / "whole", **options))
    whole.train()
    resumed = trainer("adamw_8bit", arguments(tmp_path / "resumed", **options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for name, value in whole.model.state_dict().items():
        assert_bitwise_equal(resumed.model.state_dict()[name], value, what=name)
    got, want = (run.optimizer.state_dict()["state"] for run in (resumed, whole))
    assert got.keys() == want.keys()
    assert any("exp_avg_codes" in entry for entry in want.values())
    for index, entry in want.items():
        for key, value in entry.items():
            assert_bitwise_equal(got[index][key], value, what=f"{index} {key}")


def test_offload_trains_to_the_same_bits(tmp_path):
    runs = []
    for optim_args in ("", "offload=true"):
        run = trainer("adamw_8bit", arguments(tmp_path, optim_args=optim_args, gradient_accumulation_steps=2))
        run.train()
        runs.append(run)
    assert type(runs[1].optimizer.optimizer) is CPUOffloadOptimizer
    assert runs[1].optimizer.optimizer.optimizer_class is AdamW8bit
    assert losses(runs[0]) == losses(runs[1])


def test_offload_under_fsdp2_is_refused(tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    args = arguments(tmp_path, optim_args="offload=true")
    monkeypatch.setattr(AcceleratorState, "is_fsdp2", property(lambda self: True))
    with pytest.raises(ValueError, match=r"offload=true does not work .* FSDP2 .*offload_params"):
        created("adamw_8bit", args)


@pytest.mark.parametrize("optim_args", ["", "offload=true"])
def test_gradient_scaler(optim_args: str, tmp_path):
    """Accelerate's wrapper and torch's scaler: a step with an infinite gradient is left out."""
    from accelerate.optimizer import AcceleratedOptimizer

    results = []
    for initial_scale in (None, 2.0**120, 2.0**3):
        model = tiny_llama()
        scaler = None if initial_scale is None else torch.amp.GradScaler("cpu", init_scale=initial_scale)
        plain = created("adamw_8bit", arguments(tmp_path, optim_args=optim_args), model)
        optimizer = AcceleratedOptimizer(plain, device_placement=False, scaler=scaler)
        before = copy.deepcopy(model.state_dict())
        row = torch.stack([row["input_ids"] for row in token_rows(8)])
        loss = model(input_ids=row, labels=row).loss * (1e10 if initial_scale == 2.0**120 else 1.0)
        (scaler.scale(loss) if scaler else loss).backward()
        optimizer.step()
        skipped = all(value.equal(before[name]) for name, value in model.state_dict().items())
        assert optimizer.step_was_skipped == skipped == (initial_scale == 2.0**120)
        results.append(model.state_dict())
    # A power of two changes no bit of a gradient.
    for name, value in results[0].items():
        assert_bitwise_equal(results[2][name], value, what=name)
