"""A recipe's rows as token sequences, with the labels that TRL would give them, and torchtitan's loader of them.

Rows are text (its end-of-sequence token is added), prompt and completion, or messages through the tokenizer's chat
template. Where there is a completion, only its tokens have labels, unless `completion_only_loss: false`. A sequence of
n tokens predicts n - 1: label i is token i + 1, and the last has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.finetune_keys import TrainerKeys


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Tokens, the token that each predicts (IGNORE_INDEX: none), and where each stands in its document."""

    tokens: list[int]
    labels: list[int]
    positions: list[int]


class TokenRows(list[TokenRow]):
    """Sequences of a run, in a type that torchtitan does not copy into its log."""

    def to_dict(self) -> dict[str, int]:
        """What a log needs to know."""
        return {"sequences": len(self), "tokens": sum(len(row.tokens) for row in self)}


def tokenize(rows: Iterable[Any], tokenizer: HuggingFaceTokenizer, keys: TrainerKeys, *, packing: bool) -> TokenRows:
    """Sequences of at most `max_length` tokens.

    Args:
        rows: as TRL takes them.
        tokenizer: with an end-of-sequence token.
        keys: max_length, completion_only_loss, packing_strategy.
        packing: several rows per sequence.

    Raises:
        JobError: rows of an unknown kind, no chat template, or no row with a label.
    """
    encoded = [_encode(row, tokenizer, keys.completion_only_loss) for row in rows]
    if packing and keys.packing_strategy == "wrapped":
        documents = _wrap(encoded, keys.max_length)
    else:
        documents = [(tokens[: keys.max_length], counts[: keys.max_length]) for tokens, counts in encoded]
    single = [_row(*document) for document in documents if len(document[0]) > 1]
    whole = packing and keys.packing_strategy == "bfd"
    sequences = TokenRows(_best_fit(single, keys.max_length) if whole else single)
    if not any(label != IGNORE_INDEX for sequence in sequences for label in sequence.labels):
        raise JobError(
            f"data: none of {len(encoded)} rows has a token to learn within trainer.max_length {keys.max_length}; want "
            "a larger one, or other rows"
        )
    return sequences


# Tokens of a row, and which of them count in the loss.
_Encoded = tuple[list[int], list[bool]]


def _encode(row: dict[str, Any], tokenizer: HuggingFaceTokenizer, completion_only: bool | None) -> _Encoded:
    if "prompt" in row and "completion" in row:
        prompt, both = _prompt_and_both(row, tokenizer)
        common = next((i for i, (a, b) in enumerate(zip(prompt, both, strict=False)) if a != b), len(prompt))
        return both, [completion_only is False or i >= common for i in range(len(both))]
    if "messages" in row:
        tokens = _chat(tokenizer, row["messages"])
    elif "text" in row:
        tokens = _text(tokenizer, _ended(row["text"], tokenizer))
    else:
        raise JobError(f"data: a row has the columns {', '.join(row)}; want text, prompt and completion, or messages")
    if completion_only:
        raise JobError("trainer.completion_only_loss: true, but rows have no prompt and completion; remove it")
    return tokens, [True] * len(tokens)


def _prompt_and_both(row: dict[str, Any], tokenizer: HuggingFaceTokenizer) -> tuple[list[int], list[int]]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return _text(tokenizer, prompt), _text(tokenizer, prompt + _ended(completion, tokenizer))
    return _chat(tokenizer, prompt, add_generation_prompt=True), _chat(tokenizer, [*prompt, *completion])


def _text(tokenizer: HuggingFaceTokenizer, text: str) -> list[int]:
    """With the special tokens that tokenizer.json adds, as transformers does."""
    return tokenizer.tokenizer.encode(text).ids


def _chat(
    tokenizer: HuggingFaceTokenizer, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
        )
    except ValueError as error:
        raise JobError(f"data: rows are messages, and the tokenizer has no chat template ({error})") from error
    return tokenizer.tokenizer.encode(text, add_special_tokens=False).ids


