"""Lookup tables as tensors, built once."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Arguments = ParamSpec("Arguments")
Table = TypeVar("Table")


def cached_table(build: Callable[Arguments, Table]) -> Callable[Arguments, Table]:
    """Cache what a function of hashable arguments builds.

    Under a dispatch mode the table is built anew: FakeTensorMode, with which tools estimate memory, would leave a fake
    tensor in the cache for all later steps, and does not take a real one from it.
    """
    cached = functools.lru_cache(maxsize=16)(build)

    @functools.wraps(build)
    def table(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Table:
        return build(*args, **kwargs) if is_in_torch_dispatch_mode() else cached(*args, **kwargs)

    return table
