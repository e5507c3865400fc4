"""What the tests of every C++ kernel need: the built library, and each instruction set that this CPU has."""

from pathlib import Path
from types import ModuleType

import pytest

from aotrain import _build


def build_or_skip(name: str, module: ModuleType) -> None:
    """Build csrc/cpu/<name>.cpp for the ctypes module that loads it; skip, with the reason, where it cannot be."""
    if _build.disabled():
        pytest.skip("AOTRAIN_NO_NATIVE is set")
    try:
        _build.build_library(Path(_build.sources()[0]).with_name(f"{name}.cpp"))
    except _build.BuildError as error:
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
