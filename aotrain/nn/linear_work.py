"""What a linear layer computes per step: its casts and its three matrix products, as `aotrain.ops.scaled_linear` makes
them for a recipe. A test compares the list with the casts of a real forward and backward.

    output[M, N] = x @ w.T        grad_input[M, K] = g @ w        grad_weight[N, K] = g.T @ x
"""

from dataclasses import dataclass

from aotrain.formats import BLOCKWISE_1X128, BLOCKWISE_128X128, ROWWISE, TENSORWISE, Scaling
from aotrain.formats.scaling import Block
from aotrain.recipes import HIGH_PRECISION, GemmRecipe, LinearRecipe

_SYMMETRIC_BLOCKS = (TENSORWISE, BLOCKWISE_128X128)


@dataclass(frozen=True, slots=True)
class Cast:
    """One pass over an operand.

    Attributes:
        rows: of the quantized matrix, as the product takes it.
        columns: of it; the contracted dimension.
        scaling: target format; None for the transposition of 8-bit codes that exist already.
        transposed: whether the matrix is read column by column.
    """

    rows: int
    columns: int
    scaling: Scaling | None
    transposed: bool


@dataclass(frozen=True, slots=True)
class Gemm:
    """One product [rows, contracted] @ [columns, contracted].T."""

    rows: int
    columns: int
    contracted: int
    recipe: GemmRecipe


def linear_gemms(m: int, n: int, k: int, recipe: LinearRecipe | None) -> tuple[Gemm, Gemm, Gemm]:
    """output, grad_input and grad_weight of x [M, K], w [N, K]; None is everything in high precision."""
    output, grad_input, grad_weight = (
        (recipe.output, recipe.grad_input, recipe.grad_weight) if recipe is not None else (HIGH_PRECISION,) * 3
    )
    return Gemm(m, n, k, output), Gemm(m, k, n, grad_input), Gemm(n, k, m, grad_weight)


def linear_casts(
    m: int, n: int, k: int, recipe: LinearRecipe, save_for_backward: str = "high_precision"
) -> tuple[Cast, ...]:
    """Casts of one forward and backward of a layer whose input and weight both need gradients, in order.

    Args:
        m: rows of x (tokens).
        n: output features.
        k: input features.
        recipe: formats of the three products.
        save_for_backward: as for `scaled_linear`.
    """
    output, grad_input, grad_weight = recipe.output, recipe.grad_input, recipe.grad_weight
    casts: list[Cast] = []
    if output.lhs is not None:
        casts += [Cast(m, k, output.lhs, False), Cast(n, k, output.rhs, False)]
    input_reused = _transposes_to(output.lhs, grad_weight.rhs) and save_for_backward == "quantized"
    if grad_weight.rhs is not None and save_for_backward == "quantized" and not input_reused:
        casts.append(Cast(k, m, grad_weight.rhs, True))
    if grad_input.lhs is not None:
        casts += [Cast(m, n, grad_input.lhs, False), Cast(k, n, grad_input.rhs, True)]
    if grad_weight.lhs is not None:
        casts.append(Cast(n, m, None if _transposes_to(grad_input.lhs, grad_weight.lhs) else grad_weight.lhs, True))
        if input_reused:
            casts.append(Cast(k, m, None, True))
        elif save_for_backward == "high_precision":
            casts.append(Cast(k, m, grad_weight.rhs, True))
    return tuple(casts)


def gemm_block(gemm: GemmRecipe) -> Block:
    """The scale block that decides which hardware product runs it."""
    assert gemm.lhs is not None
    assert gemm.rhs is not None
    blocks = gemm.lhs.block, gemm.rhs.block
    for block in (BLOCKWISE_1X128, ROWWISE):
        if block in blocks:
            return block
    return TENSORWISE


def _transposes_to(scaling: Scaling | None, of_transposed: Scaling | None) -> bool:
    """Whether quantized codes can be transposed instead of quantizing the transposed matrix."""
    return scaling is not None and scaling == of_transposed and scaling.block in _SYMMETRIC_BLOCKS
