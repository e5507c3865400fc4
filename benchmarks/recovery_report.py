"""Table and plot of docs/qat.md from the rows that `python -m benchmarks.recovery` has written.

    python -m benchmarks.recovery_report [--results benchmarks/results/recovery.csv] [--plot PLOT.svg]

Prints the table as Markdown, a row per scheme, steps and seed and the mean over seeds, and draws every row as one line
from control to post-training quantization with quantization-aware training between them.
"""

import argparse
import csv
import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.run import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "recovery.csv"
PLOT = ROOT / "docs" / "images" / "qat_recovery.svg"
# Colors that stay apart for readers who do not tell red from green: Okabe and Ito.
_MARKS = {"control": ("o", "#0072B2"), "qat": ("D", "#009E73"), "ptq": ("s", "#D55E00")}
_NAMES = {"control": "control", "qat": "QAT", "ptq": "PTQ of the control"}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT, help="SVG file to write")
    options = parser.parse_args(arguments)
    rows = read(options.results)
    print(table(rows))
    draw(rows, options.plot)
    return 0


def read(path: Path) -> list[dict[str, str]]:
    """Rows by scheme, steps and seed; of one that was run again, the last."""
    with path.open(newline="") as file:
        last = {(row["scheme"], int(row["steps"]), int(row["seed"])): row for row in csv.DictReader(file)}
    return [last[key] for key in sorted(last)]


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: perplexity per byte of the three models, what quantization costs, and how much of it is recovered."""
    lines = ["| scheme | steps | seed | control | PTQ | QAT | gap | recovered |", "|---|---|---|---|---|---|---|---|"]
    for (scheme, steps), ours in itertools.groupby(rows, key=lambda row: (row["scheme"], row["steps"])):
        shares = []
        for row in ours:
            perplexities = " | ".join(f"{float(row[f'{name}_ppl']):.4f}" for name in ("control", "ptq", "qat"))
            about = f"| {scheme} | {steps} | {row['seed']} |"
            lines.append(f"{about} {perplexities} | {_gap(row)} | {_percent(row['recovery'])} |")
            shares.append(row["recovery"])
        lines.append(f"| {scheme} | {steps} | mean | | | | | **{_mean(shares)}** |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, str]], target: Path) -> None:
    """One line per row, in nats above its control; the same rows give the same file."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "aotrain", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 0.9 + 0.38 * len(rows)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            control = float(row["control_nll"])
            above = {name: float(row[f"{name}_nll"]) - control for name in _MARKS}
            axes.plot([0, above["ptq"]], [place, place], color="#BBBBBB", linewidth=2, zorder=1)
            for name, (marker, color) in _MARKS.items():
                axes.scatter(above[name], place, marker=marker, color=color, label=_NAMES[name] if place == 0 else None)
            axes.annotate(
                _percent(row["recovery"]), (above["ptq"], place), (8, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.15)
        axes.set_xlabel("held-out loss above the control, nats per byte (label: share recovered)")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})


def _label(row: dict[str, str]) -> str:
    return f"{row['scheme']}, {row['steps']} steps, seed {row['seed']}"


def _gap(row: dict[str, str]) -> str:
    return f"{float(row['gap_percent']):.2f} %"


def _percent(share: str) -> str:
    """As a percentage; a gap too small for one has none."""
    return f"{100 * float(share):.1f} %" if share else "gap too small"


def _mean(shares: Sequence[str]) -> str:
    """Mean and standard error, in percent, over the seeds that have a recovery."""
    values = [100 * float(share) for share in shares if share]
    if not values:
        return "gap too small"
    error = f" +- {statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{error} %"


if __name__ == "__main__":
    sys.exit(main())
