"""Recipes: which format each operand of each of a linear layer's three matrix products takes. Frozen data, one table.

With input x [M, K], weight w [N, K] and the gradient g [M, N] of the output, a linear layer computes

    output[M, N]      = x[M, K]    @ w[N, K].T        lhs = x,    rhs = w
    grad_input[M, K]  = g[M, N]    @ wt[K, N].T       lhs = g,    rhs = w.T
    grad_weight[N, K] = gt[N, M]   @ xt[K, M].T       lhs = g.T,  rhs = x.T

Every operand is written with the contracted dimension last, so a "rowwise" block (1, -1) is one scale per row of the
operand as it stands here: in grad_weight that is one scale per output channel of g and per input channel of x.
"""

from dataclasses import dataclass, replace

from aotrain.formats import (
    BLOCKWISE_1X32,
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    FLOAT4_E2M1,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    INT8,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    ElementFormat,
    Scaling,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmRecipe:
    """How one matrix product is computed.

    Attributes:
        lhs: format of the left operand; None keeps both operands in high precision.
        rhs: format of the right operand; None exactly when lhs is None.
        fast_accum: let the hardware accumulate float8 products in reduced precision. Ignored by the emulation.
    """

    lhs: Scaling | None = None
    rhs: Scaling | None = None
    fast_accum: bool = False

    def __post_init__(self) -> None:
        if (self.lhs is None) != (self.rhs is None):
            raise ValueError(
                f"GemmRecipe got lhs={self.lhs} and rhs={self.rhs}; want both operands quantized or both None: there "
                "is no mixed-precision matrix product."
            )
        if self.lhs is not None and self.rhs is not None and self.lhs.hadamard != self.rhs.hadamard:
            raise ValueError(
                f"GemmRecipe got Hadamard transforms of {self.lhs.hadamard} and {self.rhs.hadamard}; want the same for "
                "both operands: it only cancels then."
            )

    @property
    def quantized(self) -> bool:
        """Whether the product runs on quantized operands."""
        return self.lhs is not None

    def __str__(self) -> str:
        return f"{self.lhs} x {self.rhs}" if self.quantized else "high precision"


HIGH_PRECISION = GemmRecipe()


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRecipe:
    """The three products of a linear layer."""

    output: GemmRecipe = HIGH_PRECISION
    grad_input: GemmRecipe = HIGH_PRECISION
    grad_weight: GemmRecipe = HIGH_PRECISION


def _float8(element: ElementFormat, block: tuple[int, int], power_of_two: bool) -> Scaling:
    return Scaling(element=element, scale=SCALE_FORMATS["float32_pow2" if power_of_two else "float32"], block=block)


_TENSOR_E4M3 = _float8(FLOAT8_E4M3, TENSORWISE, power_of_two=False)
_TENSOR_E5M2 = _float8(FLOAT8_E5M2, TENSORWISE, power_of_two=False)
_TENSOR_E4M3_POW2 = _float8(FLOAT8_E4M3, TENSORWISE, power_of_two=True)
_ROW_E4M3_POW2 = _float8(FLOAT8_E4M3, ROWWISE, power_of_two=True)
_VECTOR_E4M3 = _float8(FLOAT8_E4M3, BLOCKWISE_1X128, power_of_two=True)
_SQUARE_E4M3 = _float8(FLOAT8_E4M3, BLOCKWISE_128X128, power_of_two=True)
_MX_E4M3 = Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["e8m0_rceil"], block=BLOCKWISE_1X32)
_MX_E2M1 = replace(_MX_E4M3, element=FLOAT4_E2M1, scale=SCALE_FORMATS["e8m0_even"])
_MX_E2M1_STOCHASTIC = replace(_MX_E4M3, element=FLOAT4_E2M1, rounding="stochastic")
_ROW_INT8 = Scaling(element=INT8, scale=SCALE_FORMATS["float32"], block=ROWWISE)

