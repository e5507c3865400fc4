"""What summary.json and the table say of measured perplexities, the same for every engine."""

from __future__ import annotations

import math
from typing import Any

# Below this loss of perplexity by quantization a part recovered is noise.
_SMALLEST_GAP = 0.02


def summarize(nll: dict[str, float | None]) -> dict[str, Any]:
    """What summary.json says of the measured values.

    Args:
        nll: row of the table -> nats per token, None where it could not be measured. The rows control, control_rounded
            and qat give the part of quantization's damage that training has recovered.
    """
    perplexity = {name: None if value is None else math.exp(value) for name, value in nll.items()}
    control, rounded, trained = (nll.get(name) for name in ("control", "control_rounded", "qat"))
    recovered, why = None, "needs evaluate.control: true"
    if control is not None and rounded is not None and trained is not None:
        gap = math.exp(rounded - control) - 1
        why = f"rounding costs {100 * gap:+.2f} % of perplexity, less than 2 %: nothing to recover that is not noise"
        if gap >= _SMALLEST_GAP:
            recovered, why = (rounded - trained) / (rounded - control), None
    return {"nll": nll, "perplexity": perplexity, "recovered": recovered, "recovered_note": why}


_LABELS = {
    "start": "before training, dense",
    "start_rounded": "before training, rounded to the scheme (PTQ)",
    "trained": "trained, dense",
    "control": "control: same steps without quantization",
    "control_rounded": "control, rounded to the scheme (PTQ)",
    "qat": "trained through quantization (QAT)",
    "exported": "exported and reloaded",
}


def table(summary: dict[str, Any], scheme: str | None) -> str:
    """The measured rows as text, one line each."""
    lines = [f"held-out perplexity{f', {scheme}' if scheme else ''}"]
    for name, nll in summary["nll"].items():
        shown = "not measured" if nll is None else f"{summary['perplexity'][name]:10.4f}   nll {nll:.5f}"
        lines.append(f"  {_LABELS[name]:46} {shown}")
    if summary["recovered"] is not None:
        lines.append(f"  recovered of the damage (nll): {100 * summary['recovered']:.1f} %")
    elif scheme is not None:
        lines.append(f"  recovered: {summary['recovered_note']}")
    return "\n".join(lines)
