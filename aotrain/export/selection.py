"""Which tensors of a checkpoint are weights of linear layers, decided by their keys and shapes.

Keys, not modules: a mixture's experts are stored one by one (`experts.3.gate_proj.weight`) whatever the model does with
them in memory, and no model code is needed. A matrix `*.weight` is a linear layer's, unless its name says that it is an
embedding, or a router, whose few outputs decide which expert runs and which servers keep in high precision.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch

HEAD = "lm_head"
# Tables of tokens, which servers can keep quantized; positions, patches and the like are embeddings too.
_TOKENS = re.compile(r"(^|\.)(embed_tokens|tok_embeddings|word_embeddings|wte|embed_in)$")
_EMBEDDING = re.compile(r"(^|\.)([^.]*embed[^.]*|wte|wpe)(\.|$)")
# `mlp.gate` and `block_sparse_moe.gate` are routers, `gate_proj` is not; `shared_expert_gate` has one output.
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")
_STACKED_EXPERTS = re.compile(r"(^|\.)experts?\.[^.]*(proj|w[123]|gate_up)[^.]*(\.weight)?$")
HIGH_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


def module_name(key: str) -> str:
    """Name of the module that a weight belongs to."""
    return key.removesuffix(".weight")


def reason_to_skip(key: str, shape: Sequence[int], exclude: Sequence[str]) -> str | None:
    """Why a tensor stays as it is; None for the weight of a linear layer.

    Args:
        key: name of the tensor.
        shape: of the tensor.
        exclude: fnmatch patterns of module names.
    """
    name = module_name(key)
    if not key.endswith(".weight") or len(shape) != 2:
        return "no matrix of a linear layer"
    if _EMBEDDING.search(name):
        return "excluded embedding" if _is_excluded(key, exclude) else "embedding"
    if _is_excluded(key, exclude):
        return "excluded"
    return "router" if _ROUTER.search(name) else None


def is_token_embedding(key: str, shape: Sequence[int], exclude: Sequence[str]) -> bool:
    """Whether a tensor is the table of an embedding of tokens, and is not excluded."""
    is_table = key.endswith(".weight") and len(shape) == 2 and _TOKENS.search(module_name(key)) is not None
    return is_table and not _is_excluded(key, exclude)


def is_stacked_experts(key: str, shape: Sequence[int], exclude: Sequence[str]) -> bool:
    """Whether a tensor holds the weights of several experts, [experts, ...], and is not excluded."""
    return len(shape) == 3 and _STACKED_EXPERTS.search(key) is not None and not _is_excluded(key, exclude)


def _is_excluded(key: str, exclude: Sequence[str]) -> bool:
    return any(fnmatchcase(module_name(key), pattern) for pattern in exclude)


def is_expert(key: str) -> bool:
    """Whether a weight belongs to one expert of a mixture."""
    return re.search(r"(^|\.)experts\.\d+\.", key) is not None


def is_tied(config: Mapping[str, object], keys: Mapping[str, object]) -> bool:
    """Whether the output layer is the embedding: the configuration says so, or the file has none."""
    text = config.get("text_config")
    nested = isinstance(text, dict) and bool(text.get("tie_word_embeddings"))
    return bool(config.get("tie_word_embeddings")) or nested or f"{HEAD}.weight" not in keys


def refuse_stacked_experts(keys: Sequence[str]) -> None:
    """Raise ValueError if there are any."""
    if keys:
        raise ValueError(
            f"{len(keys)} tensors hold several experts each ({', '.join(keys[:3])}): no serving format stores those, "
            "and the file does not say which dimension is contracted. Save the model with one key per expert "
            "(save_pretrained of transformers 5 does), or exclude them by pattern."
        )
