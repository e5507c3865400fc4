"""Filters: which linear layers gain from low precision.

A filter is `(module, fqn) -> bool`. Anything with `in_features` and `out_features` can be judged, so the same filters
work on modules and on the configuration objects of trainers that convert before building.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from aotrain.nn.float8_config import Float8LinearRecipeName
from aotrain.recipes import recipe_name

ModuleFilter = Callable[[Any, str], bool]

# Below these sizes (out_features N, in_features K) the casts cost more than the product saves, measured on H100 at 16k
# tokens and published with torchao's float8 documentation.
_TOO_SMALL: dict[str, Callable[[int, int], bool]] = {
    "float8_tensorwise": lambda n, k: k <= 4096 and n <= 1024,
    "float8_rowwise": lambda n, k: n <= 2048 or k <= 1024 or (n <= 4096 and k <= 2048),
}


def auto_filter_for_recipe(recipe: "Float8LinearRecipeName | str", filter_fqns: Sequence[str] = ()) -> ModuleFilter:
    """Filter that keeps only layers large enough to gain from the recipe on an H100-class GPU.

    Args:
        recipe: recipe name.
        filter_fqns: layers whose dotted name contains one of these strings are left alone.

    Raises:
        ValueError: unknown recipe.
        NotImplementedError: a recipe without measured thresholds.
    """
    name = recipe_name(recipe.value if isinstance(recipe, Float8LinearRecipeName) else recipe)
    if name not in _TOO_SMALL:
        raise NotImplementedError(
            f"Unsupported recipe: {name}; sizes were measured for {', '.join(_TOO_SMALL)}. Write your own filter."
        )
    return partial(_is_large_enough, too_small=_TOO_SMALL[name], filter_fqns=tuple(filter_fqns))


def _is_large_enough(
    module: Any, fqn: str, *, too_small: Callable[[int, int], bool], filter_fqns: tuple[str, ...]
) -> bool:
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return False
    n, k = module.out_features, module.in_features
    return not (any(part in fqn for part in filter_fqns) or n % 16 or k % 16 or too_small(n, k))
