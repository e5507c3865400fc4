"""Where log lines go: a short account on the console, everything in a file.

torchtitan logs through the root logger and says a lot. The console of rank 0 shows our own lines and real warnings;
``logs/rank<N>.log`` in the run folder has all of it, with times, for every rank.
"""

from __future__ import annotations

import logging
import sys
import warnings
from logging.handlers import MemoryHandler
from pathlib import Path

# Name of our handlers, to find them again.
_NAME = "aotrain"

# Warnings that are true of every run of ours and tell the reader nothing.
_NOISE = (
    "Peak flops undefined",
    "Error running lspci",
    "CUDA graph capture is only supported",
    "ENV[",
    # Of the second training of a fine-tuning run, in the first one's process group.
    "torch.distributed is already initialized",
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


def start_logging(rank: int) -> None:
    """Show the log records for people on stdout, on rank 0, and keep all of them until ``log_to`` names a folder.

    Handlers of an earlier call are replaced.
    """
    stop_logging()
    # torchdata calls a function that torch has deprecated; nothing a user could do about it.
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    # From torchtitan's way of restoring a schedule; the restored rates are right.
    warnings.filterwarnings("ignore", message="To get the last learning rate")
    # True, and the reason for weight_init.NamedInit; nothing else in a run draws random numbers into DTensors.
    warnings.filterwarnings("ignore", message="DTensor .* may not have complete support on cpu device mesh")
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    logging.getLogger("aotrain").setLevel(logging.DEBUG)
    handlers: list[logging.Handler] = [MemoryHandler(capacity=10_000, flushOnClose=False)]
    if rank == 0:
        console = _ConsoleHandler(level=logging.INFO)
        console.addFilter(_is_for_people)
        console.setFormatter(logging.Formatter("%(message)s"))
        handlers.append(console)
    for handler in handlers:
        handler.set_name(_NAME)
        root.addHandler(handler)


def log_to(run_dir: Path, rank: int) -> None:
    """Write the records that ``start_logging`` kept, and all later ones, to the rank's file in the run folder."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / f"rank{rank}.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    file.set_name(_NAME)
    root = logging.getLogger()
    for handler in _own_handlers():
        if isinstance(handler, MemoryHandler):
            handler.setTarget(file)
            handler.flush()
            root.removeHandler(handler)
            handler.close()
    root.addHandler(file)


def stop_logging() -> None:
    """Close the handlers that this module made."""
    for handler in _own_handlers():
        logging.getLogger().removeHandler(handler)
        handler.close()


def _own_handlers() -> list[logging.Handler]:
    return [handler for handler in logging.getLogger().handlers if handler.get_name() == _NAME]
