"""Linear layers of a transformers model from its config.json, on the meta device: no weights are read."""

from __future__ import annotations

from pathlib import Path


def linear_shapes(folder: Path) -> list[tuple[str, int, int]]:
    """(name, N, K) of every `nn.Linear` of the model that a config.json describes.

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
    return linear_shapes(model)
