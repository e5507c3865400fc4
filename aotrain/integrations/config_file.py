"""Job files: YAML in, a checked object out, or one error that lists every mistake.

``load_config(path, schema, overrides)`` reads YAML safely (no tags, no duplicate keys), applies ``key.path=value``
overrides, moves aliased keys to their real place and validates with pydantic. A schema is made of ``Section`` classes
or of frozen dataclasses that forbid unknown keys. All problems are gathered and raised as one ``ConfigError``; each
names the file and line (or the override), the dotted key, what was wanted, what was found and, for a misspelt key, the
nearest valid one.

A dataclass with a field ``kwargs`` passes keys on: those that it does not name itself are gathered there, for a
function of another library that takes them verbatim.

No torch import here: a job file is checked before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

ConfigT = TypeVar("ConfigT")

# The field of a dataclass that takes the keys which it does not name.
_KWARGS = "kwargs"
# A key that is passed on and this close to one of the section's own is a misspelling of it.
_MISSPELT = 0.8

# A check looks at a valid config as a whole and yields (dotted key, message) for each thing that cannot work.
Check = Callable[[Any], Iterable[tuple[str, str]]]


class JobError(ValueError):
    """A mistake that the author of a job can repair; the entry points show it without a traceback."""


class ConfigError(JobError):
    """Every problem of one job file. ``problems`` holds them one by one."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{count} in the job:", *(f"  {problem}" for problem in problems)]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    # "configs/x.yaml:12" or "--set optimizer.lr": where the author has to look.
    where: str
    # Dotted path, such as "optimizer.lr"; empty when the file as a whole is meant.
    key: str
    # Got, want and the remedy, in one sentence.
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.message}" if self.key else f"{self.where}: {self.message}"


# Unknown keys are errors, types are not coerced (except int to float).
STRICT = ConfigDict(extra="forbid", strict=True)


