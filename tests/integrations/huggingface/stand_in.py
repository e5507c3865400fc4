"""Stand-ins for `aotrain.qat` and `aotrain.export`, with their signatures: the engine alone, whatever they do.

A prepared layer rounds its weight to the scheme in forward, straight through; `export` copies the dense checkpoint.
What the real ones do together with the engine is tested in test_finetune_end_to_end.py.
"""

import shutil
import sys
import types
from fnmatch import fnmatch
from pathlib import Path

import torch

from aotrain.nn.report import Report, ReportRow
from aotrain.ops.fake_quantize import fake_quantized_linear
from aotrain.quantization import get_scheme


class PreparedLinear(torch.nn.Linear):
    scheme = None
    enabled = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return super().forward(x)
        return fake_quantized_linear(x, self.weight, self.bias, self.scheme.activation, self.scheme.weight)


def prepare_qat(model, scheme, *, exclude=("lm_head",), embeddings=False):
    rows = []
    for name, module in model.named_modules():
        if type(module) is not torch.nn.Linear:
            continue
        if any(fnmatch(name, pattern) for pattern in exclude):
            rows.append(ReportRow(name, "skipped", "excluded"))
            continue
        module.__class__ = PreparedLinear
        module.scheme = get_scheme(scheme)
        rows.append(ReportRow(name, "converted", module.scheme.name))
    return Report("stand-in", tuple(rows))


class QATSchedule:
    # (start_step, anneal_steps, step) of every call.
    calls: list = []  # noqa: RUF012

    def __init__(self, start_step: int = 0, anneal_steps: int = 0) -> None:
        self.start_step, self.anneal_steps = start_step, anneal_steps

    def apply(self, model: torch.nn.Module, step: int) -> None:
        QATSchedule.calls.append((self.start_step, self.anneal_steps, step))
        for module in model.modules():
            if isinstance(module, PreparedLinear):
                module.enabled = step >= self.start_step


# Keyword arguments of every export.
EXPORTS: list[dict] = []


def export(source: Path, destination: Path, **options):
    EXPORTS.append({"source": Path(source), "destination": Path(destination), **options})
    shutil.copytree(source, destination, ignore=shutil.ignore_patterns("served", "control", "checkpoint-*"))
    return "exported"


def install(monkeypatch) -> None:
    """Put the stand-ins where the engine imports from."""
    QATSchedule.calls.clear()
    EXPORTS.clear()
    for name, members in {
        "aotrain.qat": {"prepare_qat": prepare_qat, "QATSchedule": QATSchedule},
        "aotrain.export": {"export": export},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
