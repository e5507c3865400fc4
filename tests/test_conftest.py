"""The poisoning of uninitialized memory that the whole suite relies on."""

import os
from types import FunctionType

import pytest
import torch


def _as_if_in(module: str, function: FunctionType) -> FunctionType:
    """The function with the globals of a module of that name."""
    return FunctionType(function.__code__, {**function.__globals__, "__name__": module})


def _allocate(dtype: torch.dtype) -> list[torch.Tensor]:
    base = torch.zeros(3, dtype=dtype)
    return [torch.empty(3, dtype=dtype), torch.empty_like(base), base.new_empty(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_uninitialized_floats_of_aotrain_are_nan(dtype: torch.dtype) -> None:
    for x in _as_if_in("aotrain.kernels.something", _allocate)(dtype):
        assert x.float().isnan().all()


def test_uninitialized_integers_of_aotrain_are_large() -> None:
    for x in _as_if_in("aotrain.kernels.something", _allocate)(torch.uint8):
        assert (x == 255).all()


def test_aotrain_code_can_still_be_compiled_in_one_graph() -> None:
    fill = _as_if_in("aotrain.kernels.something", lambda x: torch.empty_like(x).copy_(x) + x.new_empty(3).fill_(1.0))
    compiled = torch.compile(fill, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(3)), torch.ones(3))


def test_kernels_are_interpreted() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
