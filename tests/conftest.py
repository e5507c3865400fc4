"""Session set-up: Triton's interpreter, GPU selection, fixed seeds, and uninitialized memory made visible.

`pytest` runs every kernel under Triton's CPU interpreter, with or without a GPU. `pytest -m gpu` runs the GPU tests,
and only them, with the real compiler. Both modes cannot share a process: Triton decides when a kernel is decorated.
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

_FLOAT8_NAN_CODE = 0x7F


def pytest_configure(config: pytest.Config) -> None:
    # Before collection imports a kernel module: @triton.jit reads the variable at decoration. Tests that compile ahead
    # of time start a process without it.
    if config.getoption("-m") == "gpu":
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    # Two threads that spin on a busy machine are 20 times slower than one.
    torch.set_num_threads(1)
    # Two tables of torch functions are made on first use, which must not happen while torch.empty is replaced:
    # Dynamo's, whose import loads triton and so comes after the variable above, and the one behind
    # `with torch.device("meta")`, without which meta models would be allocated for real.
    from torch._dynamo import trace_rules

    trace_rules.get_torch_obj_rule_map()
    _device_constructors()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; its interpreter twin ran instead"))
    elif os.environ.get("TRITON_INTERPRET") == "1":
        # Interpreted kernels would make these pass without testing the GPU.
        config.hook.pytest_deselected(items=gpu_items)
        items[:] = [item for item in items if item not in gpu_items]


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that aotrain allocates without initializing holds NaN (or a large integer), so reading it shows."""
    monkeypatch.setattr(torch, "empty", _poisoning(torch.empty, traceable=_traceable_empty))
    monkeypatch.setattr(torch, "empty_like", _poisoning(torch.empty_like, traceable=torch.ops.aten.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty, traceable=_traceable_new_empty))


@pytest.fixture
def interpreter() -> Iterator[None]:
    """Triton's CPU interpreter with correct float8 and bfloat16 arithmetic."""
    from aotrain.testing.interpreter import corrected_interpreter

    with corrected_interpreter():
        yield


def _poisoning(
    allocate: Callable[..., torch.Tensor], traceable: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_dynamo_compiling():  # frame inspection breaks a graph, a fill would be recorded in it
            return traceable(*args, **kwargs)
        result = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        ours = caller.startswith("aotrain.") and not caller.startswith("aotrain.testing.")
        if ours and type(result) is torch.Tensor and not result.is_meta:
            _poison(result)
        return result

    return allocate_poisoned


# For Dynamo: aten ops, which it knows by themselves. It knows torch.empty by its place in the module, which is taken
# here whenever a test resets Dynamo's tables, and cannot call Tensor.new_empty through its descriptor.


def _traceable_empty(*size: Any, **kwargs: Any) -> torch.Tensor:
    return torch.ops.aten.empty(_shape(size), **kwargs)


def _traceable_new_empty(x: torch.Tensor, *size: Any, **kwargs: Any) -> torch.Tensor:
    return torch.ops.aten.new_empty(x, _shape(size), **kwargs)


def _shape(size: tuple[Any, ...]) -> Any:
    return size[0] if len(size) == 1 and not isinstance(size[0], int) else size


def _poison(x: torch.Tensor) -> None:
    with torch.no_grad():
        if x.dtype.is_floating_point and x.element_size() == 1:
            x.view(torch.uint8).fill_(_FLOAT8_NAN_CODE)
        elif x.dtype.is_floating_point or x.dtype.is_complex:
            x.fill_(float("nan"))
        elif x.dtype != torch.bool:
            x.fill_(torch.iinfo(x.dtype).max)
