"""Builds fastlm: pure Python and Triton everywhere, plus a small pybind11 module where a C++ compiler is found.

The compiled module (fastlm._host) only speeds up host-side index building; a numpy twin serves where it is missing,
so a failed or skipped build is never an error. One wheel serves every Python >= 3.10.
"""

import os
import shutil

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class OptionalBuild(build_ext):
    """Builds what it can and says what it could not."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:  # any compiler trouble: the numpy twin serves
            print(f"fastlm: {ext.name} was not built ({error}); its numpy twin will be used")


def host_extension():
    """The pybind11 module, if pybind11 and a C++ compiler are at hand."""
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return []
    try:
        import pybind11
    except ImportError:
        return []
    return [
        Extension(
            "fastlm._host",
            ["csrc/host.cpp"],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden"],
            language="c++",
            optional=True,  # setuptools then copies only what was built
        )
    ]


setup(
    packages=["fastlm", "fastlm.kernels"]
    + sorted(
        root.replace(os.sep, ".") for root, _, files in os.walk("fastlm") if root != "fastlm" and "__init__.py" in files
    ),
    package_dir={"fastlm.kernels": "kernels"},
    ext_modules=host_extension(),
    cmdclass={"build_ext": OptionalBuild},
    # Tagged abi3 although the pybind11 module serves one Python only: every other Python finds no module of its
    # own in the wheel and uses the numpy twin (`fastlm doctor` says which one is in use).
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
