"""Trainer checkpoints of other optimizers, continued with ours."""

import hashlib

import pytest
import torch

pytest.importorskip("transformers", reason="needs the [hf] extra: pip install -e '.[hf]'")

from transformers import Trainer

from aotrain.integrations.huggingface import convert_trainer_checkpoint
from tests.integrations.huggingface.tiny import arguments, losses, tiny_llama, token_rows, trainer

# Of the loss after one step in other formats. Measured: 32 bits 0, 8 bits up to 1.2e-5, 4 bits up to 6.5e-4.
MAX_DRIFT = {"adamw_32bit": 1e-6, "adamw_8bit": 1e-4, "adamw_4bit": 2e-3}

PEERS = {"adamw_bnb_8bit": "bitsandbytes", "adamw_torch_8bit": "torchao"}


def run_of_another(folder, optim: str) -> Trainer:
    args = arguments(folder, save_strategy="steps", save_steps=2, optim=optim)
    theirs = Trainer(tiny_llama(), args, train_dataset=token_rows())
    theirs.train()
    return theirs


def continued(source, target, name: str, **options) -> list[float]:
    ours = trainer(name, arguments(target.parent / "ours"), **options)
    convert_trainer_checkpoint(source, target, ours)
    ours.train(resume_from_checkpoint=str(target))
    return losses(ours)


@pytest.mark.parametrize("name", MAX_DRIFT)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit", "adamw_torch_8bit"])
def test_a_run_goes_on_in_another_optimizer(name: str, optim: str, tmp_path):
    if optim in PEERS:
        pytest.importorskip(PEERS[optim], reason=f"a peer: pip install {PEERS[optim]}")
    # torchao compiles its step for seconds; what it computes is the same.
    with torch.compiler.set_stance("force_eager"):
        theirs = losses(run_of_another(tmp_path, optim))
    source = tmp_path / "checkpoint-2"
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in source.iterdir()}
    ours = continued(source, tmp_path / "converted", name)
    # The loss of a step is that of the weights before it: only the last one has seen a step from converted state.
    assert ours[:3] == theirs[:3]
    assert ours[3] == pytest.approx(theirs[3], rel=MAX_DRIFT[name])
    assert {path.name: hashlib.sha256(path.read_bytes()).digest() for path in source.iterdir()} == before


def test_ours_goes_on_with_other_options(tmp_path):
    began = trainer("adamw_8bit", arguments(tmp_path, save_strategy="steps", save_steps=2))
    began.train()
    ours = continued(tmp_path / "checkpoint-2", tmp_path / "converted", "adamw_8bit", bits={"proj": 32})
    assert ours[:3] == losses(began)[:3]


def test_mistakes_are_named_and_leave_nothing_behind(tmp_path):
    theirs = run_of_another(tmp_path, "adamw_torch")
    source, target = tmp_path / "checkpoint-2", tmp_path / "converted"
    with pytest.raises(ValueError, match=r"optimizer_cls_and_kwargs=None; want .*'adamw_8bit'"):
        convert_trainer_checkpoint(source, target, theirs)
    ours = trainer("adamw_8bit", arguments(tmp_path / "ours"))
    with pytest.raises(FileNotFoundError, match=r"optimizer\.pt"):
        convert_trainer_checkpoint(tmp_path / "checkpoint-3", target, ours)
    ours.model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"groups of \[9, 3\] parameters, want \[8, 3\]"):
        convert_trainer_checkpoint(source, target, ours)
    ours.model.lm_head.requires_grad_(True)
    schedule = torch.load(source / "scheduler.pt", weights_only=True)
    torch.save(schedule | {"base_lrs": [1e-3, 1e-4]}, source / "scheduler.pt")
    with pytest.raises(ValueError, match=r"different base_lrs for its groups, \[0\.001, 0\.0001\]"):
        convert_trainer_checkpoint(source, target, ours)
    assert not target.exists()
    torch.save(schedule, source / "scheduler.pt")
    convert_trainer_checkpoint(source, target, ours)
    with pytest.raises(FileExistsError):
        convert_trainer_checkpoint(source, target, ours)
