"""What the tests of every C++ kernel need: the built library, and each instruction set that this CPU has."""

from pathlib import Path
from types import ModuleType

import pytest

from aotrain import _build


def build_or_skip(name: str, module: ModuleType) -> None:
    """Build csrc/cpu/<name>.cpp for the ctypes module that loads it; skip where there is no compiler.

    A source that does not compile is a failure: plain torch would take over, and nothing else would show it.
    """
    if _build.disabled():
        pytest.skip("AOTRAIN_NO_NATIVE is set")
    try:
        _build.build_library(Path(_build.sources()[0]).with_name(f"{name}.cpp"))
    except _build.BuildError as error:
        if "no C++ compiler" not in str(error):
            raise
        pytest.skip(str(error))
    module.library.cache_clear()
    module.native_library.cache_clear()


def isa_or_skip(name: str, module: ModuleType, isa: str) -> str:
    """The instruction set, if this CPU has it."""
    library, reason = module.library()
    assert library is not None, reason
    if module.ISAS[isa] > getattr(library, f"aotrain_{name}_isa")():
        pytest.skip(f"this CPU has no {isa}")
    return isa