def _ended(text: str, tokenizer: HuggingFaceTokenizer) -> str:
    if tokenizer.eos_token is None:
        raise JobError("model.tokenizer: tokenizer_config.json names no eos_token, which ends a row; add it")
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _wrap(rows: Sequence[_Encoded], length: int) -> list[_Encoded]:
    tokens = [token for row, _ in rows for token in row]
    counts = [count for _, row in rows for count in row]
    return [(tokens[i : i + length], counts[i : i + length]) for i in range(0, len(tokens), length)]


def _row(tokens: list[int], counts: list[bool]) -> TokenRow:
    following = zip(tokens[1:], counts[1:], strict=True)
    labels = [token if count else IGNORE_INDEX for token, count in following]
    return TokenRow(tokens, [*labels, IGNORE_INDEX], list(range(len(tokens))))


def _best_fit(rows: Sequence[TokenRow], length: int) -> Iterator[TokenRow]:
    """Rows in as few sequences as best-fit decreasing finds: longest first, each where least room is left."""
    # Room that is left -> sequences with that room.
    bins: dict[int, list[list[TokenRow]]] = {}
    order: list[list[TokenRow]] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        need = len(row.tokens)
        room = next((room for room in range(need, length) if bins.get(room)), None)
        if room is None:
            room, members = length, []
            order.append(members)
        else:
            members = bins[room].pop()
        members.append(row)
        bins.setdefault(room - need, []).append(members)
    for members in order:
        tokens, labels, positions = ([each for row in members for each in getattr(row, name)] for name in _FIELDS)
        yield TokenRow(tokens, labels, positions)


_FIELDS = ("tokens", "labels", "positions")


def collate(rows: Sequence[TokenRow]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """torchtitan's batch: input and positions [B, L], labels [B, L], L that of the longest row.

    Padding is token 0 without a label, and a document of its own, so nothing sees it.
    """
    length = max(len(row.tokens) for row in rows)
    padding = [length - len(row.tokens) for row in rows]
    tokens = torch.tensor([row.tokens + [0] * pad for row, pad in zip(rows, padding, strict=True)])
    labels = torch.tensor([row.labels + [IGNORE_INDEX] * pad for row, pad in zip(rows, padding, strict=True)])
    positions = torch.tensor([row.positions + list(range(pad)) for row, pad in zip(rows, padding, strict=True)])
    return {"input": tokens, "positions": positions}, labels


def total_steps(keys: TrainerKeys, sequences: int, ranks: int) -> int:
    """Optimizer steps of a run: `max_steps`, or the epochs' sequences by those of a step, rounded up."""
    if keys.max_steps > 0:
        return keys.max_steps
    per_step = keys.per_device_train_batch_size * keys.gradient_accumulation_steps * ranks
    return math.ceil(keys.num_train_epochs * sequences / per_step)


class RowLoader(BaseDataLoader):
    """Batches of one rank: the ranks share out one order of the sequences, another in each epoch, without end."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        rows: TokenRows = field(default_factory=TokenRows)
        """The sequences, the same on every rank."""

        seed: int = 0
        """Of the order."""

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **unused: object
    ) -> None:
        self._rows, self._seed = config.rows, config.seed
        self._rank, self._ranks, self._batch = dp_rank, dp_world_size, local_batch_size
        # Sequences that all ranks together have been given.
        self._given = 0
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            first = self._given + self._rank * self._batch
            self._given += self._ranks * self._batch
            yield collate([self._row(number) for number in range(first, first + self._batch)])

    def state_dict(self) -> dict[str, Any]:
        """How far the run is; any number of ranks can go on from it."""
        return {"sequences_given": self._given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the sequences that were given."""
        if state_dict:
            self._given = state_dict["sequences_given"]

    def _row(self, number: int) -> TokenRow:
        epoch, place = divmod(number, len(self._rows))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._rows), generator=generator)
        return self._rows[int(self._order[place])]
