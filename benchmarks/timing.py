"""Timing of one call: CUDA events with a cold L2 cache on a GPU, a monotonic clock on a CPU."""

import time
from collections.abc import Callable, Sequence

import torch

# Larger than the L2 cache of any current GPU (H200: 50 MiB, B200: 126 MiB).
_FLUSH_BYTES = 256 * 2**20


def times_ms(
    runs: Sequence[Callable[[], object]], device: torch.device, *, repeats: int, warmup: int = 3
) -> list[list[float]]:
    """Milliseconds of `repeats` calls of each of `runs`, taken in turns after `warmup` calls that are not counted."""
    for _ in range(warmup):
        for run in runs:
            run()
    return _cuda_times(runs, device, repeats) if device.type == "cuda" else _cpu_times(runs, repeats)


def _cpu_times(runs: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            own.append((time.perf_counter() - start) * 1e3)
    return times


def _cuda_times(runs: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[list[float]]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    events = [
        [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in runs]
        for _ in range(repeats)
    ]
    torch.cuda.synchronize(device)
    for turn in events:
        for run, (start, end) in zip(runs, turn, strict=True):
            # The flush also keeps the GPU busy while the host enqueues the call: launch overhead is not measured.
            flush.zero_()
            start.record()
            run()
            end.record()
    torch.cuda.synchronize(device)
    return [[start.elapsed_time(end) for start, end in own] for own in zip(*events, strict=True)]
