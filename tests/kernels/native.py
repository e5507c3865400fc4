"""What the tests of every C++ kernel need: the built library, and each instruction set that this CPU has."""

from pathlib import Path
from types import ModuleType

import pytest

from aotrain import _build


def library_or_skip(source: Path) -> Path:
    """Build one source; skip where there is no compiler for it.

    A source that does not compile is a failure: plain torch would take over, and nothing else would show it.
    """
    if _build.disabled():
        pytest.skip("AOTRAIN_NO_NATIVE is set")
    try:
        return _build.build_library(source)
    except _build.BuildError as error:
        if not str(error).startswith(("no C++ compiler", "no CUDA compiler")):
            raise
        pytest.skip(str(error))


def build_or_skip(name: str, module: ModuleType) -> None:
    """Build csrc/cpu/<name>.cpp for the ctypes module that loads it; skip where there is no compiler."""
    library_or_skip(Path(_build.sources()[0]).with_name(f"{name}.cpp"))
    module.library.cache_clear()
    module.native_library.cache_clear()


def isa_or_skip(name: str, module: ModuleType, isa: str) -> str:
    """The instruction set, if this CPU has it."""
    library, reason = module.library()
    assert library is not None, reason
    if module.ISAS[isa] > getattr(library, f"aotrain_{name}_isa")():
        pytest.skip(f"this CPU has no {isa}")
    return isa
