"""Packing, sharing among ranks, and the position that a checkpoint keeps."""

import itertools
import json

import pytest
import torch
from datasets import Dataset
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.data import PackedText, TextDataLoader
from aotrain.integrations.torchtitan.job import Data
from aotrain.integrations.torchtitan.tokenizer import byte_tokenizer_dir

DOCUMENTS = ["abcdefghij", "kl", "mnopqrstuvwxyz0123456789", "A", "BCD", "EFGHIJKLMNOP"]


@pytest.fixture
def tokenizer(tmp_path):
    return HuggingFaceTokenizer(tokenizer_path=str(byte_tokenizer_dir(tmp_path)))


@pytest.fixture(params=["map", "stream"])
def corpus(request):
    dataset = Dataset.from_dict({"text": DOCUMENTS})
    return lambda: dataset if request.param == "map" else dataset.to_iterable_dataset()


def packed(corpus, tokenizer, *, seq_len=8, block=2, rank=0, num_ranks=1, shard_by="sequence", infinite=True):
    return PackedText(
        corpus,
        column="text",
        tokenizer=tokenizer,
        seq_len=seq_len,
        block=block,
        rank=rank,
        num_ranks=num_ranks,
        shard_by=shard_by,
        seed=0,
        infinite=infinite,
    )


def plain(samples):
    return [(s["input"].tolist(), s["positions"].tolist(), labels.tolist()) for s, labels in samples]


def test_sequences_are_the_documents_end_to_end(corpus, tokenizer):
    samples = plain(packed(corpus(), tokenizer, infinite=False))
    tokens = [[256, *text.encode(), 257] for text in DOCUMENTS]
    inputs = [token for document in tokens for token in document[:-1]]
    labels = [token for document in tokens for token in document[1:]]
    whole = len(inputs) // 8 * 8
    assert [token for sample in samples for token in sample[0]] == inputs[:whole]
    assert [token for sample in samples for token in sample[2]] == labels[:whole]


def test_positions_restart_with_each_document_and_sequence(corpus, tokenizer):
    first, second = plain(itertools.islice(packed(corpus(), tokenizer), 2))
    # 11 inputs of the first document (bos and 10 letters), 3 of the second, then the third.
    assert first[1] == list(range(8))
    assert second[1] == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_step_sees_the_same_text_with_any_number_of_ranks(corpus, tokenizer, num_ranks):
    total = 6
    alone = plain(itertools.islice(packed(corpus(), tokenizer, block=total), 2 * total))
    block = total // num_ranks
    ranks = [
        plain(itertools.islice(packed(corpus(), tokenizer, block=block, rank=rank, num_ranks=num_ranks), 2 * block))
        for rank in range(num_ranks)
    ]
    for step in range(2):
        together = [sample for samples in ranks for sample in samples[step * block : (step + 1) * block]]
        assert together == alone[step * total : (step + 1) * total]


def test_documents_are_divided_among_ranks(corpus, tokenizer):
    seen = []
    for rank in range(2):
        samples = packed(corpus(), tokenizer, rank=rank, num_ranks=2, shard_by="document", infinite=False, seq_len=2)
        seen.append({token for sample in plain(samples) for token in sample[0] if token < 256})
    assert seen[0]
    assert seen[1]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("taken", [0, 1, 2, 5, 9, 23])
def test_a_position_continues_exactly(corpus, tokenizer, taken):
    stream = packed(corpus(), tokenizer)
    iterator = iter(stream)
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = packed(corpus(), tokenizer)
    resumed.load_state_dict(state)
    assert plain(itertools.islice(resumed, 10)) == plain(itertools.islice(iterator, 10))


def test_later_epochs_have_another_order(tokenizer):
    corpus = Dataset.from_dict({"text": [f"{i:07d}" for i in range(50)]})  # 8 inputs each: one sequence per document
    samples = plain(itertools.islice(packed(corpus, tokenizer), 150))
    epochs = [samples[:50], samples[50:100], samples[100:]]
    assert epochs[0] != epochs[1] != epochs[2]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])


def loader(tokenizer, *, rank=0, num_ranks=1, **options):
    config = TextDataLoader.Config(data=Data(global_batch_size=2), **options)
    return config.build(dp_world_size=num_ranks, dp_rank=rank, tokenizer=tokenizer, seq_len=32, local_batch_size=2)


def test_the_loader_continues_from_its_state(tokenizer):
    first = loader(tokenizer)
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    state = first.state_dict()
    json.loads(state["dp_rank_0"])  # no pickle
    second = loader(tokenizer)
    second.load_state_dict(state)
    for (left, left_labels), (right, right_labels), _ in zip(iterator, second, range(4), strict=False):
        assert torch.equal(left["input"], right["input"])
        assert torch.equal(left_labels, right_labels)


def test_a_background_process_reads_the_same_text(tokenizer):
    here = [batch["input"] for (batch, _), _ in zip(loader(tokenizer), range(3), strict=False)]
    there = [batch["input"] for (batch, _), _ in zip(loader(tokenizer, num_workers=1), range(3), strict=False)]
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_state_of_another_number_of_ranks_is_refused(tokenizer):
    state = loader(tokenizer).state_dict()
    with pytest.raises(JobError, match=r"saved by 1 data-parallel ranks, this run has 2; resume with 1"):
        loader(tokenizer, num_ranks=2).load_state_dict(state)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    with pytest.raises(JobError, match="it has 259 tokens, but the model embeds 256"):
        loader(tokenizer, vocab_size=256)