class Section(BaseModel):
    """Base of every section: strict, and values are fixed."""

    model_config = ConfigDict(**STRICT, frozen=True, populate_by_name=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, under the method name that training engines look for when they log their configuration."""
        return self.model_dump(mode="json", by_alias=True)


def load_config(
    path: str | Path,
    schema: type[ConfigT],
    overrides: Sequence[str] = (),
    *,
    aliases: Mapping[str, str] | None = None,
    check: Check | None = None,
    flag: str = "--set ",
) -> ConfigT:
    """Read, override and validate a job file.

    Args:
        path: a YAML file whose top level is a mapping.
        schema: made of ``Section`` classes, or of dataclasses whose ``__pydantic_config__`` is ``STRICT``.
        overrides: ``"key.path=value"`` strings; the value is read as YAML, later ones win.
        aliases: other spellings of a key, ``{"optim": "optimizer.name"}``; giving both spellings is a problem.
        check: looks at the valid config as a whole, for rules that span several keys.
        flag: what precedes the key of an override where the author typed it, for messages.

    Raises:
        ConfigError: with all problems found.
    """
    document = _Document(Path(path), flag)
    document.read()
    document.rename(aliases or {})
    for override in overrides:
        document.override(override)
    document.rename(aliases or {})  # of overrides
    document.gather_kwargs(schema)
    config = None
    if not document.fatal:
        try:
            # As JSON, whose strict mode takes lists for tuples and mappings for dataclasses, but still no "3" for 3.
            config = TypeAdapter(schema).validate_json(json.dumps(document.data, default=str))
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                document.report(*_explain(detail, schema))
    if config is not None and check is not None:
        for key, message in check(config):
            document.report(key, message)
    if document.problems or config is None:
        raise ConfigError(document.problems)
    return config


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``4e-3`` as a number; YAML 1.1 wants ``4.0e-3`` and would give a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Document:
    """The raw mapping, where each of its keys was written, and the problems found so far."""

    def __init__(self, path: Path, flag: str) -> None:
        self.path = path
        self.flag = flag
        self.data: dict[str, Any] = {}
        self.where: dict[str, str] = {}
        self.problems: list[Problem] = []
        # True when there is nothing to validate: unreadable file, broken YAML, no mapping at the top.
        self.fatal = False

    def report(self, key: str, message: str) -> None:
        """Add a problem, placed at the key or at the nearest written key above it."""
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            if (where := self.where.get(".".join(parts[:end]))) is not None:
                self.problems.append(Problem(where=where, key=key, message=message))
                return
        self.problems.append(Problem(where=str(self.path), key=key, message=message))

    def read(self) -> None:
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            self._stop(str(self.path), f"cannot read the job file: {error}")
            return
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            data = self._convert(loader, node, "") if node is not None else {}
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{self.path}:{mark.line + 1}" if mark is not None else str(self.path)
            self._stop(where, f"broken YAML: {getattr(error, 'problem', None) or error}")
            return
        finally:
            loader.dispose()
        if not isinstance(data, dict):
            self._stop(f"{self.path}:1", f"want a mapping of sections at the top, got {_show(data)}")
            return
        self.data = data

    def override(self, text: str) -> None:
        """Apply one ``key.path=value``."""
        key, equals, raw = text.partition("=")
        key = key.strip()
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            self.problems.append(Problem(where=f"{self.flag}{text}", key="", message="want key.path=value"))
            return
        try:
            value = yaml.load(raw, _Loader)
        except yaml.YAMLError as error:
            message = f"broken YAML value {raw!r}: {error}"
            self.problems.append(Problem(where=f"{self.flag}{key}", key=key, message=message))
            return
        self._put(key, value, f"{self.flag}{key}")

    def rename(self, aliases: Mapping[str, str]) -> None:
        for alias, key in aliases.items():
            found, value = self._take(alias)
            if not found:
                continue
            where = self.where.get(alias, str(self.path))
            if self._has(key):
                self.problems.append(
                    Problem(where=where, key=alias, message=f"is another name of {key}, which is given too; keep one")
                )
                continue
            self._put(key, value, where)

    def gather_kwargs(self, schema: type) -> None:
        """In sections with a field for them, put the keys that they do not name there."""
        for name, section in _sections(schema).items():
            names, given = _names(section), self.data.get(name)
            if _KWARGS not in names or not isinstance(given, dict):
                continue
            own = [key for key in names if key != _KWARGS]
            kwargs = {key: given.pop(key) for key in list(given) if key not in own}
            for key in kwargs:
                if near := difflib.get_close_matches(key, own, n=1, cutoff=_MISSPELT):
                    self.report(f"{name}.{key}", f"unknown key; did you mean '{name}.{near[0]}'?")
            if kwargs:
                given[_KWARGS] = kwargs

    def _stop(self, where: str, message: str) -> None:
        self.problems.append(Problem(where=where, key="", message=message))
        self.fatal = True

    def _convert(self, loader: _Loader, node: yaml.Node, prefix: str) -> Any:
        """A node as plain data, remembering the line of every mapping key."""
        if node.tag.startswith("!") or node.tag.startswith("tag:yaml.org,2002:python/"):
            return loader.construct_object(node, deep=True)  # SafeLoader refuses it, naming the tag
        if isinstance(node, yaml.SequenceNode):
            return [self._convert(loader, item, f"{prefix}.{i}") for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node))
            dotted = f"{prefix}.{key}" if prefix else key
            where = f"{self.path}:{key_node.start_mark.line + 1}"
            if key in result:
                message = f"is given twice, first at {self.where[dotted]}; keep one"
                self.problems.append(Problem(where=where, key=dotted, message=message))
            self.where[dotted] = where
            result[key] = self._convert(loader, value_node, dotted)
        return result

    def _put(self, key: str, value: Any, where: str) -> None:
        *parents, leaf = key.split(".")
        section = self.data
        for depth, name in enumerate(parents):
            below = section.get(name)
            if below is None:
                below = section[name] = {}
            if not isinstance(below, dict):
                path = ".".join(parents[: depth + 1])
                self.problems.append(Problem(where=where, key=key, message=f"{path} is a value, not a section"))
                return
            section = below
        section[leaf] = value
        self.where[key] = where

    def _has(self, key: str) -> bool:
        section: Any = self.data
        for name in key.split("."):
            if not isinstance(section, dict) or name not in section:
                return False
            section = section[name]
        return True

    def _take(self, key: str) -> tuple[bool, Any]:
        """Remove a key and the sections that it leaves empty; ``optim`` is an alias only while it holds a value."""
        if not self._has(key):
            return False, None
        *parents, leaf = key.split(".")
        chain = [self.data]
        for name in parents:
            chain.append(chain[-1][name])
        if isinstance(chain[-1][leaf], dict):
            return False, None
        value = chain[-1].pop(leaf)
        for name, section in zip(reversed(parents), reversed(chain[:-1]), strict=True):
            if not section[name]:
                del section[name]
        return True, value


def _explain(detail: Mapping[str, Any], schema: type) -> tuple[str, str]:
    """One pydantic error as (dotted key, sentence)."""
    loc = tuple(str(part) for part in detail["loc"])
    key = ".".join(loc)
    kind, got = detail["type"], detail.get("input")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return key, _unknown_key(loc, schema)
    if kind == "missing":
        return key, "is missing and has no default"
    if kind == "literal_error":
        choices = [choice.strip("' ") for choice in re.split(r", | or ", detail["ctx"]["expected"])]
        near = difflib.get_close_matches(str(got), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return key, f"got {_show(got)}, want one of {', '.join(choices)}{hint}"
    if kind == "value_error":
        return key, f"{detail['ctx']['error']}"
    if kind in ("model_type", "dataclass_type", "dict_type"):
        return key, f"got {_show(got)}, want a section of key: value lines"
    if kind in ("list_type", "tuple_type"):
        return key, f"got {_show(got)}, want a list"
    wanted = detail["msg"].removeprefix("Input should be ")
    return key, f"got {_show(got)}, want {wanted}"


def _unknown_key(loc: tuple[str, ...], schema: type) -> str:
    *parents, leaf = loc
    section: type | None = schema
    for name in parents:
        section = _sections(section).get(name) if section is not None else None
    siblings = _names(section) if section is not None else []
    near = difflib.get_close_matches(leaf, siblings, n=1)
    if near:
        return f"unknown key; did you mean {'.'.join([*parents, near[0]])!r}?"
    every = _dotted_keys(schema)
    near = [key for key in every if key.rpartition(".")[2] == leaf] or difflib.get_close_matches(
        ".".join(loc), every, 1
    )
    if near:
        return f"unknown key; did you mean {near[0]!r}?"
    return f"unknown key; valid here: {', '.join(siblings)}"


def _fields(schema: type) -> dict[str, Any]:
    """Key and annotation of every field of a section."""
    if issubclass(schema, BaseModel):
        return {field.alias or name: field.annotation for name, field in schema.model_fields.items()}
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _names(schema: type) -> list[str]:
    return list(_fields(schema))


def _sections(schema: type) -> dict[str, type]:
    """The fields of a section that are sections themselves (also optional ones)."""
    result = {}
    for name, annotation in _fields(schema).items():
        union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        for option in typing.get_args(annotation) if union else (annotation,):
            if isinstance(option, type) and (dataclasses.is_dataclass(option) or issubclass(option, BaseModel)):
                result[name] = option
    return result


def _dotted_keys(schema: type, prefix: str = "") -> list[str]:
    sections = _sections(schema)
    keys = []
    for name in _names(schema):
        keys += _dotted_keys(sections[name], f"{prefix}{name}.") if name in sections else [f"{prefix}{name}"]
    return keys


def _show(value: Any) -> str:
    """A value as the author wrote it, with its type, short enough for one line."""
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return text if value is None else f"{text} ({type(value).__name__})"
