"""Lookup tables as tensors, built once."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Arguments = ParamSpec("Arguments")
Table = TypeVar("Table")


def cached_table(build: Callable[Arguments, Table]) -> Callable[Arguments, Table]:
    """Cache what a function of hashable arguments builds.

    Under a dispatch mode the table is built anew: FakeTensorMode, with which tools estimate memory, would leave a fake
    tensor in the cache for all later steps, and does not take a real one from it. So it is in a graph that is compiled,
    where Dynamo would ignore the cache with a warning.
    """
    cached = functools.lru_cache(maxsize=16)(build)

    @functools.wraps(build)
    def table(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Table:
        anew = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        return build(*args, **kwargs) if anew else cached(*args, **kwargs)

    return table
