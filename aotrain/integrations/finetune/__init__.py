"""Fine-tuning jobs: the recipe, its checks, and which engine runs it. Nothing here imports torch.

``recipe`` is the schema with a comment per key, ``rules`` what spans several keys, ``names`` the names a recipe may
give, ``engines`` hands a recipe to TRL or torchtitan, ``stdlib_pairs`` is training data that every machine has. What
the engines share: ``rows`` reads the data, ``output`` keeps the folder of a run, ``perplexity`` writes the table.
"""

from aotrain.integrations.finetune.engines import describe, problems, run
from aotrain.integrations.finetune.recipe import (
    Data,
    Evaluate,
    Export,
    Lora,
    Model,
    Optimizer,
    Quantize,
    Recipe,
    load_recipe,
)

__all__ = [
    "Data",
    "Evaluate",
    "Export",
    "Lora",
    "Model",
    "Optimizer",
    "Quantize",
    "Recipe",
    "describe",
    "load_recipe",
    "problems",
    "run",
]
