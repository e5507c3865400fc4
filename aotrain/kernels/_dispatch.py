"""What every op's CUDA implementation needs: can Triton run here, and saying so once when it cannot."""

import functools
import importlib.util
import warnings

import torch

# The first compute capability that Triton compiles float8 e4m3 for, and any of this package's kernels.
FLOAT8_CAPABILITY = (8, 9)
MIN_CAPABILITY = (8, 0)


def triton_problem(device: torch.device, capability: tuple[int, int] = FLOAT8_CAPABILITY) -> str | None:
    """Why a Triton kernel that needs this compute capability cannot run on the device; None when it can.

    A CPU device has no problem: there the kernels run under Triton's interpreter, which only tests ask for.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type != "cuda":
        return None
    return _cuda_problem(device.index if device.index is not None else torch.cuda.current_device(), capability)


@functools.lru_cache(maxsize=64)
def _cuda_problem(index: int, needed: tuple[int, int]) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are not tested on ROCm yet"
    capability = torch.cuda.get_device_capability(index)
    if capability < needed:
        name = torch.cuda.get_device_name(index)
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]}, the kernel needs {needed[0]}.{needed[1]}"
        )
    return None


@functools.lru_cache(maxsize=256)
def warn_slow(op: str, reason: str) -> None:
    """Warn, once per op and reason, that a GPU tensor takes the plain-torch implementation."""
    warnings.warn(
        f"aotrain::{op} runs its plain PyTorch implementation on this GPU, with the same result but several times "
        f"slower than a fused kernel: {reason}.",
        stacklevel=3,
    )
