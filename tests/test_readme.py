"""Every Python snippet of the README runs as it stands, in order, in one namespace."""

import re
from pathlib import Path

import pytest
import torch

from aotrain import conversion_report
from aotrain.nn import Float8Linear

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_python_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(SNIPPETS) == 9
    namespace: dict = {}
    exec(SNIPPETS[0], namespace)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert isinstance(namespace["model"][0], Float8Linear)
    exec(SNIPPETS[1], namespace)
    assert "converted 2 layers" in capsys.readouterr().out
    assert not isinstance(namespace["model"][0], Float8Linear)
    exec(SNIPPETS[2], namespace)
    assert all(bool(param.grad.isfinite().all()) for param in namespace["model"].parameters())
    exec(SNIPPETS[3], namespace)
    assert type(namespace["layer"]["router"]) is torch.nn.Linear
    assert conversion_report(namespace["layer"]).converted == ("shared",)
    assert all(bool(param.grad.isfinite().all()) for param in namespace["layer"]["experts"].parameters())
    exec(SNIPPETS[4], namespace)
    assert (tmp_path / "optimizer.pt").is_file()
    exec(SNIPPETS[5], namespace)
    assert {group["bits"] for group in namespace["optimizer"].param_groups} == {4, 8}
    assert all(float(state["step"]) == 3 for state in namespace["optimizer"].state.values())
    before = namespace["model"][0].weight.detach().clone()
    exec(SNIPPETS[6], namespace)
    assert not namespace["model"][0].weight.equal(before)
    exec(SNIPPETS[7], namespace)
    assert "train_loss" in capsys.readouterr().out
    exec(SNIPPETS[8], namespace)
    assert capsys.readouterr().out.splitlines()[-1] == "True"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:configs|docs|aotrain|tests)/[a-z0-9_/]+\.\w+", README))))
def test_files_it_names_exist(path: str):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", re.findall(r"^\| `(\w+_(?:cpu|\d+x\w+))` \|", README, flags=re.MULTILINE))
def test_jobs_it_lists_are_shipped(name: str):
    assert (ROOT / "configs" / "pretrain" / f"{name}.yaml").is_file()
