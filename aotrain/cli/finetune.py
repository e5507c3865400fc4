"""`aotrain finetune RECIPE.yaml`: check the recipe, then train, export and measure as it says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from aotrain.cli.launch import NOT_INSTALLED, run, torchrun_command

_OWN = ("--set", "--nproc", "--check", "--help")


def finetune(
    recipe: tyro.conf.Positional[Path],
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = (),
    nproc: int = 1,
    check: bool = False,
) -> int:
    """Fine-tune a Hugging Face model: quantization-aware, in float8, with low-bit optimizers; export it.

    Any key of the recipe is an option: --optimizer.lr 1e-4 --quantize.scheme int4-g128 --lora null. Several machines:
    torchrun ... -m aotrain.cli finetune RECIPE.yaml, on each.

    Args:
        recipe: YAML file, for example configs/finetune/tiny_int2_offline_cpu.yaml.
        set: the same as --KEY VALUE, for a key that is also an option of this command. May be repeated.
        nproc: processes on this machine, one per GPU, started by torchrun.
        check: only check the recipe, with what transformers, TRL and the model's configuration say about it.
    """
    try:
        from aotrain.integrations.config_file import JobError
        from aotrain.integrations.finetune import describe, load_recipe, problems
        from aotrain.integrations.finetune import run as train
    except ImportError as error:
        print(f"error: {error}; {NOT_INSTALLED}", file=sys.stderr)
        return 2
    if nproc < 1:
        print(f"error: --nproc got {nproc}, want at least 1", file=sys.stderr)
        return 2
    try:
        load_recipe(recipe, set)  # what can be said without loading anything
        if nproc > 1 and not check:
            overrides = [part for override in set for part in ("--set", override)]
            return run(torchrun_command("aotrain.cli", ["finetune", str(recipe), *overrides], nproc))
        checked = load_recipe(recipe, set, check=problems)
        if check:
            print(describe(checked))
            print(f"{recipe}: ok")
        else:
            train(checked)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def keys_as_options(arguments: Sequence[str]) -> list[str]:
    """`--optimizer.lr 1e-4` as `--set optimizer.lr=1e-4`; what this command names itself stays.

    Args:
        arguments: of the command line, after `finetune`.
    """
    rewritten: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if not key.startswith("--") or key in _OWN:
            rewritten.append(word)
            continue
        if not equals:
            # A negative number is a value, another option is not.
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        rewritten += ["--set", f"{key.removeprefix('--')}={value}"]
    return rewritten
