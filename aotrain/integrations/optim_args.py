"""The `optim_args` of TrainingArguments: "key=value,key=value", with every key and type checked."""

import difflib
from collections.abc import Callable
from typing import Any

from aotrain.optim.state import check_bits


def parse_optim_args(text: str | None, name: str) -> dict[str, Any]:
    """Options of an optimizer, with their types.

    Args:
        text: "key=value,key=value"; spaces do not count; None and "" are no options.
        name: of the optimizer, a key of `aotrain.integrations.optimizers.OPTIMIZERS`.

    Raises:
        ValueError: an unknown or repeated key, or a value of another type; the message names the nearest valid key.
    """
    parsers = {key: parser for key, parser in _PARSERS.items() if key != "amsgrad" or name.startswith("adam")}
    options: dict[str, Any] = {}
    for entry in filter(None, (part.strip() for part in (text or "").split(","))):
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not value:
            raise ValueError(f"optim_args: got {entry!r}, want key=value,key=value")
        if key in options:
            raise ValueError(f"optim_args: {key} is given twice; want it once")
        if key in _TRAINING_ARGUMENTS:
            raise ValueError(f"optim_args: {key} is set by TrainingArguments({_TRAINING_ARGUMENTS[key]}=...)")
        if key not in parsers:
            near = difflib.get_close_matches(key, parsers, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"optim_args: unknown key {key!r} for {name}; want one of {', '.join(parsers)}{hint}")
        try:
            options[key] = parsers[key](value)
        except ValueError as error:
            raise ValueError(f"optim_args: {key}: {error}") from None
    return options


def _integer(value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"got {value!r}, want a whole number")
    return int(value)


def _positive(value: str) -> int:
    if (number := _integer(value)) < 1:
        raise ValueError(f"got {value!r}, want at least 1, for example 256")
    return number


def _flag(value: str) -> bool:
    if value.lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"got {value!r}, want true or false")
    return value.lower() in ("true", "1")


def _embedding_bits(value: str) -> int | str | None:
    return None if value == "own" else check_bits(value)


_PARSERS: dict[str, Callable[[str], Any]] = {
    "block_size": _positive,
    "bf16_stochastic_round": _flag,
    "seed": _integer,
    "bits": check_bits,
    "embedding_bits": _embedding_bits,
    "maximize": _flag,
    "amsgrad": _flag,
    "offload": _flag,
}

# What users of other optimizers write here, and where it belongs.
_TRAINING_ARGUMENTS = {
    "lr": "learning_rate",
    "betas": "adam_beta1",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}
