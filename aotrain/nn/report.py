"""Conversion reports: which layers were converted, which were not, and why."""

from dataclasses import dataclass
from typing import Literal

import torch

_REPORT_ATTRIBUTE = "_aotrain_conversion_report"
_ROWS_SHOWN = 12


@dataclass(frozen=True, slots=True)
class ReportRow:
    """One layer: its dotted name ("" for the root), what happened to it, and the reason or the recipe."""

    fqn: str
    kind: Literal["converted", "skipped"]
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Outcome of a conversion, one row per candidate layer, in module order."""

    title: str
    rows: tuple[ReportRow, ...]
    # What is counted.
    what: str = "layers"

    @property
    def converted(self) -> tuple[str, ...]:
        """Names of the converted layers."""
        return tuple(row.fqn for row in self.rows if row.kind == "converted")

    @property
    def skipped(self) -> dict[str, str]:
        """Names of the layers left alone, with the reason."""
        return {row.fqn: row.reason for row in self.rows if row.kind == "skipped"}

    def summary(self) -> str:
        """One line: counts and the reasons for skipping, most frequent first."""
        reasons: dict[str, int] = {}
        for reason in self.skipped.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        why = "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
        skipped = f", skipped {len(self.skipped)} ({why})" if why else ""
        return f"{self.title}: converted {len(self.converted)} {self.what}{skipped}"

    def __str__(self) -> str:
        lines = [self.summary()]
        lines += [f"  {row.kind:9} {row.fqn or '(root)'}: {row.reason}" for row in self.rows[:_ROWS_SHOWN]]
        if len(self.rows) > _ROWS_SHOWN:
            lines.append(f"  ... and {len(self.rows) - _ROWS_SHOWN} more")
        return "\n".join(lines)


def attach_report(model: torch.nn.Module, report: Report) -> None:
    """Keep the report on the model's root module, for `conversion_report`."""
    setattr(model, _REPORT_ATTRIBUTE, report)


def conversion_report(model: torch.nn.Module) -> Report:
    """Report of the last conversion of this model (its root module).

    Raises:
        ValueError: the model was never converted, or this is not the module that was passed to the conversion.
    """
    report = getattr(model, _REPORT_ATTRIBUTE, None)
    if report is None:
        raise ValueError(
            f"No conversion report on this {type(model).__name__}; pass the module that was given to "
            "the conversion (or the one it returned)."
        )
    return report
