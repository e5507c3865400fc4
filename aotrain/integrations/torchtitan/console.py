"""Where log lines go: a short account on the console, everything in a file.

torchtitan logs through the root logger and says a lot. The console of rank 0 shows our own lines and real warnings;
``logs/rank<N>.log`` in the run folder has all of it, with times, for every rank.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

# Warnings that are true of every run of ours and tell the reader nothing.
_NOISE = (
    "Peak flops undefined",
    "Error running lspci",
    "CUDA graph capture is only supported",
    "ENV[",
    "model.safetensors.index.json not found",
)


class _ConsoleHandler(logging.Handler):
    """Writes to the current sys.stdout, which a progress bar replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stdout.write(self.format(record) + "\n")
        sys.stdout.flush()


def _is_for_people(record: logging.LogRecord) -> bool:
    if record.name.startswith("aotrain"):
        return True
    return record.levelno >= logging.WARNING and not record.getMessage().startswith(_NOISE)


def start_logging(run_dir: Path, rank: int) -> None:
    """Send all log records to the run folder and, on rank 0, the ones for people to stdout.

    Handlers of an earlier call are replaced.
    """
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    stop_logging()
    # torchdata calls a function that torch has deprecated; nothing a user could do about it.
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    root.setLevel(logging.INFO)
    file = logging.FileHandler(folder / f"rank{rank}.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [file]
    if rank == 0:
        console = _ConsoleHandler()
        console.addFilter(_is_for_people)
        console.setFormatter(logging.Formatter("%(message)s"))
        handlers.append(console)
    for handler in handlers:
        handler.set_name("aotrain")
        root.addHandler(handler)


def stop_logging() -> None:
    """Close the handlers that ``start_logging`` made."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.get_name() == "aotrain"]:
        root.removeHandler(handler)
        handler.close()
