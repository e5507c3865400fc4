"""The byte tokenizer, in the files that transformers, TRL and torchtitan load: no training, no network.

Each UTF-8 byte is one id (0..255), with three special ids after them, so every text round-trips. The files are built
once and kept in the user's cache folder.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

# 256 bytes and the three specials, in that order.
BYTE_VOCAB_SIZE = 259

# Part of the cache path: raise it when the files below change, so that an older cache is not picked up.
_BYTE_VERSION = "byte-v1"


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
