"""Names that recipe files give our optimizers, the same for every training engine.

``OPTIMIZERS`` has our names, ``ALIASES`` the ones that recipes written for other toolkits use for the same thing
(transformers' ``optim``, axolotl's ``optimizer``, class names). Nothing here imports torch: a job file is checked
before anything heavy is loaded.
"""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Name in a recipe -> class in `aotrain.optim`.
OPTIMIZERS = {
    "adamw_8bit": "AdamW8bit",
    "adamw_4bit": "AdamW4bit",
    "adamw_fp8": "AdamWFp8",
    "adamw_32bit": "AdamW32bit",
    "adam_8bit": "Adam8bit",
    "adam_4bit": "Adam4bit",
    "adam_fp8": "AdamFp8",
    "adam_32bit": "Adam32bit",
    "lion_8bit": "Lion8bit",
}

# Other spellings -> name in OPTIMIZERS.
ALIASES = {
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "adamw_torch_4bit": "adamw_4bit",
    "adamw_torch_fp8": "adamw_fp8",
    "ao_adamw_8bit": "adamw_8bit",
    "ao_adamw_4bit": "adamw_4bit",
    "ao_adamw_fp8": "adamw_fp8",
    **{class_name: name for name, class_name in OPTIMIZERS.items()},
}


def canonical_name(name: str) -> str:
    """The key of ``OPTIMIZERS`` that a name or an alias means.

    Raises:
        ValueError: unknown name; the message lists the valid ones.
    """
    name = ALIASES.get(name, name)
    if name in OPTIMIZERS:
        return name
    if name.startswith("paged_"):
        raise ValueError(
            f"unknown optimizer {name!r}: state is not paged here. Want {name.removeprefix('paged_')!r} with its state "
            "on the device, or with offload (aotrain.optim.CPUOffloadOptimizer) in host memory."
        )
    near = difflib.get_close_matches(name, [*OPTIMIZERS, *ALIASES], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown optimizer {name!r}; want one of {', '.join(OPTIMIZERS)}{hint}")


def optimizer_class(name: str) -> "type[torch.optim.Optimizer]":
    """The class that a name or an alias means.

    Raises:
        ValueError: unknown name; the message lists the valid ones.
    """
    return getattr(import_module("aotrain.optim"), OPTIMIZERS[canonical_name(name)])
