"""The source of the running interpreter's standard library: real text of 11 MB that every machine has.

It differs between Python versions, so losses on it are comparable only within one.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Generated tables and packages that are not the standard library itself: long runs of numbers make losses jump.
_SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__pycache__",
        "encodings",
        "pydoc_data",
        "lib2to3",
    }
)


def stdlib_files() -> Iterator[tuple[str, Path]]:
    """(name inside the library with forward slashes, path) of each source file, ordered by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _SKIPPED_FOLDERS.intersection(name.parts):
            yield name.as_posix(), path
