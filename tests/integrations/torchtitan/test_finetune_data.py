"""Rows to sequences as TRL makes them, packing, and the order in which ranks get them."""

from collections import Counter

import pytest
from torchtitan.components.loss import IGNORE_INDEX

from aotrain.integrations.byte_tokenizer import byte_tokenizer_dir
from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.finetune_data import RowLoader, TokenRow, TokenRows, collate, tokenize, total_steps
from aotrain.integrations.torchtitan.finetune_keys import TrainerKeys
from aotrain.integrations.torchtitan.finetune_model import load_tokenizer

EOS = 257
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
ROWS = {
    "text": [{"text": "some text"}, {"text": "more<|eos|>"}],
    "prompt and completion": [{"prompt": "def f", "completion": "(): pass"}],
    "messages": [{"messages": CHAT}, {"messages": [*CHAT, *CHAT]}],
    "conversational completion": [{"prompt": CHAT[:1], "completion": CHAT[1:]}],
}


@pytest.fixture
def tokenizer():
    found = load_tokenizer(byte_tokenizer_dir())
    found.set_chat_template(TEMPLATE)
    return found


def keys(**changes) -> TrainerKeys:
    return TrainerKeys(output_dir="out", **changes)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_tokens_and_labels_are_those_of_trl(rows, tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="compares with it: pip install -e '.[hf]'")
    from datasets import Dataset
    from transformers import AutoTokenizer

    from tests.integrations.huggingface.tiny import tiny_llama

    theirs = AutoTokenizer.from_pretrained(byte_tokenizer_dir())
    theirs.chat_template = TEMPLATE
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=30)
    trainer = trl.SFTTrainer(tiny_llama(), args=args, train_dataset=Dataset.from_list(rows), processing_class=theirs)
    want = [(row["input_ids"][:30], row["labels"][:30]) for row in trainer.train_dataset]
    got = tokenize(rows, tokenizer, keys(max_length=30), packing=False)
    assert [row.tokens for row in got] == [tokens for tokens, _ in want]
    # Theirs are shifted in the model: label i of ours is their label i + 1.
    assert [row.labels for row in got] == [[*labels[1:], IGNORE_INDEX] for _, labels in want]


def test_rows_end_and_only_completions_count(tokenizer):
    (row,) = tokenize([{"prompt": "ab", "completion": "c"}], tokenizer, keys(), packing=False)
    assert row == TokenRow([97, 98, 99, EOS], [IGNORE_INDEX, 99, EOS, IGNORE_INDEX], [0, 1, 2, 3])
    every = keys(completion_only_loss=False)
    (row,) = tokenize([{"prompt": "ab", "completion": "c"}], tokenizer, every, packing=False)
    assert row.labels == [98, 99, EOS, IGNORE_INDEX]


def test_packing_whole_rows_loses_none_and_keeps_them_apart(tokenizer):
    texts = ["x" * size for size in (9, 5, 3, 3, 1, 7)]
    packed = tokenize([{"text": text} for text in texts], tokenizer, keys(max_length=12), packing=True)
    assert len(packed) == 3  # 34 tokens with their ends
    assert max(len(row.tokens) for row in packed) == 12
    assert Counter(token for row in packed for token in row.tokens) == {ord("x"): 28, EOS: 6}
    for row in packed:
        starts = [i for i, position in enumerate(row.positions) if position == 0]
        assert all(row.tokens[start - 1] == EOS and row.labels[start - 1] == IGNORE_INDEX for start in starts[1:])


def test_wrapped_packing_is_one_long_text(tokenizer):
    packed = tokenize(
        [{"text": "abc"}, {"text": "defg"}], tokenizer, keys(max_length=4, packing_strategy="wrapped"), packing=True
    )
    assert [row.tokens for row in packed] == [[97, 98, 99, EOS], [100, 101, 102, 103]]  # one token predicts nothing
    assert packed[1].labels == [101, 102, 103, IGNORE_INDEX]


def test_batches_are_padded_without_effect():
    inputs, labels = collate([TokenRow([5, 6], [6, IGNORE_INDEX], [0, 1]), TokenRow([7] * 4, [7] * 4, [0, 1, 2, 3])])
    assert inputs["input"].tolist() == [[5, 6, 0, 0], [7, 7, 7, 7]]
    assert inputs["positions"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]  # padding is a document of its own
    assert labels[0].tolist() == [6, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]


def rows_of(count: int) -> TokenRows:
    return TokenRows(TokenRow([number, number], [number, IGNORE_INDEX], [0, 1]) for number in range(count))


def given(ranks: int, batch: int, batches: int, start: int = 0) -> list[int]:
    """What all ranks get, in the order of the whole."""
    parts = []
    for rank in range(ranks):
        config = RowLoader.Config(rows=rows_of(10), seed=3)
        loader = config.build(dp_world_size=ranks, dp_rank=rank, local_batch_size=batch)
        loader.load_state_dict({"sequences_given": start})
        stream = iter(loader)
        parts.append([next(stream)[0]["input"][:, 0].tolist() for _ in range(batches)])
        assert loader.state_dict() == {"sequences_given": start + ranks * batch * batches}
    return [number for step in zip(*parts, strict=True) for part in step for number in part]


def test_ranks_share_out_one_order_and_each_epoch_has_another():
    one = given(ranks=1, batch=4, batches=5)
    assert sorted(one[:10]) == sorted(one[10:]) == list(range(10))
    assert one[:10] != one[10:]
    assert one == given(ranks=2, batch=2, batches=5)
    assert one[8:] == given(ranks=2, batch=2, batches=3, start=8)


def test_steps_of_epochs_and_schedules():
    assert total_steps(keys(max_steps=7), 1000, 8) == 7
    assert (
        total_steps(keys(num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2), 33, 2) == 5
    )
    assert [keys(warmup_steps=steps).warmup(30) for steps in (0, 5, 0.1, 0.05)] == [0, 5, 3, 2]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"words": "a"}], {}, "data: a row has the columns words; want text, prompt and completion, or messages"),
        ([{"text": "a"}], {"completion_only_loss": True}, "completion_only_loss: true, but rows have no prompt"),
        ([{"prompt": "abcdef", "completion": "g"}], {"max_length": 4}, "none of 1 rows has a token to learn"),
    ],
)
def test_rows_that_teach_nothing(tokenizer, rows, changes, message):
    with pytest.raises(JobError, match=message):
        tokenize(rows, tokenizer, keys(**changes), packing=False)


def test_messages_without_a_template():
    with pytest.raises(JobError, match="data: rows are messages, and the tokenizer has no chat template"):
        tokenize(ROWS["messages"], load_tokenizer(byte_tokenizer_dir()), keys(), packing=False)
