"""The byte tokenizer through torchtitan's own component, its cache, and tokenizers that cannot be had."""

import json

import pytest
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from aotrain.integrations.byte_tokenizer import BYTE_VOCAB_SIZE, byte_tokenizer_dir
from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.tokenizer import resolve_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    return HuggingFaceTokenizer(tokenizer_path=str(byte_tokenizer_dir(tmp_path)))


TEXTS = [
    "",
    "hello",
    "  two  spaces\n\tand a tab\r\n",
    "f\u00fcr 10 \u20ac \U0001f600",
    "def f(x):\n    return x\n",
    "\x00\x7f\x1b",
]


@pytest.mark.parametrize("text", TEXTS, ids=["empty", "word", "spaces", "unicode", "code", "control"])
def test_ids_are_the_bytes_and_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text, add_bos=False, add_eos=False)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_every_byte_has_its_own_id(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(BYTE_VOCAB_SIZE))
    assert tokenizer.get_vocab_size() == BYTE_VOCAB_SIZE == 259


def test_special_tokens_come_after_the_bytes(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 257)
    assert tokenizer.encode("a", add_bos=True, add_eos=True) == [256, 97, 257]
    assert tokenizer.token_to_id("<|pad|>") == 258


def test_special_tokens_are_not_words_of_the_alphabet(tokenizer):
    ids = tokenizer.encode("a<|eos|>b", add_bos=False, add_eos=False)
    assert ids == [97, 257, 98]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_it_is_built_once(tmp_path):
    folder = byte_tokenizer_dir(tmp_path)
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert byte_tokenizer_dir(tmp_path) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_an_incomplete_cache_is_repaired(tmp_path):
    folder = byte_tokenizer_dir(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    byte_tokenizer_dir(tmp_path)
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|eos|>"


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    assert resolve_tokenizer("byte").is_relative_to(tmp_path / "here" / "aotrain" / "tokenizers")


def test_a_local_folder_is_taken_as_it_is(tmp_path):
    folder = byte_tokenizer_dir(tmp_path)
    assert resolve_tokenizer(str(folder)) == folder


def test_a_folder_without_tokenizer_names_what_it_found(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(JobError, match=r"has no tokenizer.json \(found model.bin\)"):
        resolve_tokenizer(str(tmp_path))


def test_a_hub_id_that_cannot_be_fetched(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        JobError, match=r"'some/model' is not 'byte', .* \(no network\). Check the name and the network"
    ):
        resolve_tokenizer("some/model")


def test_a_malformed_hub_id():
    with pytest.raises(JobError, match="tokenizer: 'not a name//' is not 'byte'"):
        resolve_tokenizer("not a name//")
