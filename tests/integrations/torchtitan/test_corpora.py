"""Text sources: what is read, split and refused."""

import json
import sys

import pytest

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.corpora import load_corpus, stdlib_documents, text_column
from aotrain.integrations.torchtitan.job import Data


@pytest.fixture(autouse=True)
def _no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def texts(data: Data, split: str, seed: int = 0) -> list[str]:
    return list(load_corpus(data, split, seed)[text_column(data)])


def test_stdlib_has_enough_text_in_both_splits():
    train, validation = stdlib_documents("train"), stdlib_documents("validation")
    assert sum(map(len, train)) > 5_000_000
    assert 200_000 < sum(map(len, validation)) < sum(map(len, train)) / 5
    assert not set(train) & set(validation)


def test_stdlib_leaves_out_tables_and_tests():
    everything = stdlib_documents("train") + stdlib_documents("validation")
    assert any("class ArgumentParser" in text for text in everything)
    assert not any("decoding_table = (" in text for text in everything)
    assert not any("import test.support" in text and "unittest.main()" in text for text in everything)


def test_order_depends_on_the_seed_alone():
    data = Data(global_batch_size=1)
    assert texts(data, "train", 0) == texts(data, "train", 0)
    assert texts(data, "train", 0) != texts(data, "train", 1)
    assert sorted(texts(data, "train", 0)) == sorted(texts(data, "train", 1))


def test_a_single_text_file_is_cut_and_split(tmp_path):
    lines = [f"line {i} of the only file\n" for i in range(40_000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    data = Data(dataset="text", path=str(tmp_path / "book.txt"))
    train, validation = texts(data, "train"), texts(data, "validation")
    assert sorted("".join(train + validation).splitlines(True)) == sorted(lines)
    assert 0 < len(validation) < len(train) / 4


def test_a_folder_and_a_glob_give_the_same_files(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "deep/b.txt", "deep/c.bin"):
        (tmp_path / name).write_text(f"text of {name}\n" * 3000)
    folder = texts(Data(dataset="text", path=str(tmp_path)), "train")
    pattern = texts(Data(dataset="text", path=f"{tmp_path}/**/*.txt"), "train")
    assert sorted(folder) == sorted(pattern)
    assert not any("c.bin" in text for text in folder)


def test_a_validation_file_of_its_own(tmp_path):
    (tmp_path / "t.txt").write_text("train\n")
    (tmp_path / "v.txt").write_text("validation\n")
    data = Data(dataset="text", path=str(tmp_path / "t.txt"), validation_path=str(tmp_path / "v.txt"))
    assert texts(data, "train") == ["train\n"]
    assert texts(data, "validation") == ["validation\n"]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_rows_with_a_named_column(tmp_path, kind):
    rows = [{"body": f"document {i}", "id": i} for i in range(200)]
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    data = Data(dataset=kind, path=str(path), text_field="body")
    train, validation = texts(data, "train"), texts(data, "validation")
    assert sorted(train + validation) == sorted(row["body"] for row in rows)
    assert 0 < len(validation) < 40


def test_a_missing_column_lists_the_columns(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "x", "id": 1}\n')
    with pytest.raises(JobError, match=r"data.text_field: no column 'text' in .*rows.jsonl; it has body, id"):
        load_corpus(Data(dataset="json", path=str(tmp_path / "rows.jsonl")), "train", 0)


def test_a_folder_without_text(tmp_path):
    (tmp_path / "x.bin").touch()
    with pytest.raises(JobError, match=r"data: no files in .*; want .txt, .md, .py files"):
        load_corpus(Data(dataset="text", path=str(tmp_path)), "train", 0)


def test_nothing_held_out_is_an_error(tmp_path):
    (tmp_path / "t.txt").write_text("one short line\n")
    with pytest.raises(JobError, match=r"no validation documents in .*t.txt; give more text or data.validation_path"):
        load_corpus(Data(dataset="text", path=str(tmp_path / "t.txt")), "validation", 0)


def test_a_hub_dataset_that_cannot_be_reached(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(sys.modules["aotrain.integrations.torchtitan.corpora"], "load_dataset", refuse)
    with pytest.raises(JobError, match=r"cannot stream 'allenai/c4' \(train\) from the hub: no route. Check the name"):
        load_corpus(Data(dataset="c4"), "train", 0)
