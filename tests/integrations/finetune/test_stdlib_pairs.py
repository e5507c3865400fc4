"""Docstrings and functions of the standard library as rows."""

import ast

from aotrain.integrations.finetune.stdlib_pairs import _pairs, stdlib_pairs

SOURCE = '''\
class A:
    def f(self, x):
        """First line
        of a paragraph.

        More.
        """
        if x:

            return 1
        return 2

    def only_documented(self):
        """Nothing else."""

def one_line(): """Doc."""

def undocumented():
    return 3

async def g():
    "Short."
    return 4
'''


def test_pairs_of_a_module():
    assert list(_pairs(SOURCE)) == [
        ("# Short.\n", "async def g():\n    return 4\n"),
        ("# First line of a paragraph.\n", "def f(self, x):\n    if x:\n\n        return 1\n    return 2\n"),
    ]
    assert list(_pairs("def broken(:")) == []


def test_rows_are_many_short_unique_and_cut_anywhere():
    rows = stdlib_pairs(max_rows=300, max_chars=400)
    assert len(rows) == 300
    assert len({row["completion"] for row in rows}) == 300
    for row in rows:
        assert row["prompt"].startswith("# ")
        assert len(row["prompt"]) + len(row["completion"]) <= 400
        ast.parse(row["completion"])
    assert stdlib_pairs(max_rows=100, max_chars=400) == rows[:100]
