"""The dataloader that torchtitan drives, on every kind of corpus: the same steps and positions for all ranks."""

import copy
import functools
import itertools
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from datasets import Dataset, IterableDataset
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from aotrain.integrations.byte_tokenizer import byte_tokenizer_dir
from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan import corpora
from aotrain.integrations.torchtitan.data import TextDataLoader
from aotrain.integrations.torchtitan.job import Data
from tests.distributed.ranks import run_ranks

KINDS = ["stdlib", "text", "json", "parquet", "hub", "c4"]
GLOBAL_BATCH = 12
SEQ_LEN = 16


@pytest.fixture
def tokenizer(tmp_path):
    return HuggingFaceTokenizer(tokenizer_path=str(byte_tokenizer_dir(tmp_path)))


@pytest.fixture
def make_data(tmp_path, monkeypatch):
    """The data section of a corpus of each kind; the hub's is a local stream in twelve shards."""
    rows = Dataset.from_dict({"text": [f"{index}: " + "lorem ipsum " * (index % 5) for index in range(300)]})
    monkeypatch.setattr(corpora, "load_dataset", _local_or(rows, corpora.load_dataset))
    monkeypatch.setattr("aotrain.integrations.torchtitan.data.load_corpus", _loaded_once())

    def make(kind: str, shard_by: str) -> Data:
        path = None
        if kind == "text":
            path = tmp_path / "text"
            path.mkdir()
            for index in range(30):
                (path / f"{index}.txt").write_text(f"{index} dolor sit amet " * 20)
        elif kind == "json":
            path = tmp_path / "rows.jsonl"
            rows.to_json(path)
        elif kind == "parquet":
            path = tmp_path / "rows.parquet"
            rows.to_parquet(path)
        elif kind == "hub":
            path = "someone/text"
        return Data(dataset=kind, path=path and str(path), shard_by=shard_by, global_batch_size=GLOBAL_BATCH)

    return make


def _local_or(rows, load_dataset):
    def load(path, **settings):
        if settings.get("streaming"):
            return rows.to_iterable_dataset(num_shards=12)
        return load_dataset(path, **settings)

    return load


def _loaded_once():
    """``load_corpus``, which takes a second for some kinds; streams keep a position, so each rank has its own."""
    cached = functools.cache(lambda key, split, seed: corpora.load_corpus(Data.model_validate_json(key), split, seed))

    def load(data, split, seed):
        corpus = cached(data.model_dump_json(), split, seed)
        return copy.deepcopy(corpus) if isinstance(corpus, IterableDataset) else corpus

    return load


def loaders(data, tokenizer, num_ranks, *, block=None, **options):
    config = TextDataLoader.Config(data=data, global_batch=GLOBAL_BATCH, **options)
    return [
        config.build(
            dp_world_size=num_ranks,
            dp_rank=rank,
            tokenizer=tokenizer,
            seq_len=SEQ_LEN,
            local_batch_size=block or GLOBAL_BATCH // num_ranks,
        )
        for rank in range(num_ranks)
    ]


def steps(ranks, count, *, block=None):
    """Sequences of each optimizer step of all ranks, sorted."""
    passes = GLOBAL_BATCH // len(ranks) // (block or GLOBAL_BATCH // len(ranks))
    iterators = [iter(rank) for rank in ranks]
    found = []
    for _ in range(count):
        batches = [next(iterator) for iterator in iterators for _ in range(passes)]
        found.append(
            sorted((row, labels_row) for pair in batches for row, labels_row in zip(*_rows(pair), strict=True))
        )
    return found


def _rows(batch):
    inputs, labels = batch
    return inputs["input"].tolist(), labels.tolist()


