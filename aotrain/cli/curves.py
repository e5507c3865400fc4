"""`aotrain curves RUN ...`: the loss curves of several runs in one picture, and how far apart they end."""

import json
import sys
from pathlib import Path

import tyro

from aotrain.cli.launch import NOT_INSTALLED


def curves(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("curves.png"), title: str = "") -> int:
    """Draw the loss curves of finished runs into one picture and print their final losses.

    Args:
        runs: run folders; the differences are relative to the last one.
        out: the PNG to write.
        title: above the picture.
    """
    try:
        from aotrain.integrations.config_file import JobError
        from aotrain.integrations.torchtitan.curves import draw_losses
    except ImportError as error:
        print(f"error: {error}; {NOT_INSTALLED}", file=sys.stderr)
        return 2
    try:
        print(_final_losses(runs))
        print(f"curves in {draw_losses({run.name: run for run in runs}, out, title)}")
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _final_losses(runs: tuple[Path, ...]) -> str:
    """One line: each run's validation loss from first to last, and its distance from the last run's."""
    from aotrain.integrations.config_file import JobError

    finals: dict[str, dict[str, float]] = {}
    for run in runs:
        path = run / "summary.json"
        if not path.is_file():
            raise JobError(f"{run} has no summary.json; it is written when a run ends: continue it, or name another")
        summary = json.loads(path.read_text(encoding="utf-8"))
        finals[run.name] = summary["validation_loss"] or summary["train_loss"]
    if not finals:
        raise JobError("no runs given; want at least one run folder")
    reference = list(finals.values())[-1]["last"]
    parts = [
        f"{name} {loss['first']:.4f} -> {loss['last']:.4f} ({100 * (loss['last'] / reference - 1):+.2f} %)"
        for name, loss in finals.items()
    ]
    return "final loss: " + ", ".join(parts)
