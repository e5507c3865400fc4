"""What the experts of a mixture compute per step: their casts and grouped products, as `aotrain.ops.scaled_grouped_mm`
makes them for a recipe. A test compares the list with the casts of a real forward and backward.

Of E experts with weights [N, K], a GPU multiplies M rows in all, sorted by expert:

    output[M, N]         = x[e] @ w[e].T       grad_input[M, K] = g[e] @ w[e]       rows divided among the experts
    grad_weight[E, N, K] = g[e].T @ x[e]                                            contracted rows divided
"""

from dataclasses import replace
from typing import NamedTuple

from aotrain.nn.linear_work import Cast, Gemm, linear_gemms, operand_casts
from aotrain.recipes import LinearRecipe


class Experts(NamedTuple):
    """The experts of one layer, which are converted together.

    Attributes:
        fqn: dotted name of their module.
        products: (name, N, K) of each weight [E, N, K].
        experts: E, of all ranks together.
        top_k: experts that each token goes to.
    """

    fqn: str
    products: tuple[tuple[str, int, int], ...]
    experts: int
    top_k: int


def grouped_gemms(m: int, n: int, k: int, experts: int, recipe: LinearRecipe | None) -> tuple[Gemm, Gemm, Gemm]:
    """output, grad_input and grad_weight of x [M, K] and w [E, N, K]; None is everything in high precision."""
    output, grad_input, grad_weight = (replace(gemm, groups=experts) for gemm in linear_gemms(m, n, k, recipe))
    return output, grad_input, replace(grad_weight, divided="contracted")


def grouped_casts(m: int, n: int, k: int, experts: int, recipe: LinearRecipe) -> tuple[Cast, ...]:
    """Casts of one forward and backward in which x and the weights need gradients, in order.

    Weights are counted as one matrix of all experts' rows.
    """
    output, grad_input, grad_weight = recipe.output, recipe.grad_input, recipe.grad_weight
    casts = operand_casts(m, k, output.lhs, None)
    if output.rhs is not None:
        casts.append(Cast(experts * n, k, output.rhs, False))
    casts += operand_casts(m, n, grad_input.lhs, grad_weight.lhs)
    if grad_input.rhs is not None:
        casts.append(Cast(experts * k, n, grad_input.rhs, True))
    if grad_weight.rhs is not None:
        casts.append(Cast(k, m, grad_weight.rhs, True))
    return tuple(casts)
