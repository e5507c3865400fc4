"""The folder of a run and what every engine does with it: claim it, the control's recipe, export, JSON files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aotrain.integrations.config_file import JobError

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Recipe

SUMMARY = "summary.json"
_RECIPE = "recipe.json"
# A schedule that starts here never does.
NEVER = 2**62


def refuse_other_run(recipe: Recipe, checkpoints: str = "checkpoint-*") -> None:
    """Refuse a folder that holds another run; every rank asks before any writes.

    Args:
        recipe: whose `output_dir` it is.
        checkpoints: pattern of the checkpoints that an interrupted run leaves in it.

    Raises:
        JobError: it holds a finished run, or files and no `trainer.resume_from_checkpoint`.
    """
    folder = recipe.output_dir
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if (folder / SUMMARY).exists():
        raise JobError(f"trainer.output_dir: {folder} holds a finished run; remove it or give another")
    if not recipe.trainer.get("resume_from_checkpoint"):
        found = sorted(folder.glob(checkpoints), key=lambda path: path.stat().st_mtime)
        newest = f", up to {found[-1].name}" if found else ""
        advice = "continue it with --trainer.resume_from_checkpoint true, " if found else ""
        raise JobError(
            f"trainer.output_dir: {folder} is not empty, as of a run that did not finish{newest}; "
            f"{advice}remove it, or give another"
        )


def write_recipe(recipe: Recipe) -> None:
    """Make the folder, with the recipe and its defaults in it."""
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(recipe.output_dir / _RECIPE, asdict(recipe))


def control_recipe(recipe: Recipe) -> Recipe:
    """The same training without fake quantization, in a folder of its own and without checkpoints."""
    assert recipe.quantize is not None
    kept = {key: value for key, value in recipe.trainer.items() if key != "resume_from_checkpoint"}
    return replace(
        recipe,
        quantize=replace(recipe.quantize, start_step=NEVER, anneal_steps=0),
        trainer={**kept, "output_dir": str(recipe.output_dir / "control"), "save_strategy": "no"},
    )


def export_served(recipe: Recipe, dense: Path) -> None:
    """Write the quantized checkpoint of a dense one, as the recipe's export section says, and print the report."""
    from aotrain.export import export

    assert recipe.export is not None
    assert recipe.quantize is not None
    report = export(
        dense,
        Path(recipe.export.path),
        scheme=recipe.quantize.scheme,
        format=recipe.export.format,
        exclude=recipe.quantize.exclude,
        embeddings=recipe.quantize.embeddings,
        verify=recipe.export.verify,
    )
    print(report)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file that is whole or not there."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(scratch, path)
