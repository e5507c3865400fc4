"""Which package runs a recipe, imported when it does."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from aotrain.integrations.config_file import JobError
from aotrain.integrations.finetune.rules import check_recipe

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Recipe

# engine -> (module, extra that installs what it needs). A module has run(recipe), problems(recipe), describe(recipe).
_ENGINES = {
    "trl": ("aotrain.integrations.huggingface.finetune", "hf"),
    "torchtitan": ("aotrain.integrations.torchtitan.finetune", "titan"),
}


def run(recipe: Recipe) -> dict[str, Any]:
    """Train, export and evaluate as the recipe says, as one rank of those that torchrun started.

    Returns:
        What `output_dir`/summary.json holds.

    Raises:
        JobError: the engine is not installed, or a mistake that only the libraries can see.
    """
    return _engine(recipe).run(recipe)


def problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(dotted key, message) of everything in a recipe that cannot work, with what the engine's libraries know.

    Takes seconds: the libraries are imported, and the model is built without its weights.

    Raises:
        JobError: the engine is not installed.
    """
    yield from check_recipe(recipe)
    yield from _engine(recipe).problems(recipe)


def describe(recipe: Recipe) -> str:
    """What a recipe without problems will do with the model's layers.

    Raises:
        JobError: the engine is not installed.
    """
    return _engine(recipe).describe(recipe)


def _engine(recipe: Recipe) -> ModuleType:
    module, extra = _ENGINES[recipe.engine]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise JobError(f"engine: {recipe.engine} needs {error.name}: pip install 'aotrain[{extra}]'") from error
