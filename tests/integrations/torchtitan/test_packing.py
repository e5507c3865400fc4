"""Packing, turns among ranks, and a position that any number of ranks continues from."""

import itertools
import json

import pytest
from datasets import Dataset
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from aotrain.integrations.byte_tokenizer import byte_tokenizer_dir
from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.packing import PackedStream, PackedText, Turns, choose_num_streams

DOCUMENTS = ["abcdefghij", "kl", "mnopqrstuvwxyz0123456789", "A", "BCD", "EFGHIJKLMNOP"]
# Distinct texts of uneven length; enough for one per sequence of the global batch.
MANY = [f"<{index}>" + "abcdefghijklmnopqrstuvwxyz"[index % 26 :] for index in range(60)]
GLOBAL_BATCH = 12


@pytest.fixture
def tokenizer(tmp_path):
    return HuggingFaceTokenizer(tokenizer_path=str(byte_tokenizer_dir(tmp_path)))


@pytest.fixture(params=["map", "stream"])
def corpus(request):
    """Documents in memory, or streamed in the given number of shards."""

    def make(documents=DOCUMENTS, num_shards=1):
        dataset = Dataset.from_dict({"text": documents})
        return dataset if request.param == "map" else dataset.to_iterable_dataset(num_shards=num_shards)

    return make


def options(tokenizer, *, seq_len=8, infinite=True):
    return {"column": "text", "tokenizer": tokenizer, "seq_len": seq_len, "seed": 0, "infinite": infinite}


def plain(samples):
    return [(s["input"].tolist(), s["positions"].tolist(), labels.tolist()) for s, labels in samples]


def test_sequences_are_the_documents_end_to_end(corpus, tokenizer):
    samples = plain(PackedStream(corpus(), **options(tokenizer, infinite=False)))
    tokens = [[256, *text.encode(), 257] for text in DOCUMENTS]
    inputs = [token for document in tokens for token in document[:-1]]
    labels = [token for document in tokens for token in document[1:]]
    whole = len(inputs) // 8 * 8
    assert [token for sample in samples for token in sample[0]] == inputs[:whole]
    assert [token for sample in samples for token in sample[2]] == labels[:whole]


def test_positions_restart_with_each_document_and_sequence(corpus, tokenizer):
    first, second = plain(itertools.islice(PackedStream(corpus(), **options(tokenizer)), 2))
    # 11 inputs of the first document (bos and 10 letters), 3 of the second, then the third.
    assert first[1] == list(range(8))
    assert second[1] == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("taken", [0, 1, 2, 5, 9, 23])
def test_a_position_continues_exactly(corpus, tokenizer, taken):
    stream = PackedStream(corpus(), **options(tokenizer))
    iterator = iter(stream)
    for _ in range(taken):
        next(iterator)
    position = json.loads(json.dumps(stream.position()))
    resumed = PackedStream(corpus(), **options(tokenizer))
    resumed.seek(position)
    assert plain(itertools.islice(resumed, 10)) == plain(itertools.islice(iterator, 10))


def test_later_epochs_have_another_order(tokenizer):
    corpus = Dataset.from_dict({"text": [f"{i:07d}" for i in range(50)]})  # 8 inputs each: one sequence per document
    samples = plain(itertools.islice(PackedStream(corpus, **options(tokenizer)), 150))
    epochs = [samples[:50], samples[50:100], samples[100:]]
    assert epochs[0] != epochs[1] != epochs[2]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])


def test_a_stream_without_documents_is_an_error(corpus, tokenizer):
    with pytest.raises(JobError, match=r"a stream of documents is empty; .* data.shard_by=sequence"):
        next(iter(PackedStream(corpus().filter(lambda row: False), **options(tokenizer))))


@pytest.mark.parametrize(("num_streams", "num_ranks"), [*itertools.product([1, 2, 3, 4, 6, 8, 12], range(1, 13))])
def test_every_stream_and_turn_has_one_rank(num_streams, num_ranks):
    ranks = [Turns(num_streams, rank, num_ranks) for rank in range(num_ranks)]
    assert {stream for rank in ranks for stream in rank.streams} == set(range(num_streams))
    held = [(stream, rank.turn) for rank in ranks for stream in rank.streams]
    assert sorted(held) == sorted(itertools.product(range(num_streams), range(ranks[0].num_turns)))


@pytest.mark.parametrize(
    ("shard_by", "num_shards", "expected"),
    [("sequence", 8, 1), ("document", 8, 4), ("document", 1024, 4), ("document", 7, 1)],
)
def test_streams_of_a_hub_stream_are_whole_shards(shard_by, num_shards, expected):
    corpus = Dataset.from_dict({"text": ["x"] * num_shards}).to_iterable_dataset(num_shards=num_shards)
    assert choose_num_streams(corpus, shard_by, GLOBAL_BATCH) == expected


@pytest.mark.parametrize(
    ("shard_by", "documents", "expected"),
    [("sequence", 100, 1), ("document", 100, 12), ("document", 11, 6), ("document", 5, 4), ("document", 1, 1)],
)
def test_streams_of_documents_are_none_of_them_empty(shard_by, documents, expected):
    corpus = Dataset.from_dict({"text": ["x"] * documents})
    assert choose_num_streams(corpus, shard_by, GLOBAL_BATCH) == expected


