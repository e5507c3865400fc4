"""Build the C++ kernels with the package; everything else is in pyproject.toml. Without a compiler: pure Python.

The sources of the CUDA kernels are only copied: `python -m aotrain._build` builds them.
"""

import importlib.util
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def _build_script():
    # By path: importing aotrain would need torch, which an isolated build does not have.
    spec = importlib.util.spec_from_file_location("_aotrain_build", ROOT / "aotrain" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """Adds kernels/lib/*.so, and their sources, by whose hash the libraries are found."""

    def run(self):
        super().run()
        script = _build_script()
        if self.editable_mode:
            script.build_all()
            return
        package = Path(self.build_lib) / "aotrain"
        for source in sorted((ROOT / "csrc").glob("*/*")):
            target = package / source.relative_to(ROOT)
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))
        for old in (package / "kernels" / "lib").glob("*.so"):
            old.unlink()
        script.build_all(package / "kernels" / "lib")


class WheelWithKernels(bdist_wheel):
    """A wheel with libraries is for one platform, but for any Python: they are loaded with ctypes."""

    def get_tag(self):
        package = Path(self.get_finalized_command("build_py").build_lib) / "aotrain"
        if not any((package / "kernels" / "lib").glob("*.so")):
            return super().get_tag()
        self.root_is_pure = False
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels})
