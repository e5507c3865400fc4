"""How long products and casts take on a GPU: a model from its data sheet, with efficiency factors.

    product   flops / (peak * efficiency) * (1 + fill / contracted) or its bytes / bandwidth, whichever is longer,
              plus a fixed time
    cast      bytes / bandwidth plus a launch per pass

This is a model, not a measurement. Its factors were fitted, all together, to what is published about float8 linear
layers on H100 (docs/plan.md and benchmarks/roofline.py list the facts and how far each is missed), and carried over to
the other GPUs. It takes every cast as a fused kernel and the scaling of int8 products as one pass;
`aotrain.nn.measure` times what is there.
"""

from dataclasses import dataclass
from typing import Protocol

from aotrain.formats import BLOCKWISE_1X128, INT8, ROWWISE, TENSORWISE, Scaling, is_mx
from aotrain.gpus import Gpu
from aotrain.kernels import cast_kernel_gap, float8_problem
from aotrain.kernels._padding import NATIVE_ALIGNMENT
from aotrain.nn.linear_work import Cast, Gemm, gemm_block
from aotrain.recipes import LinearRecipe

# Longest row that the rowwise kernel keeps in registers between maximum and cast; longer ones are read twice, as are
# the columns of a row-major matrix (aotrain/kernels/triton/scaled_cast.py).
ONE_PASS_COLUMNS = 16384
# Of a tile of a grouped product: what Hopper's instructions take two of.
TILE_ROWS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """How far below its data sheet a GPU stays; fitted with `python -m benchmarks.roofline --fit`, then rounded."""

    # Part of the peak that a product of unlimited size reaches. int8 is fitted to torchtitan issue 578: a step 20 %
    # faster on 8 A100.
    bf16: float = 0.68
    float8: float = 0.84
    int8: float = 0.62
    # Without fast accumulation partial sums are promoted to float32 registers; products with more than one scale per
    # tensor run another kernel than those with one (fitted for row scales; assumed for scales per 128 elements).
    slow_accumulation: float = 0.73
    row_scales: float = 0.72
    # Filling and draining a tile's pipeline takes as long as this many bfloat16 elements of the contracted dimension
    # (twice as many 8-bit ones, which are computed in half the time).
    fill: float = 1000.0
    # Part of the bandwidth that a pass over a large tensor reaches; that of torchao's roofline script.
    bandwidth: float = 0.92
    # Seconds: fixed part of a product (launch, first and last wave), and of any other kernel.
    gemm_fixed: float = 1e-5
    kernel_fixed: float = 1e-6


class Times(Protocol):
    """Seconds of the parts of a linear layer, wherever they come from."""

    @property
    def label(self) -> str:
        """Which GPU, and whether modelled or measured."""
        ...

    def gemm(self, gemm: Gemm) -> float:
        """One product, with what it does to its output."""
        ...

    def cast(self, cast: Cast) -> float:
        """One cast, or transposition of codes, of a 16-bit matrix."""
        ...

    def problem(self, recipe: LinearRecipe) -> str | None:
        """Why the GPU does not run this recipe natively; None if it does."""
        ...

    def notes(self, recipe: LinearRecipe) -> list[str]:
        """What the times take for granted that is not so yet; empty if nothing."""
        ...


