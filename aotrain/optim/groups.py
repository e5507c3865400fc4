"""Parameter groups with a state precision chosen by name."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from aotrain.optim.state import check_bits


def precision_groups(
    model: torch.nn.Module,
    bits: Mapping[str, int | str] | None = None,
    *,
    embedding_bits: int | str | None = 32,
) -> list[dict[str, Any]]:
    """Parameter groups of a model's trainable parameters, for `AdamW8bit(precision_groups(model))`.

    Embeddings get float32 state by default: rows that are rarely seen have second moments far below their block's
    maximum, and 8-bit state has been seen to diverge there (Dettmers et al., ICLR 2022, section 2.3). Output layers
    tied to an embedding share its group.

    Args:
        model: its named_parameters, each once.
        bits: regular expression -> 8, 4, "fp8" or 32 for parameters whose dotted name it matches (`re.search`); the
            first match wins, and wins over `embedding_bits`.
        embedding_bits: for weights of `nn.Embedding`; None leaves them to the optimizer's own format.

    Returns:
        Groups with `params`, `param_names` and, except for the optimizer's own format, `bits`; none is empty.

    Raises:
        ValueError: a pattern that matches no trainable parameter, or unknown bits.
    """
    patterns = {pattern: check_bits(value) for pattern, value in (bits or {}).items()}
    unused = set(patterns)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    groups: dict[int | str | None, dict[str, Any]] = {}
    names = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        names.append(name)
        matching = [pattern for pattern in patterns if re.search(pattern, name)]
        unused.difference_update(matching)
        chosen = embedding_bits if id(param) in embeddings else None
        chosen = patterns[matching[0]] if matching else chosen
        group = groups.setdefault(
            chosen, {"params": [], "param_names": []} | ({} if chosen is None else {"bits": chosen})
        )
        group["params"].append(param)
        group["param_names"].append(name)
    if unused:
        raise ValueError(
            f"bits: {', '.join(map(repr, sorted(unused)))} matches no trainable parameter; the model has "
            f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}."
        )
    return list(groups.values())
