"""Run benchmarks and append their rows to a results file.

    python -m benchmarks.run scaled_cast [--out benchmarks/results] [--repeats 50] [--resume] [--limit 300]

Prints and writes, per case, the median and the 10 % and 90 % quantiles of its time, GB/s counting only the bytes that
must move, memory held and time of the first run where they matter, and where it ran: GPU or CPU, driver, torch, triton,
commit, command. Rows are written as soon as the cases that are timed together are done. A case whose check fails is not
timed, and the run exits with status 1; with 2 when --limit ended it first.
"""

import argparse
import csv
import datetime
import importlib.metadata
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.registry import BENCHMARKS
from benchmarks.timing import times_ms

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "date", "case", "shape", "median_ms", "q10_ms", "q90_ms", "gb_per_s", "tflop_per_s", "ns_per_element",
    "bytes_kept_per_element", "first_ms", "repeats", "hardware", "driver", "torch", "triton", "commit", "command",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(BENCHMARKS))
    default_out = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results"))
    parser.add_argument("--out", type=Path, default=default_out, help="folder of the results files")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--resume", action="store_true", help="leave out what has a row of this commit and hardware")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no further case is begun")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    command = shlex.join(["python", "-m", "benchmarks.run", *(sys.argv[1:] if arguments is None else arguments)])
    where = environment(device) | {"command": command}
    failures = 0
    for name in options.names:
        path = options.out / f"{name}.csv"
        done = measured(path, where) if options.resume else set()
        for batch in batches(BENCHMARKS[name](device)):
            if done.issuperset((case.name, case.shape) for case in batch):
                continue
            if time.monotonic() - start > options.limit:
                print(f"{name}: no time left; run again with --resume", file=sys.stderr)
                return 2
            correct = [case for case in batch if is_correct(case)]
            failures += len(batch) - len(correct)
            rows = [row | where for row in measure(correct, device, options.repeats)]
            for row in rows:
                per_element = f"  {row['ns_per_element']} ns each" if row["ns_per_element"] else ""
                speed = f"{row['median_ms']:>9} ms {row['gb_per_s']:>8} GB/s{per_element}"
                print(f"{row['case']:34} {row['shape']:>14} {speed}", flush=True)
            append_rows(path, rows)
    return 1 if failures else 0


def measured(path: Path, where: Mapping[str, str]) -> set[tuple[str, str]]:
    """(case, shape) of the rows of a results file that come from this commit on this machine."""
    if not path.exists():
        return set()
    origin = [key for key in where if key != "command"]
    with path.open(newline="") as file:
        return {
            (row["case"], row["shape"]) for row in csv.DictReader(file) if all(row[key] == where[key] for key in origin)
        }


def batches(cases: Iterable[Case]) -> Iterator[list[Case]]:
    """Cases to time in turns: those of one group, or a single one."""
    batch: list[Case] = []
    for case in cases:
        if batch and case.group != batch[0].group:
            yield batch
            batch = []
        if case.group:
            batch.append(case)
        else:
            yield [case]
    if batch:
        yield batch


def is_correct(case: Case) -> bool:
    """Whether the case's check passes; says why not."""
    try:
        case.check()
    except AssertionError as error:
        print(f"error: {case.name} {case.shape} is wrong and was not timed: {error}", file=sys.stderr)
        return False
    return True


def measure(batch: Sequence[Case], device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Row of each case of a batch."""
    times = times_ms([case.run for case in batch], device, repeats=repeats)
    return [_row(case, own, repeats) for case, own in zip(batch, times, strict=True)]


def _row(case: Case, times: list[float], repeats: int) -> dict[str, Any]:
    median = statistics.median(times)
    deciles = statistics.quantiles(times, n=10) if len(times) > 1 else [median] * 9
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "case": case.name,
        "shape": case.shape,
        "median_ms": f"{median:.4f}",
        "q10_ms": f"{deciles[0]:.4f}",
        "q90_ms": f"{deciles[-1]:.4f}",
        "gb_per_s": f"{case.bytes_moved / median / 1e6:.1f}",
        "tflop_per_s": f"{case.flops / median / 1e9:.1f}" if case.flops else "",
        "ns_per_element": f"{median * 1e6 / case.elements:.3f}" if case.elements else "",
        "bytes_kept_per_element": f"{case.bytes_kept / case.elements:.4f}" if case.bytes_kept else "",
        "first_ms": f"{case.first_ms:.1f}" if case.first_ms else "",
        "repeats": repeats,
    }


def environment(device: torch.device) -> dict[str, str]:
    """Where a row was measured."""
    gpu = device.type == "cuda"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = _output(*query).split("\n")[0] if gpu else ""
    return {
        "hardware": torch.cuda.get_device_name(device) if gpu else f"{cpu_name()}, {torch.get_num_threads()} thread(s)",
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton,
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def append_rows(path: Path, rows: list[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    """Append rows to a CSV file, with its header when new.

    Raises:
        ValueError: the file has other columns; its rows have to be rewritten first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        if header != list(columns):
            raise ValueError(
                f"{path} got the columns {header}, want {list(columns)}; rewrite it, or give another --out"
            )
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
