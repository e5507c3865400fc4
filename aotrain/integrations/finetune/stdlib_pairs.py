"""Training data that every machine has: docstrings and functions of Python's standard library (PSF licence).

A pair is the first paragraph of a docstring, as prompt, and the source of its function without the docstring, as
completion. Pairs are ordered by a hash of their file's name, so that cutting the list anywhere holds out whole files.
"""

from __future__ import annotations

import ast
import zlib
from collections.abc import Iterator

from aotrain.integrations.stdlib_source import stdlib_files


def stdlib_pairs(*, max_rows: int | None = None, max_chars: int | None = None) -> list[dict[str, str]]:
    """Rows with the keys prompt and completion, each pair once.

    Args:
        max_rows: only the first rows.
        max_chars: leave out pairs of more characters, prompt and completion together.
    """
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for _, path in sorted(stdlib_files(), key=lambda file: (zlib.crc32(file[0].encode()), file[0])):
        for prompt, completion in _pairs(path.read_text(encoding="utf-8", errors="replace")):
            size = len(prompt) + len(completion)
            if completion in seen or (max_chars is not None and size > max_chars):
                continue
            if len(rows) == max_rows:
                return rows
            seen.add(completion)
            rows.append({"prompt": prompt, "completion": completion})
    return rows


def _pairs(source: str) -> Iterator[tuple[str, str]]:
    """(docstring's first paragraph as a comment, function) of each documented function of a module."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # the library has a few files that are meant to be broken
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        # Line numbers and not ast.get_source_segment, which splits the whole file again for every node.
        start, documentation = node.lineno - 1, node.body[0]
        head = lines[start : documentation.lineno - 1]
        body = lines[documentation.end_lineno : node.end_lineno]
        indent = len(lines[start]) - len(lines[start].lstrip())
        if not head or not body:
            continue
        paragraph = " ".join(docstring.split("\n\n")[0].split())
        yield f"# {paragraph}\n", "".join(line[indent:] if line.strip() else "\n" for line in [*head, *body])
