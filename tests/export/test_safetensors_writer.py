"""Files written tensor by tensor are read by the library as it reads its own."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from aotrain.export.safetensors_writer import DTYPE_NAMES, SafetensorsWriter


def test_every_dtype_in_any_order_and_alignment(tmp_path):
    """Odd sizes in between would put the next tensor out of step."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index, dtype in enumerate(DTYPE_NAMES):
        for count in (1, 3, 64):
            data = torch.randint(0, 2, (count, dtype.itemsize), dtype=torch.uint8, generator=generator)
            tensors[f"t{index}.{count}"] = data.view(dtype).squeeze(1)
    tensors["scalar"] = torch.tensor(3.0)
    tensors["empty"] = torch.empty(0, 4)
    tensors["strided"] = torch.arange(12.0).reshape(3, 4).t()
    with SafetensorsWriter(tmp_path / "x.safetensors", tensors, {"format": "pt", "name": "\u00e4"}) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        expected = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), expected), name
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "name": "\u00e4"}


def test_a_file_without_tensors(tmp_path):
    with SafetensorsWriter(tmp_path / "x.safetensors", [], {}):
        pass
    assert load_file(tmp_path / "x.safetensors") == {}


def test_an_error_leaves_no_readable_file(tmp_path):
    with pytest.raises(KeyError), SafetensorsWriter(tmp_path / "x.safetensors", ["a"], {}) as file:  # noqa: PT012
        file.add("a", torch.ones(4))
        raise KeyError
    with pytest.raises(Exception, match="header"):
        load_file(tmp_path / "x.safetensors")


def test_rows_of_several_tensors_in_turns(tmp_path):
    wide, late = torch.arange(24.0).reshape(4, 6), torch.arange(12, dtype=torch.int8).reshape(4, 3)
    with SafetensorsWriter(tmp_path / "x.safetensors", ["wide", "late", "next"], {}) as file:
        file.begin("late", late.dtype, late.shape)
        file.begin("wide", wide.dtype, wide.shape)
        for row in range(4):
            file.append("wide", wide[row : row + 1])
            file.append("late", late[row : row + 1])
            if row == 1:
                file.add("next", wide.t())
    loaded = load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded["wide"], wide)
    assert torch.equal(loaded["late"], late)
    assert torch.equal(loaded["next"], wide.t())


@pytest.mark.parametrize("rows", [1, 3])
def test_a_tensor_with_too_few_or_too_many_rows_is_no_file(tmp_path, rows: int):
    with (  # noqa: PT012  (appending finds too many, closing too few)
        pytest.raises(AssertionError, match=r"x (misses|has too many) rows"),
        SafetensorsWriter(tmp_path / "x.safetensors", ["x"], {}) as file,
    ):
        file.begin("x", torch.float32, (2, 4))
        file.append("x", torch.ones(rows, 4))
