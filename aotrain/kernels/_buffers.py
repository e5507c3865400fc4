"""Memory for large tensors on a CPU that live for a moment, once per layer and step.

malloc returns such memory to the operating system when it is freed, or hands it to a smaller block; the next tensor of
that size touches new pages, which costs more than a pass over it. Here, the last blocks of a thread are kept and given
out again once nothing refers to them. What is kept is bounded, and freed when the thread ends.

A tensor from here is like any other: whoever holds on to it has it for as long as he does.
"""

import math
import threading

import torch

# Smaller tensors lie in memory that malloc keeps; larger ones are few, and would be much to keep.
SMALLEST_BYTES, LARGEST_BYTES = 2**18, 2**25
# The values of a weight and of an input are there at the same time.
MOST_BLOCKS = 2


class _Blocks(threading.local):
    def __init__(self) -> None:
        self.storages: list[torch.UntypedStorage] = []  # the one used last comes last


_BLOCKS = _Blocks()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty(shape, dtype=dtype, device="cpu")`, perhaps in a block that was used before."""
    tensor = torch.empty(0, dtype=dtype, device="cpu")
    size = math.prod(shape) * dtype.itemsize
    if not SMALLEST_BYTES <= size <= LARGEST_BYTES:
        return tensor.resize_(shape)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return tensor.set_(_take(size), 0, shape, strides)  # pyrefly: ignore[no-matching-overload]


def _take(size: int) -> torch.UntypedStorage:
    """A block of at least this size, and at most twice as large, that nobody refers to."""
    storages = _BLOCKS.storages
    free = [i for i, each in enumerate(storages) if torch._C._storage_Use_Count(each._cdata) == 1]
    fitting = [i for i in free if size <= storages[i].nbytes() <= 2 * size]
    if fitting:
        storage = storages.pop(fitting[-1])
    else:
        if len(storages) == MOST_BLOCKS:
            storages.pop(free[0] if free else 0)
        storage = torch.UntypedStorage(size, device="cpu")
    storages.append(storage)
    return storage
