"""Loading the compiled libraries, on first use and without ever failing."""

import ctypes
import functools

from aotrain._build import disabled, library_path, sources


@functools.lru_cache(maxsize=16)
def native_library(name: str, suffix: str = ".cpp") -> tuple[ctypes.CDLL | None, str | None]:
    """(the library built from csrc/cpu/<name>.cpp or csrc/cuda/<name>.cu, None) or (None, why it is not there).

    Nothing is compiled here: a first step must not wait for a compiler.
    """
    if disabled():
        return None, "AOTRAIN_NO_NATIVE is set"
    for source in sources(suffix):
        if source.stem == name:
            path = library_path(source)
            break
    else:
        return None, f"this installation has no {name}{suffix}"
    if not path.exists():
        return None, f"{path.name} is not built for the present sources (run: python -m aotrain._build)"
    try:
        return ctypes.CDLL(str(path)), None
    except OSError as error:
        return None, f"{path.name} cannot be loaded: {error}"
