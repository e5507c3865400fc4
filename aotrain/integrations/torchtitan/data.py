"""From documents to batches: tokenize, pack, share among ranks, remember the position.

Documents are laid end to end and cut into sequences of ``seq_len`` tokens. Labels are the next token of the same
document; positions count from 0 within each document's part of a sequence, which is how torchtitan finds document
boundaries.

With ``shard_by: sequence`` there is one stream of sequences, numbered 0, 1, 2, ..., and block ``b`` of ``batch_size``
of them belongs to rank ``b mod ranks``. The union over ranks and accumulation steps of one optimizer step is therefore
the same text for every number of ranks, as long as the global batch size stays.

The position that a checkpoint holds is a document number and a token offset, not buffers: a few bytes of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.corpora import load_corpus, text_column
from aotrain.integrations.torchtitan.job import Data

Sample = tuple[dict[str, torch.Tensor], torch.Tensor]


class PackedText(IterableDataset, Stateful):
    """Sequences of one rank.

    Yields ``({"input": [L], "positions": [L]}, labels [L])``, all int64.

    Args:
        corpus: documents, map-style or streamed.
        column: the text column.
        tokenizer: with ``encode(text, add_bos, add_eos)``.
        seq_len: L, tokens per sequence.
        block: sequences that one rank takes in a row (its batch size); with ``shard_by`` "sequence".
        rank, num_ranks: place among the data-parallel ranks.
        shard_by: "sequence" or "document".
        seed: order of the epochs after the first.
        infinite: start over when the documents run out.
    """

    def __init__(
        self,
        corpus: Any,
        *,
        column: str,
        tokenizer: BaseTokenizer,
        seq_len: int,
        block: int,
        rank: int,
        num_ranks: int,
        shard_by: str,
        seed: int,
        infinite: bool,
    ) -> None:
        if shard_by == "document" and num_ranks > 1:
            corpus = split_dataset_by_node(corpus, rank, num_ranks)
            rank, num_ranks = 0, 1
        self._corpus = corpus
        self._column = column
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._block = block
        self._rank, self._num_ranks = rank, num_ranks
        self._seed = seed
        self._infinite = infinite
        # Position: epoch, document within it, first token of that document that is not yet in a sequence, and the
        # number of sequences cut so far.
        self._epoch = 0
        self._document = 0
        self._offset = 0
        self._count = 0
        # A stream's own position in front of the current document.
        self._stream: dict[str, Any] | None = None

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
                    mine = self._count // self._block % self._num_ranks == self._rank
                    self._count += 1
                    if mine:
                        sample = {"input": torch.tensor(inputs), "positions": torch.tensor(positions)}
                        yield sample, torch.tensor(labels)
                    inputs, labels, positions = [], [], []
            if not self._infinite:
                return
            self._epoch += 1
            self._document, self._stream = 0, None

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
        if self._stream is not None:
            self._corpus.load_state_dict(self._stream)
        rows = iter(self._corpus)
        while True:
            self._stream = self._corpus.state_dict()
            row = next(rows, None)
            if row is None:
                return
            yield row[self._column]

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "document": self._document,
            "offset": self._offset,
            "count": self._count,
            "stream": self._stream,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epoch = state_dict["epoch"]
        self._document = state_dict["document"]
        self._offset = state_dict["offset"]
        self._count = state_dict["count"]
        self._stream = state_dict["stream"]


class TextDataLoader(ParallelAwareDataloader):
    """torchtitan dataloader over ``PackedText``."""

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        data: Data = field(default_factory=Data)
        """The job's data section."""

        split: str = "train"
        """train or validation."""

        seed: int = 0
        """Order of the documents."""

        vocab_size: int | None = None
        """Token ids that the model can embed; a tokenizer with more is refused."""

        infinite: bool = True
        """Start over when the documents run out."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = 1,
        **unused: object,
    ) -> None:
        size = tokenizer.get_vocab_size()
        if config.vocab_size is not None and size > config.vocab_size:
            raise JobError(
                f"tokenizer: it has {size} tokens, but the model embeds {config.vocab_size}; "
                "choose the tokenizer that belongs to the model"
            )
        dataset = PackedText(
            load_corpus(config.data, config.split, config.seed),
            column=text_column(config.data),
            tokenizer=tokenizer,
            seq_len=seq_len,
            block=local_batch_size,
            rank=dp_rank,
            num_ranks=dp_world_size,
            shard_by=config.data.shard_by,
            seed=config.seed,
            infinite=config.infinite,
        )
        super().__init__(
            dataset,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            batch_size=local_batch_size,
            num_workers=config.num_workers,
            persistent_workers=config.persistent_workers,
            pin_memory=config.pin_memory,
            prefetch_factor=config.prefetch_factor,
            snapshot_every_n_steps=snapshot_every_n_steps,
        )

    # The base class pickles this state; JSON says the same and can be loaded from a checkpoint of unknown origin.
    def state_dict(self) -> dict[str, Any]:
        state = StatefulDataLoader.state_dict(self)
        return {self._rank_id: json.dumps(state), "world_size": self.dp_world_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        saved = state_dict["world_size"]
        if saved != self.dp_world_size or self._rank_id not in state_dict:
            raise JobError(
                f"checkpoint: the data position was saved by {saved} data-parallel ranks, this run has "
                f"{self.dp_world_size}; resume with {saved}, or start a new output_dir with checkpoint.init_from"
            )
        StatefulDataLoader.load_state_dict(self, json.loads(state_dict[self._rank_id]))
