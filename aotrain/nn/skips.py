"""Lists of layers to leave alone, as job files write them: globs over the dotted name, or any part of it."""

from collections.abc import Sequence
from fnmatch import fnmatchcase


def matches_skip(fqn: str, pattern: str) -> bool:
    """Whether an entry of a skip list names this layer."""
    return pattern in fqn or fnmatchcase(fqn, pattern)


def skip_patterns(kept: Sequence[str], converted: Sequence[str]) -> list[str]:
    """The shortest entries found that match every kept layer and no converted one.

    Layers that differ only in a number become one glob, `layers.*.attention.wo`; a name that a converted layer contains
    is written as a glob that matches nothing else.
    """
    patterns: list[str] = []
    for fqn in kept:
        if any(matches_skip(fqn, pattern) for pattern in patterns):
            continue
        candidates = (any_number(fqn), fqn, f"{fqn[:-1]}[{fqn[-1:]}]")
        patterns.append(next(p for p in candidates if not any(matches_skip(other, p) for other in converted)))
    return patterns


def any_number(fqn: str) -> str:
    """The name with every numeric component replaced by a star."""
    return ".".join("*" if part.isdigit() else part for part in fqn.split("."))
