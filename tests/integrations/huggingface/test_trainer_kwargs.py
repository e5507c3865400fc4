"""What a recipe adds to a Trainer that somebody else builds."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs the [hf] extra: pip install -e '.[hf]'")

from transformers import Trainer

from aotrain.integrations.finetune import Data, Model, Optimizer, Quantize, Recipe
from aotrain.integrations.huggingface import trainer_kwargs
from aotrain.integrations.huggingface.callbacks import QATCallback
from aotrain.optim import AdamW8bit
from aotrain.qat import prepare_qat
from tests.integrations.huggingface import recorder
from tests.integrations.huggingface.tiny import arguments, losses, tiny_llama, token_rows


@pytest.fixture(autouse=True)
def _recorders(monkeypatch):
    recorder.install(monkeypatch)


def recipe(name: str, quantize: Quantize | None = None, **trainer) -> Recipe:
    return Recipe(
        model=Model(path="some/model"),
        data=Data(path="some/rows"),
        optimizer=Optimizer(name=name, lr=2e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2),
        quantize=quantize,
        trainer={"output_dir": "out", **trainer},
    )


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit", "adamw"])
def test_hyper_parameters_are_copied_for_those_who_build_the_trainer(name: str, tmp_path):
    args = arguments(tmp_path, learning_rate=2e-3, weight_decay=0.2)
    made = Trainer(tiny_llama(), args, **trainer_kwargs(recipe(name))).create_optimizer()
    for group in made.param_groups:
        assert (group["lr"], group["betas"], group.get("eps", 1e-6)) == (2e-3, (0.8, 0.95), 1e-6)
    assert {group["weight_decay"] for group in made.param_groups} == {0.2, 0.0}
    if name == "adamw":
        assert type(made) is torch.optim.AdamW


def test_a_prepared_model_in_a_plain_trainer(tmp_path):
    wanted = recipe("adamw_8bit", Quantize(scheme="int4-g32", start_step=1, anneal_steps=2), optim_args="seed=3")
    model = tiny_llama()
    prepare_qat(model, wanted.quantize.scheme)
    extra = trainer_kwargs(wanted)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=token_rows(), **extra)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is AdamW8bit
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert [type(callback) for callback in extra["callbacks"]] == [QATCallback]
    assert recorder.QATSchedule.calls == [(1, 2, step) for step in range(4)]


def test_options_are_checked():
    with pytest.raises(ValueError, match="unknown key 'blocksize'"):
        trainer_kwargs(recipe("adamw_8bit", optim_args="blocksize=3"))
