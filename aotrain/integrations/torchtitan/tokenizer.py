"""Tokenizers by name: ``byte`` (built by us), a local folder, or an id of the Hugging Face hub.

``resolve_tokenizer`` returns a folder that torchtitan's own ``HuggingFaceTokenizer`` loads.
"""

from __future__ import annotations

from pathlib import Path

from aotrain.integrations.byte_tokenizer import byte_tokenizer_dir
from aotrain.integrations.config_file import JobError

_HUB_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def resolve_tokenizer(name: str) -> Path:
    """The folder that holds the tokenizer's files.

    Args:
        name: "byte", a folder with tokenizer.json, or a hub id such as "meta-llama/Llama-3.1-8B".

    Raises:
        JobError: when there is no such folder or the hub does not give it.
    """
    if name == "byte":
        return byte_tokenizer_dir()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "tokenizer.json").is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise JobError(f"tokenizer: {folder} has no tokenizer.json (found {found})")
        return folder
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise JobError(
            f"tokenizer: {name!r} is not 'byte', not a local folder, and cannot be fetched from the hub ({reason}). "
            "Check the name and the network; a gated model needs HF_TOKEN"
        ) from error
    if not (folder / "tokenizer.json").is_file():
        raise JobError(f"tokenizer: {name!r} on the hub has no tokenizer.json; convert it with transformers first")
    return folder
