"""Build entry point: pure Python, and the CUDA extension of csrc/ where nvcc and torch are found.

How it is built, and which variables steer that, stands in hiar_kernels/common/extension.py. It is loaded by path here:
the package itself imports torch, which an isolated build does not have.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

_spec = importlib.util.spec_from_file_location("extension", Path(__file__).parent / "hiar_kernels/common/extension.py")
extension = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(extension)


class BuildPy(build_py):
    """The Python files, then the library (or the reason why there is none) beside them."""

    def run(self):
        super().run()
        folder = extension.PACKAGE if self.editable_mode else Path(self.build_lib, "hiar_kernels")
        self.mkpath(str(folder))
        print(f"hiar-kernels: {extension.build(folder)}", file=sys.stderr, flush=True)


class Platform(Distribution):
    """A wheel with the library inside is one of this platform."""

    def has_ext_modules(self):
        return extension.builds()


setup(cmdclass={"build_py": BuildPy}, distclass=Platform)
