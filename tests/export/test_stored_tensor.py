"""Tensors are read from a file by rows as the library reads them whole."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from aotrain.export.safetensors_writer import DTYPE_NAMES
from aotrain.export.stored_tensor import stored_tensors


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_every_dtype_and_rank_by_rows_and_by_parts(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "no columns": torch.empty(3, 0)}
    for index, dtype in enumerate(DTYPE_NAMES):
        data = torch.randint(0, 2, (5, 2, 3 * dtype.itemsize), dtype=torch.uint8, generator=generator)
        tensors[f"t{index}"] = data.view(dtype)
    tensors["large"] = torch.randn(700, 1000, generator=generator)
    save_file(tensors, tmp_path / "x.safetensors")
    expected, stored = load_file(tmp_path / "x.safetensors"), stored_tensors(tmp_path / "x.safetensors")
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (stored[name].shape, stored[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert stored[name].nbytes == tensor.nbytes
        parts = list(stored[name].parts())
        together = torch.cat([_bytes(part) for part in parts]) if parts else torch.empty(0, dtype=torch.uint8)
        assert torch.equal(together, _bytes(tensor)), name
        if tensor.dim():
            assert stored[name][1:3].shape == tensor[1:3].shape
            assert torch.equal(_bytes(stored[name][1:3]), _bytes(tensor[1:3])), name
    assert len(list(stored["large"].parts())) == 6


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"x": torch.ones(64, 64)}, tmp_path / "x.safetensors")
    tensor = stored_tensors(tmp_path / "x.safetensors")["x"]
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match="shorter"):
        tensor[:]
