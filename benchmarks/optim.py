"""Optimizer steps on a list of matrices, ours beside torch's and whatever peers are installed."""

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from aotrain import optim
from benchmarks.case import Case

# One Llama-like block at 1/4 of the 8B model's width: 13.6 M parameters.
CPU_SHAPES = ((1024, 1024), (256, 1024), (256, 1024), (1024, 1024), (3584, 1024), (3584, 1024), (1024, 3584))
# The 1B model: 16 layers of width 2048.
GPU_SHAPES = 16 * ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192))


def optimizers() -> dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]]:
    """Name -> constructor of every optimizer that can be measured here."""
    found: dict[str, Any] = {
        f"aotrain-{name}": getattr(optim, name) for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8", "AdamW32bit")
    }
    found["torch-AdamW-fused"] = lambda params: torch.optim.AdamW(params, fused=True)
    found["torch-AdamW-foreach"] = lambda params: torch.optim.AdamW(params, foreach=True)
    if importlib.util.find_spec("torchao"):
        from torchao.optim import AdamW8bit

        found["torchao-AdamW8bit"] = AdamW8bit
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit

        found["bitsandbytes-AdamW8bit"] = AdamW8bit
    return found


def optim_cases(device: torch.device) -> Iterator[Case]:
    """One step of each optimizer over all matrices, float32 and bfloat16, and the bandwidth ceiling."""
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    yield _copy(device)
    for dtype in (torch.float32, torch.bfloat16):
        for name, make in optimizers().items():
            params = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
            for param in params:
                param.grad = torch.randn_like(param) * 1e-2
            optimizer = make(params)
            start = time.perf_counter()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            first_ms = (time.perf_counter() - start) * 1e3
            yield _case(f"{name}-{str(dtype).removeprefix('torch.')}", params, optimizer, first_ms)


def _copy(device: torch.device) -> Case:
    x = torch.zeros(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.ones_like(x)

    def check() -> None:
        target.copy_(x)
        assert not target.any(), "a copy differs"

    shape = f"{x.numel() / 1e6:.1f}M"
    return Case(name="copy", shape=shape, run=lambda: target.copy_(x), check=check, bytes_moved=8 * x.numel())


def _case(name: str, params: list[torch.Tensor], optimizer: torch.optim.Optimizer, first_ms: float) -> Case:
    numel = sum(param.numel() for param in params)

    def check() -> None:
        assert all(bool(param.isfinite().all()) for param in params), "a parameter is not finite"

    # Parameter and state are read and written, the gradient is read.
    state_bytes = sum(_bytes(value) for state in optimizer.state.values() for value in state.values())
    moved = sum(3 * _bytes(param) for param in params) + 2 * state_bytes
    return Case(
        name=name,
        shape=f"{numel / 1e6:.1f}M",
        run=optimizer.step,
        check=check,
        bytes_moved=moved,
        elements=numel,
        bytes_kept=state_bytes,
        first_ms=first_ms,
    )


def _bytes(value: Any) -> int:
    """Bytes of a tensor, or of the tensors inside another library's state."""
    if not isinstance(value, torch.Tensor):
        return 0
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return value.numel() * value.element_size()
    inner, _ = value.__tensor_flatten__()
    return sum(_bytes(getattr(value, name)) for name in inner)
