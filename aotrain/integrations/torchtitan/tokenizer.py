"""Tokenizers by name: ``byte`` (built here), a local folder, or an id of the Hugging Face hub.

``resolve_tokenizer`` returns a folder that torchtitan's own ``HuggingFaceTokenizer`` loads. The byte tokenizer maps
each UTF-8 byte to one id (0..255) and has three special ids after them; it needs no training and no network, and every
text round-trips. It is built once and kept in the user's cache folder.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from aotrain.integrations.config_file import JobError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

# 256 bytes and the three specials, in that order.
BYTE_VOCAB_SIZE = 259

# Part of the cache path: raise it when the files below change, so that an older cache is not picked up.
_BYTE_VERSION = "byte-v1"

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


def byte_tokenizer_dir(cache_dir: Path | None = None) -> Path:
    """The byte tokenizer's folder, built if it is not in the cache.

    Args:
        cache_dir: parent folder; default $XDG_CACHE_HOME or ~/.cache, then aotrain/tokenizers.
    """
    parent = cache_dir or _default_cache_dir()
    target = parent / _BYTE_VERSION
    if (target / "tokenizer.json").is_file() and (target / "tokenizer_config.json").is_file():
        return target
    parent.mkdir(parents=True, exist_ok=True)
    # Several ranks may get here at once: each builds its own folder, the first rename wins, the others are dropped.
    with tempfile.TemporaryDirectory(dir=parent, prefix=".building-") as scratch:
        building = Path(scratch) / _BYTE_VERSION
        building.mkdir()
        _write_byte_tokenizer(building)
        try:
            building.rename(target)
        except OSError:
            # Somebody was faster, or an older, incomplete folder is in the way: replace the files one by one.
            target.mkdir(exist_ok=True)
            for file in building.iterdir():
                os.replace(file, target / file.name)
    return target


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "aotrain" / "tokenizers"


def _write_byte_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # The ByteLevel alphabet spells each byte as one printable character. Sorting it by the byte that a character
    # stands for gives id == byte.
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    # No regex: without merges, splitting into words first would change nothing.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": True,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _byte_characters() -> list[str]:
    """The character that the ByteLevel alphabet of GPT-2 uses for each byte, by byte value.

    Printable Latin-1 characters stand for themselves; the other bytes take the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, spare = [], 256
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(spare))
            spare += 1
    return characters


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
