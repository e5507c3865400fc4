"""Timing of one call: CUDA events with a cold L2 cache on a GPU, a monotonic clock on a CPU."""

import time
from collections.abc import Callable

import torch

# Larger than the L2 cache of any current GPU (H200: 50 MiB, B200: 126 MiB).
_FLUSH_BYTES = 256 * 2**20


def times_ms(run: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 3) -> list[float]:
    """Milliseconds of each of `repeats` calls, after `warmup` calls that are not counted."""
    for _ in range(warmup):
        run()
    return _cuda_times(run, device, repeats) if device.type == "cuda" else _cpu_times(run, repeats)


def _cpu_times(run: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _cuda_times(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for start, end in events:
        # The flush also keeps the GPU busy while the host enqueues the call, so launch overhead is not measured.
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]
