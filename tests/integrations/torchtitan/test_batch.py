"""How a step's sequences are divided among ranks, at the first start and at later ones."""

from pathlib import Path

import pytest

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.batch import BatchSizes, SavedData, batch_sizes
from aotrain.integrations.torchtitan.job import PretrainJob, load_job

MINIMAL = "model: {size: debug}\ntraining: {steps: 5}\ndata: {global_batch_size: 12}\n"
PER_RANK = ("data.global_batch_size=null", "data.batch_size=3")


@pytest.fixture
def sizes(tmp_path: Path):
    def make(*overrides: str, ranks: int, saved: SavedData | None = None) -> BatchSizes:
        path = tmp_path / "job.yaml"
        path.write_text(MINIMAL)
        job: PretrainJob = load_job(path, overrides)
        return batch_sizes(job, ranks, saved)

    return make


@pytest.mark.parametrize(
    ("overrides", "ranks", "local", "total", "passes"),
    [
        ([], 1, 12, 12, 1),
        ([], 2, 6, 12, 1),
        (["data.batch_size=2"], 1, 2, 12, 6),
        (["data.batch_size=2"], 3, 2, 12, 2),
        (PER_RANK, 4, 3, 12, 1),
        (["parallelism.tp=2"], 4, 6, 12, 1),
        (["parallelism.dp_replicate=2", "parallelism.dp_shard=2", "parallelism.tp=2"], 8, 3, 12, 1),
    ],
    ids=["one", "two", "accumulate", "three-accumulate", "per-rank", "tp", "hsdp-tp"],
)
def test_first_start(sizes, overrides, ranks, local, total, passes):
    found = sizes(*overrides, ranks=ranks)
    assert (found.local, found.total, found.passes, found.largest) == (local, total, passes, local)


@pytest.mark.parametrize(
    ("ranks", "local", "passes"), [(1, 6, 2), (2, 6, 1), (3, 4, 1), (4, 3, 1), (6, 2, 1), (12, 1, 1)]
)
def test_a_continued_run_keeps_its_global_batch(sizes, ranks, local, passes):
    saved = SavedData(global_batch=12, largest_batch=6, num_streams=1)
    found = sizes(ranks=ranks, saved=saved)
    # A rank's memory does not grow, and a later start on two ranks may use six again.
    assert found == BatchSizes(local=local, total=12, ranks=ranks, largest=6)
    assert found.passes == passes


def test_a_batch_that_the_job_gives_per_rank_is_not_changed_silently(sizes):
    saved = SavedData(global_batch=12, largest_batch=3, num_streams=1)
    assert sizes(*PER_RANK, ranks=1, saved=saved) == BatchSizes(local=3, total=12, ranks=1, largest=3)
    with pytest.raises(
        JobError, match=r"want a divisor of 2, the 12 \(of the checkpoint\) .*set data.batch_size=2, or"
    ):
        sizes(*PER_RANK, ranks=6, saved=saved)


def test_passes_divide_what_a_rank_gets(sizes):
    saved = SavedData(global_batch=12, largest_batch=4, num_streams=1)
    assert sizes("data.global_batch_size=14", ranks=2, saved=saved).local == 1  # of 7
    assert sizes("data.global_batch_size=20", ranks=2, saved=saved).local == 2  # of 10


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        ([], 5, r"got 12 on 5 data-parallel ranks, want a multiple of the ranks; start 4 or 6 data-parallel ranks, "),
        ([], 5, r"or set data.global_batch_size=10"),
        ([], 16, r"got 12 on 16 .*; start 12 data-parallel ranks, or set data.global_batch_size=16"),
        (["data.batch_size=4"], 2, r"data.batch_size: got 4, want a divisor of 6, .*; set data.batch_size=3, or null"),
        (["parallelism.tp=2"], 3, r"dp_replicate 1 x dp_shard -1 x tp 2 does not make 3 ranks"),
        (["parallelism.dp_shard=2"], 4, r"dp_replicate 1 x dp_shard 2 x tp 1 does not make 4 ranks; start 2 ranks"),
    ],
    ids=["five", "five-remedy", "too-many", "per-rank", "tp", "fixed-shard"],
)
def test_layouts_that_do_not_divide(sizes, overrides, ranks, message):
    with pytest.raises(JobError, match=message):
        sizes(*overrides, ranks=ranks)


def test_the_message_says_that_the_batch_is_the_checkpoints(sizes):
    saved = SavedData(global_batch=6, largest_batch=3, num_streams=1)
    with pytest.raises(JobError, match=r"got 6 \(of the checkpoint\) on 4 data-parallel ranks"):
        sizes(*PER_RANK, ranks=4, saved=saved)


def test_streams_of_documents_hold_the_global_batch_to_their_multiples(sizes):
    saved = SavedData(global_batch=8, largest_batch=4, num_streams=8)
    assert sizes("data.global_batch_size=16", ranks=2, saved=saved).total == 16
    with pytest.raises(JobError, match=r"data.global_batch_size: got 12, want a multiple of 8, the streams"):
        sizes(ranks=2, saved=saved)
