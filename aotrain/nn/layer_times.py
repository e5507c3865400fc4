"""How long a layer takes, and what of it a rank has: one linear layer, or the experts of a mixture."""

from collections.abc import Iterator

from aotrain.nn.expert_work import Experts, grouped_casts, grouped_gemms
from aotrain.nn.linear_work import Cast, Gemm, linear_casts, linear_gemms
from aotrain.nn.roofline import Times
from aotrain.recipes import LinearRecipe

# (dotted name, out_features N, in_features K)
Shape = tuple[str, int, int]
Layer = Shape | Experts

# Layers whose input is split by tensor parallelism, by the last part of their name; the output of all others is.
_ROW_PARALLEL = {
    "wo",
    "w2",
    "o_proj",
    "out_proj",
    "down_proj",
    "c_proj",
    "fc2",
    "dense_4h_to_h",
    "proj_out",
    "mlp2_weight",
}
# Layers that every rank holds whole: routers, and the down-projections of latent attention.
ROUTERS = {"gate", "router"}
_REPLICATED = {*ROUTERS, "wq_a", "wkv_a", "q_a_proj", "kv_a_proj_with_mqa"}


def shard(layer: Layer, tp: int, ep: int = 1) -> Layer:
    """What one of `tp` ranks, or of `ep`, has of a layer, judged by names; what does not divide is rounded up.

    With expert parallelism whole experts are divided, and their sizes by tensor parallelism.
    """
    if isinstance(layer, Experts):
        products = tuple((name, *_split(name.partition("_E")[0], n, k, tp)) for name, n, k in layer.products)
        return layer._replace(products=products, experts=-(-layer.experts // ep))
    fqn, n, k = layer
    return (fqn, *_split(fqn.rpartition(".")[2], n, k, tp))


def _split(last: str, n: int, k: int, tp: int) -> tuple[int, int]:
    if last in _REPLICATED:
        return n, k
    return (n, -(-k // tp)) if last in _ROW_PARALLEL else (-(-n // tp), k)


def layer_seconds(
    layer: Layer,
    tokens: int,
    recipe: LinearRecipe | None,
    times: Times,
    save_for_backward: str = "high_precision",
) -> tuple[float, float]:
    """(casts, products) of one forward and backward of a rank's part of a layer; recipe None is bfloat16."""
    casts, gemms = _work(layer, tokens, recipe, save_for_backward)
    return sum(times.cast(cast) for cast in casts), sum(times.gemm(gemm) for gemm in gemms)


def _work(
    layer: Layer, tokens: int, recipe: LinearRecipe | None, save_for_backward: str
) -> tuple[list[Cast], list[Gemm]]:
    if not isinstance(layer, Experts):
        _, n, k = layer
        casts = [] if recipe is None else list(linear_casts(tokens, n, k, recipe, save_for_backward))
        return casts, list(linear_gemms(tokens, n, k, recipe))
    casts, gemms, rows = [], [], tokens * layer.top_k
    for _, n, k in layer.products:
        gemms += grouped_gemms(rows, n, k, layer.experts, recipe)
        casts += [] if recipe is None else grouped_casts(rows, n, k, layer.experts, recipe)
    return casts, gemms


def sides(layer: Layer, tokens: int) -> Iterator[tuple[int, int]]:
    """(rows, columns) of the input and output of each of a layer's products."""
    if isinstance(layer, Experts):
        for _, n, k in layer.products:
            yield from ((tokens * layer.top_k, size) for size in (n, k))
    else:
        yield from ((tokens, size) for size in layer[1:])


def layer_gain(n: int, k: int, tokens: int, recipe: LinearRecipe, times: Times) -> float:
    """How many times faster the recipe makes a linear layer."""
    layer = ("", n, k)
    return sum(layer_seconds(layer, tokens, None, times)) / sum(layer_seconds(layer, tokens, recipe, times))
