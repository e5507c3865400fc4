"""Linear layers and experts of a transformers model from its config.json, on the meta device: no weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from aotrain.nn.expert_work import Experts
    from aotrain.nn.layer_times import Layer


def layer_shapes(folder: Path) -> list[Layer]:
    """Every `nn.Linear` of the model that a config.json describes, then its experts with 3-D weights.

    Args:
        folder: holds config.json. Code beside it is never run.

    Raises:
        ImportError: transformers is not installed.
        ValueError: transformers does not know the model.
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(f"{error}; a config.json needs transformers: pip install 'aotrain[hf]'") from error
    import torch

    from aotrain.nn.plan import linear_shapes

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'}: not a model that transformers knows: {error}") from error
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError:  # not a causal language model
            model = AutoModel.from_config(config, trust_remote_code=False)
    return [*linear_shapes(model), *_experts(model, config)]


def _experts(model: torch.nn.Module, config: PretrainedConfig) -> Iterator[Experts]:
    from aotrain.nn.expert_work import Experts

    text = config.get_text_config()
    top_k = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None)
    for fqn, module in model.named_modules():
        # transformers marks its experts with the layout of their weights: [E, K, N] if transposed, else [E, N, K].
        if not hasattr(module, "is_transposed") or top_k is None:
            continue
        weights = {name: w.shape for name, w in module.named_parameters(recurse=False) if w.dim() == 3}
        n, k = (2, 1) if module.is_transposed else (1, 2)
        products = tuple((name, shape[n], shape[k]) for name, shape in weights.items())
        if products:
            yield Experts(fqn, products, next(iter(weights.values()))[0], top_k)
