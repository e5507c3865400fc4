"""Times of products and casts measured on this machine, each shape once, kept in a file.

The file lies in the user's cache folder, one per GPU, torch version and state of our kernels, and is plain JSON:
operation -> seconds. Delete it, or pass `refresh=True`, after a driver update.

What is timed is what a converted layer calls, kernels that do not exist yet included as the slow code that stands in
for them. Operands are in the "nt" layout of `scaled_mm`; shapes beyond `MAX_ELEMENTS` are measured in part and scaled.
"""

import functools
import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import aotrain.kernels
from aotrain.formats import INT8, is_mx
from aotrain.kernels import mx_mm_problem, native_scaled_mm_problem, scaled_cast, scaled_cast_both, scaled_mm
from aotrain.kernels._padding import NATIVE_ALIGNMENT
from aotrain.kernels.grouped_cast import grouped_cast, grouped_cast_t
from aotrain.kernels.groups import group_layout
from aotrain.kernels.scaled_grouped_mm import (
    grouped_mm,
    grouped_mm_contracted,
    scaled_grouped_mm,
    scaled_grouped_mm_contracted,
)
from aotrain.nn.linear_work import Cast, Gemm, gemm_block
from aotrain.recipes import LinearRecipe

logger = logging.getLogger(__name__)

# Elements of the matrices of one measurement; beyond, time grows in proportion. 2^28 are 512 MiB in bfloat16.
MAX_ELEMENTS = 2**28
_REPEATS = 10
_WARMUP = 3
# More than the L2 cache of any current GPU.
_FLUSH_BYTES = 256 * 2**20


def cache_file(device_name: str, folder: Path | None = None) -> Path:
    """Where times of a device are kept: `folder`, or $XDG_CACHE_HOME or ~/.cache, then aotrain/plan."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aotrain" / "plan"
    name = f"{device_name}-torch{torch.__version__}-kernels{_kernels_digest()}"
    return (folder or base) / f"{name.replace(' ', '_').replace('/', '_')}.json"


@functools.lru_cache(maxsize=1)
def _kernels_digest() -> str:
    """Changes with the source of our kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(aotrain.kernels.__file__ or "").parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


