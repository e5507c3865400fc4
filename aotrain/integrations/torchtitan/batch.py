"""How many sequences a step, a rank and a forward pass get, on however many ranks the job is started.

A run keeps its global batch: another number of ranks changes how many forward passes a step takes, not what it is a
step over. What a job does not say itself is taken from the checkpoint that it continues from.
"""

from __future__ import annotations

from dataclasses import dataclass

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.job import PretrainJob


@dataclass(frozen=True, slots=True)
class SavedData:
    """What a checkpoint remembers of its run's batches."""

    # Sequences per optimizer step, all ranks together.
    global_batch: int
    # Sequences per rank and forward pass; known to fit into memory.
    largest_batch: int
    # Streams that its data position is made of; the global batch is a multiple.
    num_streams: int


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """Sequences, and what they are counted per."""

    # Per rank and forward pass.
    local: int
    # Per optimizer step, all ranks together.
    total: int
    # Data-parallel ranks.
    ranks: int
    # What the next checkpoint remembers as ``SavedData.largest_batch``.
    largest: int

    @property
    def passes(self) -> int:
        """Forward passes per optimizer step; their gradients are accumulated."""
        return self.total // (self.local * self.ranks)


def batch_sizes(job: PretrainJob, num_ranks: int, saved: SavedData | None = None) -> BatchSizes:
    """Divide the batch of ``job`` among ``num_ranks`` processes.

    Args:
        job: a checked job.
        num_ranks: processes of the run.
        saved: of the checkpoint that the run continues from.

    Raises:
        JobError: when the numbers do not divide.
    """
    dp = _data_parallel_ranks(job, num_ranks)
    total = job.data.global_batch_size or (saved.global_batch if saved else None)
    local = job.data.batch_size
    if total is None:
        assert local is not None  # the job's check refuses one that gives neither
        return BatchSizes(local=local, total=local * dp, ranks=dp, largest=local)
    if saved and total % saved.num_streams:
        raise JobError(
            f"data.global_batch_size: got {total}, want a multiple of {saved.num_streams}, the streams of documents "
            "that the checkpoint continues; or start a new output_dir with checkpoint.init_from"
        )
    origin = "" if job.data.global_batch_size else " (of the checkpoint)"
    if total % dp:
        below, above = _neighbours(total, dp)
        want = " or ".join(str(size) for size in (below, above) if size)
        raise JobError(
            f"data.global_batch_size: got {total}{origin} on {dp} data-parallel ranks, want a multiple of the ranks; "
            f"start {want} data-parallel ranks, or set data.global_batch_size={total // dp * dp or dp}"
        )
    share = total // dp
    if local is None:
        largest = saved.largest_batch if saved else share
        # More passes rather than a larger one: a rank's memory does not grow when ranks are taken away.
        return BatchSizes(local=_largest_divisor(share, largest), total=total, ranks=dp, largest=largest)
    if share % local:
        raise JobError(
            f"data.batch_size: got {local}, want a divisor of {share}, the {total}{origin} sequences of a step over "
            f"{dp} data-parallel ranks; set data.batch_size={_largest_divisor(share, local)}, or null to have it chosen"
        )
    return BatchSizes(local=local, total=total, ranks=dp, largest=local)


def _data_parallel_ranks(job: PretrainJob, num_ranks: int) -> int:
    tp, replicate, shard = job.parallelism.tp, job.parallelism.dp_replicate, job.parallelism.dp_shard
    fixed = tp * replicate * (shard if shard > 0 else 1)
    if num_ranks % fixed or (shard > 0 and num_ranks != fixed):
        raise JobError(
            f"parallelism: dp_replicate {replicate} x dp_shard {shard} x tp {tp} does not make {num_ranks} ranks; "
            f"start {fixed} ranks (torchrun --nproc-per-node) or set parallelism.dp_shard=-1"
        )
    return num_ranks // tp


def _neighbours(total: int, ranks: int) -> tuple[int, int | None]:
    """The divisors of ``total`` next to ``ranks``, which is none; there may be no larger one."""
    above = next((size for size in range(ranks + 1, total + 1) if total % size == 0), None)
    return _largest_divisor(total, ranks), above


def _largest_divisor(number: int, limit: int) -> int:
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)
