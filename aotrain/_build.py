"""Compile the C++ kernels: `python -m aotrain._build`.

Each csrc/cpu/*.cpp becomes aotrain/kernels/lib/<name>-<hash>.so. The hash covers sources and command, so a library is
never used with other sources than its own. A library that cannot be built costs speed, never an import: torch
implementations take over. AOTRAIN_NO_NATIVE=1 disables building and loading.

Needs neither torch nor setuptools.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# A wheel carries a copy inside the package; in a checkout they lie beside it.
SOURCE_DIRS = (PACKAGE / "csrc" / "cpu", PACKAGE.parent / "csrc" / "cpu")
LIBRARY_DIR = PACKAGE / "kernels" / "lib"
# No contraction: every operation rounds once, as in the torch reference. The sources choose instruction sets at run
# time, so a library runs on any CPU of its architecture.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-fno-math-errno")
_TIMEOUT_SECONDS = 300


class BuildError(RuntimeError):
    """A library could not be built; the message says why and what to do."""


def disabled() -> bool:
    """Whether AOTRAIN_NO_NATIVE is set."""
    return os.environ.get("AOTRAIN_NO_NATIVE", "") not in ("", "0")


def sources() -> list[Path]:
    """The .cpp files, one library each; empty when this installation has none."""
    return next((found for folder in SOURCE_DIRS if (found := sorted(folder.glob("*.cpp")))), [])


def library_path(source: Path, folder: Path = LIBRARY_DIR) -> Path:
    """Where the library of a source belongs."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in [source, *sorted(source.parent.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return folder / f"{source.stem}-{digest.hexdigest()[:12]}.so"


def build_library(source: Path, folder: Path = LIBRARY_DIR) -> Path:
    """Compile one source, unless its library is there already; libraries of older sources are removed.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    target = library_path(source, folder)
    if target.exists():
        return target
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise BuildError(f"no C++ compiler: {' '.join(compiler) or 'CXX'} is not in PATH (install g++, or set CXX)")
    folder.mkdir(parents=True, exist_ok=True)
    # Under another name first: a process that loads while another builds sees the whole library or none.
    unfinished = target.with_suffix(f".{os.getpid()}.tmp")
    command = [*compiler, *FLAGS, str(source), "-o", str(unfinished)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        for old in folder.glob(f"{source.stem}-*.so"):
            old.unlink(missing_ok=True)
        unfinished.replace(target)
    except subprocess.CalledProcessError as error:
        output = (error.stderr or error.stdout).strip()
        raise BuildError(f"{shlex.join(command)} failed with exit status {error.returncode}:\n{output}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command)} failed: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def build_all(folder: Path = LIBRARY_DIR) -> list[Path]:
    """Build what can be built, and print what and why not; never raises."""
    if disabled():
        print("aotrain: AOTRAIN_NO_NATIVE is set, no native kernels are built")
        return []
    built = []
    for source in sources():
        try:
            built.append(build_library(source, folder))
            print(f"aotrain: {source.name} -> {built[-1]}")
        except (BuildError, OSError) as error:
            print(f"aotrain: {source.name} not built, PyTorch code runs instead: {error}", file=sys.stderr)
    return built


if __name__ == "__main__":
    sys.exit(0 if disabled() or len(build_all()) == len(sources()) else 1)
