"""torchtitan dataloader over packed text, with a position that any number of ranks can continue from.

A checkpoint holds the position of each stream under the stream's own name, so the ranks that save and the ranks that
load need not be the same ones. It also holds the batch sizes of the run, which a later start keeps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.corpora import load_corpus, text_column
from aotrain.integrations.torchtitan.job import Data
from aotrain.integrations.torchtitan.packing import PackedText, Sample, Turns, choose_num_streams


class TextDataLoader(BaseDataLoader):
    """Batches of one rank; with any number of ranks, an optimizer step gets the same text."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
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

        global_batch: int | None = None
        """Sequences per optimizer step, all ranks together; None: no accumulation."""

        largest_batch: int | None = None
        """Sequences per rank and forward pass that a checkpoint remembers as fitting; None: the local batch."""

        num_streams: int | None = None
        """Streams of a checkpoint's position; None: chosen for the corpus."""

        num_workers: int = 0
        """1: read and tokenize in a background process."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        **unused: object,
    ) -> None:
        size = tokenizer.get_vocab_size()
        if config.vocab_size is not None and size > config.vocab_size:
            raise JobError(
                f"tokenizer: it has {size} tokens, but the model embeds {config.vocab_size}; "
                "choose the tokenizer that belongs to the model"
            )
        corpus = load_corpus(config.data, config.split, config.seed)
        self._global_batch = config.global_batch or local_batch_size * dp_world_size
        self._largest_batch = config.largest_batch or local_batch_size
        self._turns = Turns(
            num_streams=config.num_streams or choose_num_streams(corpus, config.data.shard_by, self._global_batch),
            rank=dp_rank,
            num_ranks=dp_world_size,
        )
        self._text = PackedText(
            corpus,
            turns=self._turns,
            block=local_batch_size,
            column=text_column(config.data),
            tokenizer=tokenizer,
            seq_len=seq_len,
            seed=config.seed,
            infinite=config.infinite,
        )
        # After the batch that was handed out last; a background process is further on than that.
        self._position = self._text.position()
        self._loader = DataLoader(self._text, batch_size=None, collate_fn=_as_it_is, num_workers=config.num_workers)

    def __iter__(self) -> Iterator[Sample]:
        for batch, position in self._loader:
            self._position = position
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Batch sizes, and the position under one key per stream. JSON: no code from a checkpoint is ever run."""
        streams = {_stream_key(number): json.dumps(position) for number, position in self._position["streams"].items()}
        return {
            "global_batch": self._global_batch,
            "largest_batch": self._largest_batch,
            "num_streams": self._turns.num_streams,
            "sequences": self._position["sequences"],
            **streams,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state that any number of ranks saved after an optimizer step."""
        if not state_dict:
            return
        if state_dict["num_streams"] != self._turns.num_streams:
            raise JobError(
                f"checkpoint: its data position is of {state_dict['num_streams']} streams, this run reads "
                f"{self._turns.num_streams}; resume with the corpus and the data.global_batch_size of the checkpoint, "
                "or start a new output_dir with checkpoint.init_from"
            )
        streams = {number: json.loads(state_dict[_stream_key(number)]) for number in self._turns.streams}
        self._text.seek({"sequences": state_dict["sequences"], "streams": streams})
        self._position = self._text.position()


def _stream_key(number: int) -> str:
    return f"stream_{number}"


def _as_it_is(item: Any) -> Any:
    return item
