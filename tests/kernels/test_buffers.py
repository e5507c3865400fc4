"""Reused memory: never of a tensor that somebody holds, and only so much of it."""

import threading

import pytest
import torch

from aotrain.kernels import _buffers
from aotrain.kernels._buffers import LARGEST_BYTES, MOST_BLOCKS, SMALLEST_BYTES, empty


@pytest.fixture(autouse=True)
def _no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_buffers, "_BLOCKS", _buffers._Blocks())


def block(size: int = SMALLEST_BYTES) -> torch.Tensor:
    return empty((size // 128, 64), torch.bfloat16)


def test_a_free_block_is_used_again_and_one_that_is_held_never():
    first = block()
    assert first.shape == (SMALLEST_BYTES // 128, 64)
    assert first.dtype == torch.bfloat16
    assert first.is_contiguous()
    at = first.data_ptr()
    part = first[1:]
    del first
    second = block()
    assert second.untyped_storage().data_ptr() != part.untyped_storage().data_ptr() == at
    del part
    other = empty((SMALLEST_BYTES // 4,), torch.float32)
    assert other.data_ptr() == at


def test_any_number_can_be_held():
    held = [block().fill_(i) for i in range(2 * MOST_BLOCKS)]
    assert len({each.data_ptr() for each in held}) == len(held)
    assert [float(each.max()) for each in held] == [float(each.min()) for each in held] == [*range(len(held))]
    assert len(_buffers._BLOCKS.storages) == MOST_BLOCKS


def test_what_is_kept_is_bounded_and_fits():
    at = block(4 * SMALLEST_BYTES).data_ptr()
    assert block(2 * SMALLEST_BYTES).data_ptr() == at
    assert block(SMALLEST_BYTES).data_ptr() != at  # a quarter: most of it would be waste
    for size in (SMALLEST_BYTES // 2, 2 * LARGEST_BYTES):
        block(size)
    assert sum(each.nbytes() for each in _buffers._BLOCKS.storages) == 5 * SMALLEST_BYTES
    assert empty((0, 3), torch.float32).shape == (0, 3)
    assert empty((), torch.float32).shape == ()


def test_each_thread_has_its_own():
    at = block().data_ptr()
    others = []
    thread = threading.Thread(target=lambda: others.append(block()))
    thread.start()
    thread.join()
    assert others[0].data_ptr() != at