class Measured:
    """`Times` of a device of this machine.

    Args:
        device: a CUDA device, or the CPU (for tests).
        folder: of the file; default the user's cache folder.
        refresh: measure again what the file has.
    """

    def __init__(self, device: torch.device, *, folder: Path | None = None, refresh: bool = False) -> None:
        self.device = device
        self._name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.path = cache_file(self._name, folder)
        self._seconds = {} if refresh else _read(self.path)

    @property
    def label(self) -> str:
        return f"{self._name}, measured"

    def gemm(self, gemm: Gemm) -> float:
        key = f"gemm {gemm.rows}x{gemm.columns}x{gemm.contracted} {gemm.recipe} fast_accum={gemm.recipe.fast_accum}"
        if gemm.groups > 1:
            return self._measured(f"{key} {gemm.groups} groups of {gemm.divided}", lambda: self._time_groups(gemm))
        return self._measured(key, lambda: self._time_gemm(gemm))

    def cast(self, cast: Cast) -> float:
        what = cast.scaling if cast.scaling is not None else "codes"
        both = f" and {cast.scaling_t} of its transposition" if cast.scaling_t is not None else ""
        key = f"cast {cast.rows}x{cast.columns} {what} transposed={cast.transposed}{both}"
        return self._measured(key, lambda: self._time_cast(cast))

    def problem(self, recipe: LinearRecipe) -> str | None:
        for gemm in (recipe.output, recipe.grad_input, recipe.grad_weight):
            if gemm.lhs is None or gemm.lhs.element == INT8:
                continue
            if gemm.rhs is not None and is_mx(gemm.lhs):
                elements = gemm.lhs.element.name, gemm.rhs.element.name
                problem = mx_mm_problem(self.device, *elements, torch.bfloat16)
            else:
                problem = native_scaled_mm_problem(self.device, gemm_block(gemm))
            if problem is not None:
                return problem
        return None

    def notes(self, recipe: LinearRecipe) -> list[str]:
        return []

    def _measured(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self._seconds:
            self._seconds[key] = measure()
            _write(self.path, self._seconds)
        return self._seconds[key]

    def _time_gemm(self, gemm: Gemm) -> float:
        sizes, factor = _within_limit([gemm.rows, gemm.columns, gemm.contracted])
        a, b = self._randn(sizes[0], sizes[2]), self._randn(sizes[1], sizes[2])
        recipe = gemm.recipe
        if recipe.lhs is None or recipe.rhs is None:
            return factor * self._time(lambda: a @ b.t())
        a_q, b_q = scaled_cast(a, recipe.lhs), scaled_cast(b, recipe.rhs)
        return factor * self._time(lambda: scaled_mm(a_q, b_q, torch.bfloat16, fast_accum=recipe.fast_accum))

    def _time_groups(self, gemm: Gemm) -> float:
        """Groups of equal size."""
        (rows, columns, contracted), factor = _within_limit([gemm.rows, gemm.columns, gemm.contracted])
        recipe, by_rows = gemm.recipe, gemm.divided == "rows"
        divided = rows if by_rows else contracted
        offsets = (torch.arange(1, gemm.groups + 1, device=self.device) * divided // gemm.groups).to(torch.int32)
        options = {"fast_accum": recipe.fast_accum}
        if recipe.lhs is None or recipe.rhs is None:
            layout = group_layout(offsets, divided, 1)
            if by_rows:
                a, b = self._randn(rows, contracted), self._randn(gemm.groups, columns, contracted)
                return factor * self._time(lambda: grouped_mm(a, b.mT, layout))
            a, b = self._randn(contracted, rows), self._randn(contracted, columns)
            return factor * self._time(lambda: grouped_mm_contracted(a, b, layout))
        layout = group_layout(offsets, divided, max(NATIVE_ALIGNMENT, recipe.lhs.block[1], recipe.rhs.block[1]))
        if by_rows:
            a_q = grouped_cast(self._randn(rows, contracted), layout, recipe.lhs)
            b_q = scaled_cast(self._randn(gemm.groups, columns, contracted), recipe.rhs)
            return factor * self._time(lambda: scaled_grouped_mm(a_q, b_q, layout, torch.bfloat16, **options))
        a_q = grouped_cast_t(self._randn(contracted, rows), layout, recipe.lhs)
        b_q = grouped_cast_t(self._randn(contracted, columns), layout, recipe.rhs)
        return factor * self._time(lambda: scaled_grouped_mm_contracted(a_q, b_q, layout, torch.bfloat16, **options))

    def _time_cast(self, cast: Cast) -> float:
        (rows, columns), factor = _within_limit([cast.rows, cast.columns])
        x = self._randn(columns, rows).t() if cast.transposed else self._randn(rows, columns)
        scaling = cast.scaling
        if scaling is None:
            codes = x.to(torch.int8)
            return factor * self._time(lambda: codes.clone(memory_format=torch.contiguous_format))
        scaling_t = cast.scaling_t
        if scaling_t is not None:
            return factor * self._time(lambda: scaled_cast_both(x, scaling, scaling_t))
        return factor * self._time(lambda: scaled_cast(x, scaling))

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def _time(self, run: Callable[[], object]) -> float:
        for _ in range(_WARMUP):
            run()
        times = self._cuda_times(run) if self.device.type == "cuda" else _cpu_times(run)
        return statistics.median(times)

    def _cuda_times(self, run: Callable[[], object]) -> list[float]:
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_REPEATS)]
        for start, end in events:
            flush.zero_()  # also keeps the GPU busy while the call is enqueued
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def _cpu_times(run: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def _within_limit(sizes: list[int]) -> tuple[list[int], float]:
    """Sizes whose pairwise products, together, stay within `MAX_ELEMENTS`, and what to multiply the time by."""
    sizes, factor = list(sizes), 1.0
    while _elements(sizes) > MAX_ELEMENTS:
        largest = sizes.index(max(sizes))
        factor *= sizes[largest] / (sizes[largest] // 2)
        sizes[largest] //= 2
    return sizes, factor


def _elements(sizes: list[int]) -> int:
    return sum(a * b for i, a in enumerate(sizes) for b in sizes[i + 1 :])


def _read(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): float(value) for key, value in data.items()}
    except (ValueError, TypeError, AttributeError) as error:
        logger.warning("%s is not a file of times (%s); measuring again", path, error)
        return {}


def _write(path: Path, seconds: dict[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(seconds, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)
