"""Compile the C++ and CUDA kernels: `python -m aotrain._build`.

Each csrc/cpu/*.cpp and csrc/cuda/*.cu becomes aotrain/kernels/lib/<name>-<hash>.so. The hash covers sources and
command, so a library is never used with other sources than its own. A library that cannot be built costs speed, never
an import: torch implementations take over. AOTRAIN_NO_NATIVE=1 disables building and loading.

Installing the package builds the C++ kernels. The CUDA kernels take longer than the rest of an installation (30 s of
one core) and serve few machines, so only this command builds them, where there is an nvcc.

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
SOURCE_DIRS = (PACKAGE / "csrc", PACKAGE.parent / "csrc")
LIBRARY_DIR = PACKAGE / "kernels" / "lib"
# No contraction: every operation rounds once, as in the torch reference. The sources choose instruction sets at run
# time, so a library runs on any CPU of its architecture.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-fno-math-errno")
# Machine code for Hopper and for data-center Blackwell, whose 4-bit conversions only "a" code may use; the driver
# compiles the virtual code for all other GPUs since Hopper. No contraction here either.
CUDA_ARCHITECTURES = ("sm_90a", "sm_100a", "compute_90")
CUDA_FLAGS = (
    "-std=c++17", "-O3", "-shared", "-cudart=static", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden",
    *(f"-gencode=arch={code.replace('sm', 'compute')},code={code}" for code in CUDA_ARCHITECTURES), "--threads=0",
)  # fmt: skip
_KINDS = {".cpp": "cpu", ".cu": "cuda"}
_TIMEOUT_SECONDS = 300


class BuildError(RuntimeError):
    """A library could not be built; the message says why and what to do."""


def disabled() -> bool:
    """Whether AOTRAIN_NO_NATIVE is set."""
    return os.environ.get("AOTRAIN_NO_NATIVE", "") not in ("", "0")


def sources(suffix: str = ".cpp") -> list[Path]:
    """The .cpp or .cu files, one library each; empty when this installation has none."""
    folders = (root / _KINDS[suffix] for root in SOURCE_DIRS)
    return next((found for folder in folders if (found := sorted(folder.glob(f"*{suffix}")))), [])


def library_path(source: Path, folder: Path = LIBRARY_DIR) -> Path:
    """Where the library of a source belongs."""
    digest = hashlib.sha256(" ".join(_flags(source)).encode())
    for path in [source, *sorted(source.parent.glob("*.h")), *sorted(source.parent.glob("*.cuh"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return folder / f"{source.stem}-{digest.hexdigest()[:12]}.so"


def find_nvcc() -> str | None:
    """The CUDA compiler: what NVCC names, or else the nvcc of CUDA_HOME, of PATH or of /usr/local/cuda."""
    if named := os.environ.get("NVCC"):
        return shutil.which(named)
    homes = [os.path.join(home, "bin", "nvcc") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return next((found for place in (*homes[:-1], "nvcc", homes[-1]) if (found := shutil.which(place))), None)


def _flags(source: Path) -> tuple[str, ...]:
    return CUDA_FLAGS if source.suffix == ".cu" else FLAGS


def _compiler(source: Path) -> list[str]:
    if source.suffix == ".cu":
        if (nvcc := find_nvcc()) is None:
            raise BuildError("no CUDA compiler: nvcc is not in PATH (install the CUDA toolkit, or set NVCC)")
        return [nvcc]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise BuildError(f"no C++ compiler: {' '.join(compiler) or 'CXX'} is not in PATH (install g++, or set CXX)")
    return compiler


def build_library(source: Path, folder: Path = LIBRARY_DIR) -> Path:
    """Compile one source, unless its library is there already; libraries of older sources are removed.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    target = library_path(source, folder)
    if target.exists():
        return target
    compiler = _compiler(source)
    folder.mkdir(parents=True, exist_ok=True)
    # Under another name first: a process that loads while another builds sees the whole library or none.
    unfinished = target.with_suffix(f".{os.getpid()}.tmp")
    command = [*compiler, *_flags(source), str(source), "-o", str(unfinished)]
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


def build_all(folder: Path = LIBRARY_DIR, suffixes: tuple[str, ...] = (".cpp",)) -> list[Path]:
    """Build what can be built, and print what and why not; never raises."""
    if disabled():
        print("aotrain: AOTRAIN_NO_NATIVE is set, no native kernels are built")
        return []
    built = []
    for source in [source for suffix in suffixes for source in sources(suffix)]:
        try:
            built.append(build_library(source, folder))
            print(f"aotrain: {source.name} -> {built[-1]}")
        except (BuildError, OSError) as error:
            print(f"aotrain: {source.name} not built, PyTorch code runs instead: {error}", file=sys.stderr)
    return built


def main() -> int:
    """Build every kernel that this machine has a compiler for; returns the exit status."""
    suffixes = [".cpp"]
    if find_nvcc() is None:
        print("aotrain: csrc/cuda skipped, there is no nvcc (install the CUDA toolkit, or set NVCC)")
    else:
        suffixes.append(".cu")
    wanted = sum(len(sources(suffix)) for suffix in suffixes)
    return 0 if len(build_all(suffixes=tuple(suffixes))) == wanted or disabled() else 1


if __name__ == "__main__":
    sys.exit(main())
