"""A plan as a table on the screen and as a filter file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aotrain.nn.skips import any_number

if TYPE_CHECKING:
    from aotrain.nn import Plan, PlanRow

# Columns of a table that does not go to a screen.
_FILE_WIDTH = 160


def print_plan(plan: Plan, title: str) -> None:
    """One row for all layers of a kind, then the sums. Times are those of one layer, in milliseconds."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    table = Table(title=escape(f"{title}: {plan.recipe}, {plan.tokens} tokens, tp {plan.tp}, {plan.times}"))
    table.add_column("layer", no_wrap=True)
    for heading in ("count", "N", "K", "bf16 ms", "casts ms", "products ms", "gain"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("decision", no_wrap=True)
    table.add_column("reason", overflow="fold", min_width=20)
    for name, rows in _groups(plan.rows).items():
        row = rows[0]
        low = (f"{1e3 * row.cast_seconds:.3f}", f"{1e3 * row.gemm_seconds:.3f}", f"x{row.gain:.2f}")
        cells = (f"{1e3 * row.bf16_seconds:.3f}", *(low if row.gemm_seconds else ("-",) * 3))
        style = "green" if row.decision == "convert" else ""
        layer = f"{name[0]} ({row.experts} experts)" if row.experts else name[0]
        table.add_row(
            *(escape(layer), str(len(rows)), str(row.n), str(row.k), *cells, row.decision, escape(row.reason)),
            style=style,
        )
    console.print(table)
    console.print(
        f"converts {len(plan.converted)} of {len(plan.rows)} layers; linear layers {1e3 * plan.bf16_seconds:.1f} -> "
        f"{1e3 * plan.planned_seconds:.1f} ms (x{plan.linear_gain:.2f}); whole step x{plan.step_gain:.2f} if "
        f"{100 * plan.other_share:.0f} % of it is not linear layers",
        highlight=False,
        markup=False,
    )


def filter_yaml(plan: Plan, title: str) -> str:
    """The precision section of a pretraining job, with the prediction as a comment."""
    comment = [f"# aotrain plan {title}", f"# {plan.summary()}", *(f"# warning: {note}" for note in plan.advice())]
    section = yaml.safe_dump({"precision": plan.precision()}, sort_keys=False, width=120)
    return "\n".join([*comment, section])


def _groups(rows: tuple[PlanRow, ...]) -> dict[tuple[str, int, int, str, str], list[PlanRow]]:
    """Rows that differ only in the number of their block, in order of appearance."""
    groups: dict[tuple[str, int, int, str, str], list[PlanRow]] = {}
    for row in rows:
        groups.setdefault((any_number(row.fqn), row.n, row.k, row.decision, row.reason), []).append(row)
    return {(found[0].fqn if len(found) == 1 else key[0], *key[1:]): found for key, found in groups.items()}
