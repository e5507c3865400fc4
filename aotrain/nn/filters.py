"""Filters: which linear layers gain from low precision.

A filter is `(module, fqn) -> bool`. Anything with `in_features` and `out_features` can be judged, so the same filters
work on modules and on the configuration objects of trainers that convert before building. `aotrain.nn.make_plan` judges
a whole model, with its sizes, its tokens and your GPU, and says why.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from aotrain.gpus import find_gpu
from aotrain.nn.float8_config import Float8LinearRecipeName
from aotrain.nn.layer_times import layer_gain
from aotrain.nn.plan import MIN_GAIN
from aotrain.nn.roofline import Roofline, Times
from aotrain.recipes import RECIPES, recipe_name

ModuleFilter = Callable[[Any, str], bool]

# Below these sizes (out_features N, in_features K) the casts cost more than the product saves, measured on H100 at 16k
# tokens and published with torchao's float8 documentation. The factors of `aotrain.nn.roofline` are fitted to them.
PUBLISHED_TOO_SMALL: dict[str, Callable[[int, int], bool]] = {
    "float8_tensorwise": lambda n, k: k <= 4096 and n <= 1024,
    "float8_rowwise": lambda n, k: n <= 2048 or k <= 1024 or (n <= 4096 and k <= 2048),
}
PUBLISHED_TOKENS = 16384
# Recipes without published sizes: the GPU whose data sheet decides. float8_rowwise_with_gw_hp is missing because code
# written for this function expects its refusal; whoever wants an answer names a GPU.
_MODELLED_ON = {"float8_blockwise": "H100", "int8_rowwise": "A100"}


def auto_filter_for_recipe(
    recipe: "Float8LinearRecipeName | str",
    filter_fqns: Sequence[str] = (),
    *,
    gpu: str | None = None,
    tokens: int = PUBLISHED_TOKENS,
) -> ModuleFilter:
    """Filter that keeps only layers large enough to gain from the recipe.

    Args:
        recipe: recipe name.
        filter_fqns: layers whose dotted name contains one of these strings are left alone.
        gpu: a name of `aotrain.gpus.GPUS`, judged by its data sheet; default the published sizes, measured on H100 at
            16k tokens, and for recipes without them H100's data sheet (int8_rowwise: A100's).
        tokens: rows of x per forward pass on one GPU; with the published sizes 16384 whatever is given.

    Raises:
        ValueError: unknown recipe or GPU, or a GPU that does not run the recipe natively.
        NotImplementedError: float8_rowwise_with_gw_hp without a GPU's name.
    """
    name = recipe_name(recipe.value if isinstance(recipe, Float8LinearRecipeName) else recipe)
    fqns = tuple(filter_fqns)
    if gpu is None and name in PUBLISHED_TOO_SMALL:
        return partial(_is_large_enough, too_small=PUBLISHED_TOO_SMALL[name], filter_fqns=fqns)
    if gpu is None and name not in _MODELLED_ON:
        known = ", ".join([*PUBLISHED_TOO_SMALL, *_MODELLED_ON])
        raise NotImplementedError(
            f"Unsupported recipe: {name}; there are sizes for {known}. Name a GPU (gpu='H100') to have it modelled."
        )
    times = Roofline(find_gpu(gpu or _MODELLED_ON[name]))
    problem = times.problem(RECIPES[name])
    if problem is not None:
        raise ValueError(f"{name}: {problem}; want a GPU that runs it, or another recipe, such as int8_rowwise.")
    return partial(
        _is_large_enough, too_small=partial(_too_small, name=name, tokens=tokens, times=times), filter_fqns=fqns
    )


# As it is called elsewhere.
_auto_filter_for_recipe = auto_filter_for_recipe


def _is_large_enough(
    module: Any, fqn: str, *, too_small: Callable[[int, int], bool], filter_fqns: tuple[str, ...]
) -> bool:
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return False
    n, k = module.out_features, module.in_features
    return not (any(part in fqn for part in filter_fqns) or n % 16 or k % 16 or too_small(n, k))


def _too_small(n: int, k: int, *, name: str, tokens: int, times: Times) -> bool:
    return layer_gain(n, k, tokens, RECIPES[name], times) < MIN_GAIN