class Roofline:
    """`Times` from a row of `aotrain.gpus.GPUS`."""

    def __init__(self, gpu: Gpu, factors: Factors | None = None) -> None:
        self.gpu = gpu
        self.factors = Factors() if factors is None else factors

    @property
    def label(self) -> str:
        return f"{self.gpu.name}, modelled from its data sheet"

    def gemm(self, gemm: Gemm) -> float:
        factors = self.factors
        by_rows = gemm.divided == "rows"
        # Groups share tiles neither of rows nor of the contracted dimension.
        rows = _in_tiles(gemm.rows, gemm.groups) if by_rows else gemm.rows
        contracted = gemm.contracted / (1 if by_rows else gemm.groups)
        flops = 2.0 * rows * gemm.columns * gemm.contracted
        eight_bit = gemm.recipe.quantized
        fill = 1 + factors.fill * (2 if eight_bit else 1) / contracted
        right, results = (gemm.groups, 1) if by_rows else (1, gemm.groups)
        moved = (gemm.rows + right * gemm.columns) * gemm.contracted * (1 if eight_bit else 2)
        moved += results * gemm.rows * gemm.columns * 2
        seconds = max(flops / self._rate(gemm) * fill, self._move(moved)) + factors.gemm_fixed
        if eight_bit and gemm.recipe.lhs is not None and gemm.recipe.lhs.element == INT8:
            # The int32 product is read again to be scaled, and was written with 4 bytes.
            seconds += self._move(gemm.rows * gemm.columns * 6) + self.factors.kernel_fixed
        return seconds + self._padding(gemm)

    def cast(self, cast: Cast) -> float:
        size = cast.rows * cast.columns
        if cast.scaling is None:
            return self._move(2 * size) + self.factors.kernel_fixed
        if cast.scaling_t is not None:
            # Scales that reach across the matrix, one way or the other, need its maxima first.
            passes = 2 if {TENSORWISE, ROWWISE} & {cast.scaling.block, cast.scaling_t.block} else 1
            return self._move((2 * passes + 2) * size) + passes * self.factors.kernel_fixed
        if cast.scaling.block == TENSORWISE:  # maximum, then cast
            return self._move(2 * size + 3 * size) + 2 * self.factors.kernel_fixed
        return self._move(_bytes_per_element(cast, cast.scaling) * size) + self.factors.kernel_fixed

    def problem(self, recipe: LinearRecipe) -> str | None:
        gpu = self.gpu
        for gemm in (recipe.output, recipe.grad_input, recipe.grad_weight):
            if gemm.lhs is None or gemm.lhs.element == INT8:
                continue
            if is_mx(gemm.lhs):  # which GPUs have them is found by trying, not from a data sheet
                return f"MX products are emulated on {gpu.name} as far as its data sheet tells"
            problem = float8_problem(gpu.name, gpu.capability or (0, 0), gpu.gfx, gemm_block(gemm))
            if problem is not None:
                return problem
        return None

    def notes(self, recipe: LinearRecipe) -> list[str]:
        gemms = (recipe.output, recipe.grad_input, recipe.grad_weight)
        scalings = [scaling for gemm in gemms for scaling in (gemm.lhs, gemm.rhs) if scaling is not None]
        gaps = dict.fromkeys(gap for scaling in scalings if (gap := cast_kernel_gap(scaling)) is not None)
        return [f"modelled with fused casts, but {gap}: until then the recipe is slower than this" for gap in gaps]

    def _padding(self, gemm: Gemm) -> float:
        """A copy of an output whose row length the hardware does not take; the casts pad the operands for nothing."""
        if gemm.recipe.lhs is None:
            return 0.0
        multiple = 8 if gemm.recipe.lhs.element == INT8 else NATIVE_ALIGNMENT
        if gemm.columns % multiple == 0:
            return 0.0
        return self._move(4 * gemm.rows * gemm.columns) + self.factors.kernel_fixed

    def _rate(self, gemm: Gemm) -> float:
        """Operations per second of a product with an endless contracted dimension."""
        recipe, factors = gemm.recipe, self.factors
        if recipe.lhs is None:
            return self.gpu.bf16 * 1e12 * factors.bf16
        if recipe.lhs.element == INT8:
            return self.gpu.int8 * 1e12 * factors.int8
        rate = self.gpu.float8 * 1e12 * factors.float8
        if not recipe.fast_accum:
            rate *= factors.slow_accumulation
        return rate if gemm_block(recipe) == TENSORWISE else rate * factors.row_scales

    def _move(self, size: float) -> float:
        return size / (self.gpu.bandwidth * 1e12 * self.factors.bandwidth)


def _in_tiles(rows: int, groups: int) -> int:
    """Rows that tiles cover when equal groups begin with a new tile each."""
    return rows if groups == 1 else groups * -(-rows // (groups * TILE_ROWS)) * TILE_ROWS


def _bytes_per_element(cast: Cast, scaling: Scaling) -> int:
    """Read and written by one fused kernel for a 16-bit matrix."""
    one_pass = scaling.block == BLOCKWISE_1X128 or scaling.block[0] > 1 or cast.columns <= ONE_PASS_COLUMNS
    if scaling.block == ROWWISE and cast.transposed:
        one_pass = False
    return 3 if one_pass else 5
