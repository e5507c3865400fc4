"""metrics.jsonl through crash and resume, console lines, and the pictures."""

import json

import pytest

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.curves import draw_losses
from aotrain.integrations.torchtitan.metrics import RunLogger, _console_line
from aotrain.integrations.torchtitan.metrics_file import MetricsFile, losses, read_rows


def row(step: int, kind: str = "train", loss: float = 2.0) -> dict:
    return {"kind": kind, "step": step, "loss": loss}


def test_rows_come_back_bit_for_bit(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    rows = [row(1, loss=0.1 + 0.2), row(1, "validation", 1 / 3), row(2, loss=1e-300)]
    for one in rows:
        file.append(one)
    assert read_rows(tmp_path / "m.jsonl") == rows
    assert losses(rows, "validation") == ([1], [1 / 3])


def test_a_new_process_drops_what_it_will_record_again(tmp_path):
    path = tmp_path / "m.jsonl"
    first = MetricsFile(path)
    for one in (row(10), row(10, "validation"), row(20), row(30), row(30, "validation")):
        first.append(one)
    second = MetricsFile(path)
    second.append(row(20, loss=1.0))
    second.append(row(30, loss=0.5))
    assert [(r["kind"], r["step"], r["loss"]) for r in read_rows(path)] == [
        ("train", 10, 2.0),
        ("validation", 10, 2.0),
        ("train", 20, 1.0),
        ("train", 30, 0.5),
    ]


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2))[:10])
    assert read_rows(path) == [row(1)]
    MetricsFile(path).append(row(2))
    assert read_rows(path) == [row(1), row(2)]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("not json\n" + json.dumps(row(2)) + "\n")
    with pytest.raises(JobError, match=r"m.jsonl:1: not a row of metrics: 'not json'"):
        read_rows(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(JobError, match=r"cannot read .*absent.jsonl: No such file"):
        read_rows(tmp_path / "absent.jsonl")


def test_a_picture_of_two_runs(tmp_path):
    for name in ("a", "b"):
        file = MetricsFile(tmp_path / name / "metrics.jsonl")
        for step in (1, 2, 3):
            file.append(row(step, loss=3.0 / step))
        file.append(row(3, "validation", 1.1))
    runs = {"float8": tmp_path / "a", "bf16": tmp_path / "b" / "metrics.jsonl"}
    picture = draw_losses(runs, tmp_path / "out" / "loss.png", title="both")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("runs", [{}, {"empty": "m.jsonl"}], ids=["none", "empty"])
def test_nothing_to_draw(tmp_path, runs):
    (tmp_path / "m.jsonl").touch()
    with pytest.raises(JobError, match="to draw"):
        draw_losses({name: tmp_path / place for name, place in runs.items()}, tmp_path / "loss.png")


def test_console_lines():
    train = {**row(7, loss=2.5), "grad_norm": 1.25, "lr": 4e-3, "tokens_per_second": 12345.6, "memory_gib": 0.5}
    assert _console_line(train, 200) == (
        "step    7/200  loss 2.5000  grad norm 1.250  lr 4.00e-03  12,346 tokens/s  0.50 GiB"
    )
    assert _console_line({**train, "mfu": 41.26}, None).endswith("0.50 GiB  mfu 41.3 %")
    assert _console_line(row(50, "validation", 2.25), 200) == "step   50/200  validation loss 2.2500"


def test_the_progress_bar_needs_a_terminal(tmp_path, monkeypatch):
    metrics = {"validation_metrics/loss": 2.0}
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda answer=is_terminal: answer, raising=False)
        logger = RunLogger(tmp_path / str(is_terminal), total_steps=10, world_size=1)
        logger.log(metrics, 5)
        assert (logger._progress is not None) is is_terminal
        logger.close()
        assert logger._progress is None
