"""Loss curves as a picture: train and validation loss of one or more runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.metrics_file import FILE_NAME, losses, read_rows


def draw_losses(runs: Mapping[str, str | Path], target: str | Path, title: str = "") -> Path:
    """Draw the loss of each run over its steps: train as a line, validation as a dashed line with markers.

    Args:
        runs: label -> run folder or its metrics.jsonl.
        target: the PNG to write.
        title: above the picture.

    Returns:
        The written path.

    Raises:
        JobError: no runs, or one without rows.
    """
    # Not at the top: matplotlib is needed at the end of a run only. Figure without pyplot touches no global state and
    # needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not runs:
        raise JobError("no runs to draw; want at least one")
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (label, place) in enumerate(runs.items()):
        rows = read_rows(_metrics_path(Path(place)))
        if not rows:
            raise JobError(f"{place}: no rows to draw; has the run reached its first recorded step?")
        color = f"C{index}"
        axes.plot(*losses(rows, "train"), color=color, linewidth=1.2, label=f"{label}, train")
        steps, values = losses(rows, "validation")
        if steps:
            axes.plot(steps, values, "o--", color=color, markersize=4, label=f"{label}, validation {values[-1]:.4f}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def _metrics_path(place: Path) -> Path:
    return place / FILE_NAME if place.is_dir() else place
