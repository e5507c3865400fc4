"""From documents to sequences: tokenize, pack, take turns among ranks, remember the position.

Documents are laid end to end and cut into sequences of ``seq_len`` tokens. Labels are the next token of the same
document; positions count from 0 within each document's part of a sequence, which is how torchtitan finds document
boundaries.

What is read must not depend on how many ranks read it. So the number of streams of sequences is fixed for a run: one,
or with ``shard_by: document`` a divisor S of the sequences per optimizer step, each with its own part of the documents.
Every optimizer step takes equally many sequences from each stream, in order. R ranks fall into gcd(S, R) groups; a
group runs S / gcd of the streams round robin, and its members take turns of ``block`` sequences. With one stream, all
ranks run it; with as many streams as ranks or a multiple, each rank runs its own.

A position is, per stream, a document number and a token offset, not buffers; and it is the same one for every rank of
a group, because a rank goes on to the end of the turn before it hands out its own batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset
from torchtitan.components.tokenizer import BaseTokenizer

from aotrain.integrations.config_file import JobError

Sample = tuple[dict[str, torch.Tensor], torch.Tensor]


def choose_num_streams(corpus: Any, shard_by: str, global_batch: int) -> int:
    """How many streams a corpus is read in: a number that depends on the corpus and the global batch, not on ranks.

    Args:
        corpus: from ``load_corpus``.
        shard_by: "sequence": one stream. "document": as many as the global batch can be divided into with something to
            read in each. The shards of a hub stream are not cut, as each part would read all of the shard.
        global_batch: sequences per optimizer step.
    """
    if shard_by == "sequence":
        return 1
    if isinstance(corpus, Dataset):
        return next(size for size in range(min(global_batch, len(corpus)), 0, -1) if global_batch % size == 0)
    return math.gcd(global_batch, corpus.num_shards)


@dataclass(frozen=True, slots=True)
class Turns:
    """Which streams a rank runs, and when it is its turn to keep what they give.

    Args:
        num_streams: S.
        rank: place among the data-parallel ranks.
        num_ranks: R.
    """

    num_streams: int
    rank: int
    num_ranks: int

    @property
    def num_groups(self) -> int:
        """Groups of ranks that run the same streams."""
        return math.gcd(self.num_streams, self.num_ranks)

    @property
    def streams(self) -> range:
        """Numbers of the streams of this rank's group.

        Neighbours, so that with a stream per sequence the batches of two ranks are those of two passes of one rank.
        """
        size = self.num_streams // self.num_groups
        group = self.rank // self.num_turns
        return range(group * size, (group + 1) * size)

    @property
    def turn(self) -> int:
        """Place of this rank within its group."""
        return self.rank % self.num_turns

    @property
    def num_turns(self) -> int:
        """Ranks of a group."""
        return self.num_ranks // self.num_groups


class PackedStream:
    """One stream of sequences.

    Iterating yields ``({"input": [L], "positions": [L]}, labels [L])``, all int64. ``position`` is then the place
    after the sequence that was yielded last.

    Args:
        corpus: documents, map-style or streamed.
        column: the text column.
        tokenizer: with ``encode(text, add_bos, add_eos)``.
        seq_len: L, tokens per sequence.
        seed: order of the epochs after the first.
        infinite: start over when the documents run out.
    """

    def __init__(
        self, corpus: Any, *, column: str, tokenizer: BaseTokenizer, seq_len: int, seed: int, infinite: bool
    ) -> None:
        self._corpus = corpus
        self._column = column
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._seed = seed
        self._infinite = infinite
        # Position: epoch, document within it, and first token of that document that is not yet in a sequence.
        self._epoch = 0
        self._document = 0
        self._offset = 0
        # A hub stream's own position in front of the current document.
        self._source: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Sample]:
        inputs: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        while True:
            for tokens in self._tokenized():
                # The last token is only a label.
                while self._offset < len(tokens) - 1:
                    take = min(self._seq_len - len(inputs), len(tokens) - 1 - self._offset)
                    start, end = self._offset, self._offset + take
                    inputs += tokens[start:end]
                    labels += tokens[start + 1 : end + 1]
                    positions += range(take)
                    self._offset = end
                    if len(inputs) < self._seq_len:
                        continue
                    yield {"input": torch.tensor(inputs), "positions": torch.tensor(positions)}, torch.tensor(labels)
                    inputs, labels, positions = [], [], []
            if not self._infinite:
                return
            if self._document == 0:
                # Without this, an empty stream would be read for ever.
                raise JobError("data: a stream of documents is empty; give more text or set data.shard_by=sequence")
            self._epoch += 1
            self._document, self._source = 0, None

    def _tokenized(self) -> Iterator[list[int]]:
        """Token ids of each document from the current position on; advances the position when one is done."""
        for text in self._texts():
            yield self._tokenizer.encode(text, add_bos=True, add_eos=True)
            self._document += 1
            self._offset = 0

    def _texts(self) -> Iterator[str]:
        if isinstance(self._corpus, Dataset):
            corpus = self._corpus if self._epoch == 0 else self._corpus.shuffle(seed=self._seed + self._epoch)
            for index in range(self._document, len(corpus)):
                yield str(corpus[index][self._column])
            return
        self._corpus.set_epoch(self._epoch)
        if self._source is not None:
            self._corpus.load_state_dict(self._source)
        rows = iter(self._corpus)
        while True:
            self._source = self._corpus.state_dict()
            row = next(rows, None)
            if row is None:
                return
            yield row[self._column]

    def position(self) -> dict[str, Any]:
        """Where the next sequence starts; JSON can hold it."""
        return {"epoch": self._epoch, "document": self._document, "offset": self._offset, "source": self._source}

    def seek(self, position: dict[str, Any]) -> None:
        """Go to a ``position`` of such a stream; takes effect for iterators that are made afterwards."""
        self._epoch = position["epoch"]
        self._document = position["document"]
        self._offset = position["offset"]
        self._source = position["source"]


class PackedText(IterableDataset):
    """Batches of one rank, each with the position after it.

    Yields ``(batch, position)``: the batch is ``({"input": [B, L], "positions": [B, L]}, labels [B, L])``. A last batch
    that would not be full is dropped, on every rank of the group alike.

    Args:
        corpus: all documents.
        turns: this rank's part.
        block: B, sequences per batch.
        stream_options: of each ``PackedStream``.
    """

    def __init__(self, corpus: Any, *, turns: Turns, block: int, **stream_options: Any) -> None:
        self._turns = turns
        self._block = block
        # Sequences that the streams of this rank have given, those of other ranks of the group included.
        self._cut = 0
        self._streams = {
            number: PackedStream(_part(corpus, number, turns.num_streams), **stream_options) for number in turns.streams
        }

    def __iter__(self) -> Iterator[tuple[Sample, dict[str, Any]]]:
        iterators = [iter(stream) for stream in self._streams.values()]
        first = self._turns.turn * self._block
        while True:
            samples: list[Sample] = []
            for slot in range(self._turns.num_turns * self._block):
                sample = next(iterators[self._cut % len(iterators)], None)
                if sample is None:
                    return
                self._cut += 1
                if first <= slot < first + self._block:
                    samples.append(sample)
            yield _stacked(samples), self.position()

    def position(self) -> dict[str, Any]:
        """Sequences read so far by all ranks together, and the position of each stream of this rank."""
        return {
            "sequences": self._cut * self._turns.num_groups,
            "streams": {number: stream.position() for number, stream in self._streams.items()},
        }

    def seek(self, position: dict[str, Any]) -> None:
        """Go to a ``position`` of any number of ranks, taken at the end of an optimizer step."""
        self._cut = position["sequences"] // self._turns.num_groups
        for number, stream in self._streams.items():
            stream.seek(position["streams"][number])


def _part(corpus: Any, number: int, num_streams: int) -> Any:
    return corpus if num_streams == 1 else split_dataset_by_node(corpus, number, num_streams)


def _stacked(samples: list[Sample]) -> Sample:
    inputs = {key: torch.stack([sample[key] for sample, _ in samples]) for key in samples[0][0]}
    return inputs, torch.stack([labels for _, labels in samples])
