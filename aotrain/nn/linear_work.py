"""What a linear layer computes per step: its casts and its three matrix products, as `aotrain.ops.scaled_linear` makes
them for a recipe. A test compares the list with the casts of a real forward and backward.

    output[M, N] = x @ w.T        grad_input[M, K] = g @ w        grad_weight[N, K] = g.T @ x
"""

from dataclasses import dataclass
from typing import Literal

from aotrain.formats import BLOCKWISE_1X128, ROWWISE, TENSORWISE, Scaling
from aotrain.formats.scaling import Block
from aotrain.recipes import HIGH_PRECISION, GemmRecipe, LinearRecipe


@dataclass(frozen=True, slots=True)
class Cast:
    """One pass over an operand.

    Attributes:
        rows: of the quantized matrix, as the product takes it.
        columns: of it; the contracted dimension.
        scaling: target format; None for the transposition of 8-bit codes that exist already.
        transposed: whether the matrix is read column by column.
        scaling_t: target format of the transposition, if the same pass quantizes that too.
    """

    rows: int
    columns: int
    scaling: Scaling | None
    transposed: bool
    scaling_t: Scaling | None = None


@dataclass(frozen=True, slots=True)
class Gemm:
    """One product [rows, contracted] @ [columns, contracted].T, or as many products as there are groups.

    Attributes:
        rows: of the left operand, of all groups together if they divide it.
        columns: rows of the right operand, of one group.
        contracted: of all groups together if they divide it.
        recipe: formats.
        groups: how many; above 1 every product has its own part of `divided` and its own right operand, or output.
        divided: what the groups are parts of.
    """

    rows: int
    columns: int
    contracted: int
    recipe: GemmRecipe
    groups: int = 1
    divided: Literal["rows", "contracted"] = "rows"


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
    keep_codes = save_for_backward == "quantized"
    casts = operand_casts(m, k, output.lhs, grad_weight.rhs if keep_codes else None)
    if output.rhs is not None:
        casts.append(Cast(n, k, output.rhs, False))
    casts += operand_casts(m, n, grad_input.lhs, grad_weight.lhs)
    if grad_input.rhs is not None:
        casts.append(Cast(k, n, grad_input.rhs, True))
    if grad_weight.rhs is not None and not keep_codes:
        casts.append(Cast(k, m, grad_weight.rhs, True))
    return tuple(casts)


def operand_casts(rows: int, columns: int, scaling: Scaling | None, scaling_t: Scaling | None) -> list[Cast]:
    """Casts of a matrix and of its transposition, each where it has a scaling."""
    if scaling is not None:
        return [Cast(rows, columns, scaling, False, scaling_t)]
    return [] if scaling_t is None else [Cast(columns, rows, scaling_t, True)]


def gemm_block(gemm: GemmRecipe) -> Block:
    """The scale block that decides which hardware product runs it."""
    assert gemm.lhs is not None
    assert gemm.rhs is not None
    blocks = gemm.lhs.block, gemm.rhs.block
    for block in (BLOCKWISE_1X128, ROWWISE):
        if block in blocks:
            return block
    return TENSORWISE
