"""Builds fastlm: pure Python and Triton everywhere, and two compiled files where asked for or possible.

fastlm._host, a small pybind11 module, only speeds up host-side index building; a numpy twin serves where it is missing, so a
failed or skipped build is never an error. fastlm/libfastlm_cuda.so, the CUDA kernels, is built where FASTLM_CUDA=1 is set and
nvcc and torch are found; without it the "cuda" backend is missing, and `fastlm doctor` says so. One wheel serves every
Python >= 3.10.
"""

import os
import shutil
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "csrc"))
sys.dont_write_bytecode = True  # csrc holds sources only
import build_library  # noqa: E402

LIBRARY = "fastlm." + os.path.splitext(build_library.NAME)[0]


class OptionalBuild(build_ext):
    """Builds what it can and says what it could not."""

    def run(self):
        if not any(ext.name == LIBRARY for ext in self.extensions):
            stale = os.path.join(self.build_lib, "fastlm", build_library.NAME)  # of a build before this one
            if os.path.exists(stale):
                os.remove(stale)
        super().run()

    def get_ext_filename(self, fullname):
        if fullname.rsplit(".", 1)[-1] == LIBRARY.rsplit(".", 1)[-1]:  # no Python module: no Python's suffix
            return os.path.join(*fullname.split(".")[:-1], build_library.NAME)
        return super().get_ext_filename(fullname)

    def build_extension(self, ext):
        if ext.name == LIBRARY:
            made = build_library.build(self.get_ext_fullpath(ext.name), os.path.join(HERE, "build", "cuda"))
            print(f"fastlm: {build_library.NAME} was built from {len(made)} objects")
            return
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


def library_extension():
    """The library of CUDA kernels, if it is asked for and can be built. A compile error is an error: it was asked for."""
    if os.environ.get("FASTLM_CUDA", "0") != "1":
        print(f"fastlm: {build_library.NAME} is not built; set FASTLM_CUDA=1 where nvcc is for the CUDA kernels")
        return []
    try:
        build_library.check()
    except build_library.CannotBuild as error:
        print(f"fastlm: {build_library.NAME} is not built although FASTLM_CUDA=1 is set: {error}")
        return []
    return [Extension(LIBRARY, ["csrc/bindings/library.cpp"])]


setup(
    packages=["fastlm", "fastlm.kernels"]
    + sorted(
        root.replace(os.sep, ".") for root, _, files in os.walk("fastlm") if root != "fastlm" and "__init__.py" in files
    ),
    package_dir={"fastlm.kernels": "kernels"},
    ext_modules=host_extension() + library_extension(),
    cmdclass={"build_ext": OptionalBuild},
    # Tagged abi3 although the pybind11 module serves one Python only: every other Python finds no module of its
    # own in the wheel and uses the numpy twin (`fastlm doctor` says which one is in use). The library serves them all.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