RECIPES: dict[str, LinearRecipe] = {
    # The fastest: one scale per tensor. Gradients in e5m2 for its range.
    #   output = e4m3(x) @ e4m3(w).T    grad_input = e5m2(g) @ e4m3(w)    grad_weight = e5m2(g).T @ e4m3(x)
    "float8_tensorwise": LinearRecipe(
        output=GemmRecipe(lhs=_TENSOR_E4M3, rhs=_TENSOR_E4M3, fast_accum=True),
        grad_input=GemmRecipe(lhs=_TENSOR_E5M2, rhs=_TENSOR_E4M3),
        grad_weight=GemmRecipe(lhs=_TENSOR_E5M2, rhs=_TENSOR_E4M3),
    ),
    # The default: one power-of-two scale per row, e4m3 everywhere; an outlier only costs its own row precision.
    #   output = e4m3(x) @ e4m3(w).T    grad_input = e4m3(g) @ e4m3(w)    grad_weight = e4m3(g).T @ e4m3(x)
    "float8_rowwise": LinearRecipe(
        output=GemmRecipe(lhs=_ROW_E4M3_POW2, rhs=_ROW_E4M3_POW2, fast_accum=True),
        grad_input=GemmRecipe(lhs=_ROW_E4M3_POW2, rhs=_ROW_E4M3_POW2),
        grad_weight=GemmRecipe(lhs=_ROW_E4M3_POW2, rhs=_ROW_E4M3_POW2),
    ),
    # The most accurate: the weight gradient, whose error accumulates in the weights, stays in high precision. The
    # weight of grad_input has one scale, so that the forward's copy could be reused.
    #   output = e4m3(x) @ e4m3(w).T    grad_input = e4m3(g) @ e4m3_tensorwise(w)    grad_weight = g.T @ x
    "float8_rowwise_with_gw_hp": LinearRecipe(
        output=GemmRecipe(lhs=_ROW_E4M3_POW2, rhs=_ROW_E4M3_POW2, fast_accum=True),
        grad_input=GemmRecipe(lhs=_ROW_E4M3_POW2, rhs=_TENSOR_E4M3_POW2),
        grad_weight=HIGH_PRECISION,
    ),
    # DeepSeek-V3's: activations and gradients by vectors of 128 along the contracted dimension, weights by squares of
    # 128 x 128, so that the same codes serve output and grad_input. Power-of-two scales, which the paper uses for
    # activations, make the casts exact products.
    #   output = e4m3(x) @ e4m3(w).T    grad_input = e4m3(g) @ e4m3(w)    grad_weight = e4m3(g).T @ e4m3(x)
    "float8_blockwise": LinearRecipe(
        output=GemmRecipe(lhs=_VECTOR_E4M3, rhs=_SQUARE_E4M3),
        grad_input=GemmRecipe(lhs=_VECTOR_E4M3, rhs=_SQUARE_E4M3),
        grad_weight=GemmRecipe(lhs=_VECTOR_E4M3, rhs=_VECTOR_E4M3),
    ),
    # For cards without float8: 8-bit integers, one scale per row, exact accumulation in int32.
    #   output = int8(x) @ int8(w).T    grad_input = int8(g) @ int8(w)    grad_weight = int8(g).T @ int8(x)
    "int8_rowwise": LinearRecipe(
        output=GemmRecipe(lhs=_ROW_INT8, rhs=_ROW_INT8),
        grad_input=GemmRecipe(lhs=_ROW_INT8, rhs=_ROW_INT8),
        grad_weight=GemmRecipe(lhs=_ROW_INT8, rhs=_ROW_INT8),
    ),
    # MX: a power of two per 32 elements along the contracted dimension of every operand, as in NVIDIA's recipe
    # (arXiv:2506.08027): e4m3 for gradients too, whose range 32 neighbours rarely exceed, and scales rounded up, with
    # which nothing saturates.
    #   output = e4m3(x) @ e4m3(w).T    grad_input = e4m3(g) @ e4m3(w)    grad_weight = e4m3(g).T @ e4m3(x)
    "mxfp8": LinearRecipe(
        output=GemmRecipe(lhs=_MX_E4M3, rhs=_MX_E4M3),
        grad_input=GemmRecipe(lhs=_MX_E4M3, rhs=_MX_E4M3),
        grad_weight=GemmRecipe(lhs=_MX_E4M3, rhs=_MX_E4M3),
    ),
    # The weight gradient, whose error accumulates in the weights, in high precision.
    #   output = e4m3(x) @ e4m3(w).T    grad_input = e4m3(g) @ e4m3(w)    grad_weight = g.T @ x
    "mxfp8_gw_hp": LinearRecipe(
        output=GemmRecipe(lhs=_MX_E4M3, rhs=_MX_E4M3),
        grad_input=GemmRecipe(lhs=_MX_E4M3, rhs=_MX_E4M3),
    ),
    # 4 bits. Gradients are rounded stochastically, below a scale at which nothing saturates, so that their expectation
    # is the gradient (Tseng et al., arXiv:2502.20586). Inputs and weights are rounded to nearest, in backward too:
    # those are the values of forward, and stochastic rounding would add variance without removing a bias of the
    # gradient; their scales are those of the smallest error (docs/numerics.md, section 12). A random Hadamard transform
    # over the tokens of a scale's block spreads outliers of grad_weight's operands, which have no say in forward.
    #   output = e2m1(x) @ e2m1(w).T    grad_input = e2m1_sr(g) @ e2m1(w)
    #   grad_weight = e2m1_sr(H g).T @ e2m1(H x)
    "mxfp4": LinearRecipe(
        output=GemmRecipe(lhs=_MX_E2M1, rhs=_MX_E2M1),
        grad_input=GemmRecipe(lhs=_MX_E2M1_STOCHASTIC, rhs=_MX_E2M1),
        grad_weight=GemmRecipe(lhs=replace(_MX_E2M1_STOCHASTIC, hadamard=32), rhs=replace(_MX_E2M1, hadamard=32)),
    ),
}

# The names this field already uses for the same recipes.
RECIPE_ALIASES: dict[str, str] = {
    "tensorwise": "float8_tensorwise",
    "rowwise": "float8_rowwise",
    "rowwise_with_gw_hp": "float8_rowwise_with_gw_hp",
    "blockwise": "float8_blockwise",
}


def recipe_name(name: str) -> str:
    """Canonical name of a recipe given by its name or alias.

    Raises:
        ValueError: unknown name; the message lists the valid ones.
    """
    canonical = RECIPE_ALIASES.get(name, name)
    if canonical not in RECIPES:
        valid = ", ".join([*RECIPES, *RECIPE_ALIASES])
        raise ValueError(f"Unknown recipe {name!r}; want one of {valid}.")
    return canonical


def get_recipe(name: str) -> LinearRecipe:
    """The recipe of that name or alias; ValueError listing the valid names otherwise."""
    return RECIPES[recipe_name(name)]


def transposed_scaling(scaling: Scaling) -> Scaling:
    """The scaling of a matrix whose transposition has the given one: the same with rows and columns exchanged."""
    return replace(scaling, block=(scaling.block[1], scaling.block[0]))