@pytest.mark.parametrize("shard_by", ["sequence", "document"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_any_ranks_reads_the_same_steps_and_continues_on_any(kind, shard_by, make_data, tokenizer):
    data = make_data(kind, shard_by)
    alone = steps(loaders(data, tokenizer, 1), 4)
    assert alone[0] != alone[1]
    for saving, loading in [(1, 3), (2, 1), (2, 3), (3, 2), (4, 4)]:
        ranks = loaders(data, tokenizer, saving)
        assert steps(ranks, 2) == alone[:2]
        # As DCP does: one dict of all ranks' entries.
        merged = {key: value for rank in ranks for key, value in rank.state_dict().items()}
        resumed = loaders(data, tokenizer, loading, block=1)
        for rank in resumed:
            assert rank.state_dict().keys() <= merged.keys()
            rank.load_state_dict({key: merged[key] for key in rank.state_dict()})
        assert steps(resumed, 2, block=1) == alone[2:]


MODES = ("sequence", "document")


def read_and_save(rank, num_ranks, folder, tokenizer_dir):
    """One of the saving ranks: a step of each mode, then a checkpoint."""
    for shard_by in MODES:
        loader = of_rank(rank, num_ranks, tokenizer_dir, shard_by)
        next(iter(loader))
        dcp.save({"dataloader": loader}, checkpoint_id=f"{folder}/{shard_by}")


def load_and_read(rank, num_ranks, folder, tokenizer_dir):
    """One of the loading ranks: its part of the next step of each mode."""
    found = {}
    for shard_by in MODES:
        loader = of_rank(rank, num_ranks, tokenizer_dir, shard_by)
        dcp.load({"dataloader": loader}, checkpoint_id=f"{folder}/{shard_by}")
        (inputs, _) = next(iter(loader))
        found[shard_by] = inputs["input"]
    return found


def of_rank(rank, num_ranks, tokenizer_dir, shard_by):
    tokenizer = HuggingFaceTokenizer(tokenizer_path=tokenizer_dir)
    return loaders(Data(shard_by=shard_by, global_batch_size=GLOBAL_BATCH), tokenizer, num_ranks)[rank]


def test_a_checkpoint_of_two_ranks_is_continued_by_three(tmp_path):
    tokenizer_dir = str(byte_tokenizer_dir(tmp_path))
    run_ranks(read_and_save, 2, str(tmp_path), tokenizer_dir)
    parts = run_ranks(load_and_read, 3, str(tmp_path), tokenizer_dir)
    for shard_by in MODES:
        second = steps([of_rank(0, 1, tokenizer_dir, shard_by)], 2)[1]
        assert sorted(torch.cat([part[shard_by] for part in parts]).tolist()) == [row for row, _ in second]


def test_only_documents_are_dealt_onto_several_streams(make_data, tokenizer):
    for kind, shard_by, expected in [("stdlib", "sequence", 1), ("stdlib", "document", 12), ("c4", "document", 12)]:
        (rank,) = loaders(make_data(kind, shard_by), tokenizer, 1)
        assert rank.state_dict()["num_streams"] == expected


def loader(tokenizer, **options):
    (only,) = loaders(Data(global_batch_size=GLOBAL_BATCH), tokenizer, 1, block=2, **options)
    return only


def test_the_state_is_small_and_no_pickle(tokenizer):
    first = loader(tokenizer, largest_batch=7)
    next(iter(first))
    state = first.state_dict()
    position = json.loads(state.pop("stream_0"))
    assert position.keys() == {"epoch", "document", "offset", "source"}
    assert state == {"global_batch": GLOBAL_BATCH, "largest_batch": 7, "num_streams": 1, "sequences": 2}


@pytest.mark.parametrize(("saving", "loading"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_a_background_process_reads_and_continues_the_same_text(tokenizer, saving, loading):
    whole = [inputs["input"] for (inputs, _), _ in zip(loader(tokenizer), range(8), strict=False)]
    first = loader(tokenizer, num_workers=saving)
    before = [inputs["input"] for inputs, _ in itertools.islice(first, 4)]
    second = loader(tokenizer, num_workers=loading)
    second.load_state_dict(first.state_dict())
    after = [inputs["input"] for inputs, _ in itertools.islice(second, 4)]
    assert torch.equal(torch.stack(before + after), torch.stack(whole))


def test_a_state_of_other_streams_is_refused(make_data, tokenizer):
    (documents,) = loaders(make_data("stdlib", "document"), tokenizer, 1)
    with pytest.raises(JobError, match=r"data position is of 12 streams, this run reads 1; resume with the corpus"):
        loader(tokenizer).load_state_dict(documents.state_dict())


def test_streams_of_a_checkpoint_are_kept_when_the_batch_grows(make_data, tokenizer):
    data = make_data("stdlib", "document")
    (first,) = loaders(data, tokenizer, 1)
    steps([first], 1)
    config = TextDataLoader.Config(data=data, global_batch=2 * GLOBAL_BATCH, num_streams=12)
    second = config.build(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=SEQ_LEN, local_batch_size=24)
    second.load_state_dict(first.state_dict())
    (inputs, _) = next(iter(second))
    (small,) = loaders(data, tokenizer, 1)
    expected = [row for step in steps([small], 3)[1:] for row, _ in step]
    assert sorted(inputs["input"].tolist()) == sorted(expected)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    with pytest.raises(JobError, match="it has 259 tokens, but the model embeds 256"):
        loader(tokenizer, vocab_size=256)
