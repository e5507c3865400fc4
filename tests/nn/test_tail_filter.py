"""keep_tail_layers on models whose blocks are a list, a dictionary, or a sequence."""

import pytest
import torch

from aotrain.nn import keep_tail_layers


class Model(torch.nn.Module):
    def __init__(self, blocks: int, container: str = "list") -> None:
        super().__init__()
        self.embed = torch.nn.Linear(8, 8)
        children = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)) for _ in range(blocks)]
        if container == "dict":
            self.layers = torch.nn.ModuleDict({str(i): child for i, child in enumerate(children)})
        else:
            self.layers = torch.nn.ModuleList(children) if container == "list" else torch.nn.Sequential(*children)
        self.norm = torch.nn.LayerNorm(8)
        self.lm_head = torch.nn.Linear(8, 8)


def accepted(model: torch.nn.Module, module_filter_fn) -> set[str]:
    linears = {name: mod for name, mod in model.named_modules() if isinstance(mod, torch.nn.Linear)}
    return {name for name, mod in linears.items() if module_filter_fn(mod, name)}


def of_blocks(*blocks: int) -> set[str]:
    return {f"layers.{block}.{i}" for block in blocks for i in range(2)}


@pytest.mark.parametrize("container", ["list", "dict", "sequential"])
def test_the_last_blocks_and_what_follows_are_kept(container: str) -> None:
    model = Model(12, container)
    # 15 % of 12 blocks are 1.8
    assert accepted(model, keep_tail_layers(model)) == {"embed", *of_blocks(*range(10))}
    assert accepted(model, keep_tail_layers(model, 1)) == {"embed", *of_blocks(*range(11))}
    assert accepted(model, keep_tail_layers(model, 0)) == {"embed", *of_blocks(*range(12))}
    assert accepted(model, keep_tail_layers(model, 0.5, first=2)) == {"embed", *of_blocks(2, 3, 4, 5)}


def test_another_filter_must_agree() -> None:
    model = Model(4)
    kept = keep_tail_layers(model, 1, module_filter_fn=lambda mod, fqn: fqn.startswith("layers") and fqn.endswith("1"))
    assert accepted(model, kept) == {f"layers.{block}.1" for block in range(3)}


def test_names_are_not_confused_with_longer_ones() -> None:
    model = Model(12)
    assert accepted(model, keep_tail_layers(model, 10)) == {"embed", *of_blocks(0, 1)}


def test_the_model_may_be_the_list_of_blocks() -> None:
    blocks = Model(4).layers
    assert accepted(blocks, keep_tail_layers(blocks, 1)) == {f"{block}.{i}" for block in range(3) for i in range(2)}


@pytest.mark.parametrize(("tail", "first"), [(4, 0), (0.99, 0), (2, 2), (-1, 0), (1, -1)])
def test_something_must_be_left(tail: float, first: int) -> None:
    with pytest.raises(ValueError, match="4 blocks"):
        keep_tail_layers(Model(4), tail, first=first)


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match="found no ModuleList"):
        keep_tail_layers(torch.nn.Linear(4, 4))
