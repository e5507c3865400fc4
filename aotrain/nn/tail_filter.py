"""A filter that leaves the last blocks of a model alone, as 4-bit training does.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149: about 15 % of the linear layers, most
of them at the end, stay in bfloat16; of its 12B model the first two and the last eight of 62 blocks.
"""

import math
from functools import partial
from typing import Any

import torch

from aotrain.nn.filters import ModuleFilter


def keep_tail_layers(
    model: torch.nn.Module,
    tail: float | int = 0.15,
    *,
    first: int = 0,
    module_filter_fn: ModuleFilter | None = None,
) -> ModuleFilter:
    """Filter that rejects the linear layers of the last blocks and what follows the blocks, such as the output head.

    For the conversions and, since it accepts nothing but linear layers, for `quantize_`:

        convert_to_mx_training(model, "nvfp4", module_filter_fn=keep_tail_layers(model))

    The blocks are the children of the ModuleList, ModuleDict or Sequential that has the most children with linear
    layers.

    Args:
        model: the model to convert.
        tail: how many of the last blocks to keep as they are: a fraction of all, rounded up, or a number.
        first: how many of the first blocks to keep as they are.
        module_filter_fn: a filter that must accept a layer too.

    Raises:
        ValueError: the model has no such container, or nothing would be left to convert.
    """
    container = _block_container(model)
    prefix = f"{container}." if container else ""
    blocks = list(model.get_submodule(container)._modules)
    count = math.ceil(tail * len(blocks)) if isinstance(tail, float) else tail
    if count < 0 or first < 0 or first + count >= len(blocks):
        raise ValueError(
            f"keep_tail_layers got tail={tail} and first={first} for {len(blocks)} blocks in {container!r}; want at "
            "least one block between them."
        )
    kept = blocks[:first] + blocks[len(blocks) - count :]
    return partial(
        _is_not_kept,
        prefixes=tuple(f"{prefix}{name}" for name in kept),
        following=_linears_after(model, prefix),
        module_filter_fn=module_filter_fn,
    )


def _is_not_kept(
    module: Any,
    fqn: str,
    *,
    prefixes: tuple[str, ...],
    following: frozenset[str],
    module_filter_fn: ModuleFilter | None,
) -> bool:
    if not hasattr(module, "in_features") or fqn in following:
        return False
    if any(fqn == prefix or fqn.startswith(f"{prefix}.") for prefix in prefixes):
        return False
    return module_filter_fn is None or module_filter_fn(module, fqn)


def _block_container(model: torch.nn.Module) -> str:
    """The dotted name of the container whose children are the model's blocks; the first of the largest."""
    sizes = {
        name: sum(1 for child in module.children() if any(isinstance(m, torch.nn.Linear) for m in child.modules()))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict | torch.nn.Sequential)
    }
    largest = max(sizes, key=lambda name: sizes[name], default="")
    if sizes.get(largest, 0) < 2:
        raise ValueError(
            f"keep_tail_layers found no ModuleList, ModuleDict or Sequential of blocks in {type(model).__name__}; pass "
            "a filter by name to the conversion instead."
        )
    return largest


def _linears_after(model: torch.nn.Module, prefix: str) -> frozenset[str]:
    """Names of the linear layers that come after all of those below the prefix."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    last = max(index for index, name in enumerate(names) if name.startswith(prefix))
    return frozenset(names[last + 1 :])