class Ranks:
    """All data-parallel ranks of a run, in this process."""

    def __init__(self, corpus, tokenizer, *, num_ranks, num_streams, block=None):
        self.passes = GLOBAL_BATCH // num_ranks // (block or GLOBAL_BATCH // num_ranks)
        block = block or GLOBAL_BATCH // num_ranks
        self.texts = [
            PackedText(corpus(), turns=Turns(num_streams, rank, num_ranks), block=block, **options(tokenizer))
            for rank in range(num_ranks)
        ]
        self.iterators = None

    def steps(self, count):
        """The sequences of each of the next optimizer steps, as a set: their order within a step is free."""
        self.iterators = self.iterators or [iter(text) for text in self.texts]
        return [sorted(self._step()) for _ in range(count)]

    def _step(self):
        for _ in range(self.passes):
            for iterator in self.iterators:
                (inputs, labels), _ = next(iterator)
                yield from zip(inputs["input"].tolist(), inputs["positions"].tolist(), labels.tolist(), strict=True)

    def position(self):
        """What a checkpoint holds: the positions of all ranks under the names of the streams."""
        merged = {}
        for text in self.texts:
            position = json.loads(json.dumps(text.position()))
            for number, stream in position["streams"].items():
                # Ranks that run the same stream are at the same place.
                assert merged.setdefault(int(number), stream) == stream
            assert position["sequences"] == self.texts[0].position()["sequences"]
        return {"sequences": position["sequences"], "streams": merged}

    def seek(self, position):
        for text in self.texts:
            text.seek(position)


# Streams of both modes: one; fewer than ranks; shared between some; one per sequence.
STREAMS = [1, 2, 6, 12]


@pytest.mark.parametrize("num_streams", STREAMS)
@pytest.mark.parametrize(("num_ranks", "block"), [(1, 4), (2, None), (2, 3), (3, None), (3, 1), (4, None), (4, 1)])
def test_a_step_is_the_same_text_for_any_number_of_ranks(corpus, tokenizer, num_streams, num_ranks, block):
    def shards():
        return corpus(MANY, 12)

    # Over the end of the first epoch.
    alone = Ranks(shards, tokenizer, num_ranks=1, num_streams=num_streams).steps(16)
    together = Ranks(shards, tokenizer, num_ranks=num_ranks, num_streams=num_streams, block=block).steps(16)
    assert together == alone


@pytest.mark.parametrize("num_streams", STREAMS)
@pytest.mark.parametrize(("saving", "loading"), [*itertools.permutations([1, 2, 3, 4], 2)])
def test_a_position_of_some_ranks_continues_on_others(corpus, tokenizer, num_streams, saving, loading):
    def shards():
        return corpus(MANY, 12)

    alone = Ranks(shards, tokenizer, num_ranks=1, num_streams=num_streams).steps(6)
    before = Ranks(shards, tokenizer, num_ranks=saving, num_streams=num_streams)
    assert before.steps(3) == alone[:3]
    after = Ranks(shards, tokenizer, num_ranks=loading, num_streams=num_streams, block=1)
    after.seek(before.position())
    assert after.steps(3) == alone[3:]
    assert after.position()["sequences"] == 6 * GLOBAL_BATCH


@pytest.mark.parametrize("num_streams", [1, 12])
def test_batches_of_two_ranks_are_passes_of_one(corpus, tokenizer, num_streams):
    """Then their operands have the same scales, and only the order of sums of gradients may differ."""

    def batches(rank, num_ranks):
        text = PackedText(corpus(MANY, 12), turns=Turns(num_streams, rank, num_ranks), block=3, **options(tokenizer))
        return [inputs["input"].tolist() for (inputs, _), _ in itertools.islice(text, 4 // num_ranks)]

    assert sorted(batches(0, 2) + batches(1, 2)) == sorted(batches(0, 1))


def test_one_stream_takes_up_a_changed_batch_and_number_of_ranks(corpus, tokenizer):
    one = PackedText(corpus(), turns=Turns(1, 0, 1), block=5, **options(tokenizer))
    iterator = iter(one)
    next(iterator)
    position = one.position()
    expected = [sample for (inputs, _), _ in itertools.islice(iterator, 2) for sample in inputs["input"].tolist()][:8]
    found = []
    for rank in range(2):
        text = PackedText(corpus(), turns=Turns(1, rank, 2), block=4, **options(tokenizer))
        text.seek(position)
        (inputs, _), _ = next(iter(text))
        found += inputs["input"].tolist()
    assert found == expected


def test_documents_are_divided_among_streams(corpus, tokenizer):
    seen = []
    for rank in range(2):
        settings = options(tokenizer, infinite=False, seq_len=2)
        text = PackedText(corpus(num_shards=2), turns=Turns(2, rank, 2), block=1, **settings)
        seen.append({token for (inputs, _), _ in text for token in inputs["input"].flatten().tolist() if token < 256})
    assert seen[0]
    assert seen[1]
    assert not seen[0] & seen[1]


def test_ranks_stop_at_the_same_batch_when_documents_run_out(corpus, tokenizer):
    counts = [
        len(list(PackedText(corpus(), turns=Turns(1, rank, 2), block=2, **options(tokenizer, infinite=False))))
        for rank in range(2)
    ]
    assert counts == [1, 1]  # 7 sequences: the last 3 do not fill both ranks' batches
