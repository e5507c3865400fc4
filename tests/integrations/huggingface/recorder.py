"""What the engine asks of `aotrain.qat` and `aotrain.export`, recorded; `export` copies the dense checkpoint instead.

What the real exporter makes of it is tested in test_finetune_end_to_end.py.
"""

import shutil
from pathlib import Path

import torch

import aotrain.export
import aotrain.qat


class QATSchedule(aotrain.qat.QATSchedule):
    # (start_step, anneal_steps, step) of every call.
    calls: list = []  # noqa: RUF012

    def apply(self, model: torch.nn.Module, step: int) -> None:
        QATSchedule.calls.append((self.start_step, self.anneal_steps, step))
        super().apply(model, step)


# Keyword arguments of every export.
EXPORTS: list[dict] = []


def export(source: Path, destination: Path, **options):
    EXPORTS.append({"source": Path(source), "destination": Path(destination), **options})
    shutil.copytree(source, destination, ignore=shutil.ignore_patterns("served", "control", "checkpoint-*"))
    return "exported"


def install(monkeypatch) -> None:
    """Put the recorders where the engine imports from."""
    QATSchedule.calls.clear()
    EXPORTS.clear()
    monkeypatch.setattr(aotrain.qat, "QATSchedule", QATSchedule)
    monkeypatch.setattr(aotrain.export, "export", export)
