"""Building CUDA libraries: each for itself, skipped where there is no nvcc, and never by an installation."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from aotrain import _build

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """csrc with one C++ and two CUDA sources, and a compiler that fails for what is called bad."""
    for name in ("cpu/sum.cpp", "cuda/bad.cu", "cuda/good.cu"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('extern "C" int f() { return 1; }\n')
    compiler = tmp_path / "nvcc"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *bad.cu*) echo "bad.cu(1): error: no such thing" >&2; exit 2;; esac\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo library > "$2"; shift; done\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(_build, "SOURCE_DIRS", (tmp_path,))
    monkeypatch.setenv("NVCC", str(compiler))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("AOTRAIN_NO_NATIVE", raising=False)
    return tmp_path


def test_one_broken_source_costs_one_library(sources: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    built = _build.build_all(tmp_path / "lib", (".cpp", ".cu"))
    assert [path.name.split("-")[0] for path in built] == ["sum", "good"]
    error = capfd.readouterr().err
    assert "bad.cu not built" in error
    assert "error: no such thing" in error


def test_an_installation_builds_no_cuda(sources: Path, tmp_path: Path):
    assert [path.name.split("-")[0] for path in _build.build_all(tmp_path / "lib")] == ["sum"]


def test_a_change_of_a_cuda_header_makes_another_library(sources: Path):
    source = sources / "cuda" / "good.cu"
    (sources / "cuda" / "tile.cuh").write_text("// one\n")
    before = _build.library_path(source)
    (sources / "cuda" / "tile.cuh").write_text("// two\n")
    assert _build.library_path(source) != before


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    tool = tmp_path / "bin" / "nvcc"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    assert _build.find_nvcc() == str(tool)
    monkeypatch.setenv("PATH", "")
    assert _build.find_nvcc() in (None, "/usr/local/cuda/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert _build.find_nvcc() == str(tool)
    monkeypatch.setenv("NVCC", "/nonexistent/nvcc")  # what a user names, or nothing
    assert _build.find_nvcc() is None


def test_without_nvcc_the_command_says_what_it_skips(sources: Path, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path):
    monkeypatch.setattr(_build, "find_nvcc", lambda: None)
    monkeypatch.setattr(_build, "LIBRARY_DIR", tmp_path / "lib")
    monkeypatch.setattr(_build.build_all, "__defaults__", (tmp_path / "lib", (".cpp",)))
    assert _build.main() == 0
    assert "csrc/cuda skipped, there is no nvcc" in capsys.readouterr().out
    with pytest.raises(_build.BuildError, match="no CUDA compiler"):
        _build.build_library(sources / "cuda" / "good.cu", tmp_path / "lib")


def test_the_command_fails_when_a_library_does(sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(_build.build_all, "__defaults__", (tmp_path / "lib", (".cpp",)))
    assert _build.main() == 1


def test_disabled_by_the_environment():
    environment = {**os.environ, "AOTRAIN_NO_NATIVE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "aotrain._build"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "no native kernels are built" in result.stdout
