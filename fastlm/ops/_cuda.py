"""The library of CUDA kernels, built from csrc/: found and loaded when the "cuda" backend is first asked for, never at import.

The file lies in the package (`FASTLM_CUDA=1 pip install .` puts it there). A missing file, or one that cannot be used, is a
reason against the backend and nothing else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

VERSION = 3  # FASTLM_LIBRARY_VERSION in csrc/fastlm.h: the schemas this package calls
NAME = "libfastlm_cuda.so"
PATH = Path(__file__).resolve().parents[1] / NAME

_asked: dict[str, str | None] = {}  # the answer of `unavailable`, once there is one


def unavailable() -> str | None:
    """Why no kernel of the library can be called, or None once it is loaded. The first call loads it."""
    if "reason" not in _asked:
        _asked["reason"] = _load(PATH)
    return _asked["reason"]


unavailable._dynamo_marked_constant = (
    True  # what torch.compiler.assume_constant_result does, which imports all of Dynamo
)


def function(name: str) -> Callable:
    """The library's `fastlm_cuda::<name>`. Raises RuntimeError with the reason if there is no library to call."""
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"fastlm_cuda::{name} cannot be called: {reason}")
    return getattr(torch.ops.fastlm_cuda, name).default


def not_measured(backend: str, *_: object) -> str | None:
    """The `slower` of an op whose kernel in the library was compared with nothing yet."""
    return "it was not measured on a GPU yet; name it to use it" if backend == "cuda" else None


def _load(path: Path) -> str | None:
    """Loads the library into this process; the reason if that is not possible."""
    if not path.exists():
        return f"this fastlm was installed without {NAME}; reinstall with FASTLM_CUDA=1 where nvcc is"
    again = "; reinstall fastlm with FASTLM_CUDA=1 where nvcc is"
    if not _is_whole(path):
        return f"{NAME} is damaged (no complete library file){again}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{NAME} cannot be loaded with torch {torch.__version__}: {error}{again}"
    library = ctypes.CDLL(str(path))
    try:
        version = library.fastlm_library_version()
    except AttributeError:
        return f"{NAME} is not a library of fastlm (it tells no version){again}"
    if version != VERSION:
        return f"{NAME} has version {version}, this fastlm calls version {VERSION}{again}"
    runtime, driver = library.fastlm_runtime_version(), library.fastlm_driver_version()
    if torch.cuda.is_available() and driver // 1000 < runtime // 1000:  # every call would fail with error 35
        found = f"takes CUDA {_release(driver)} at most" if driver else "was not found by its CUDA runtime"
        return (
            f"{NAME} was built with CUDA {_release(runtime)} and the GPU's driver {found}; update the driver to one of CUDA "
            f"{runtime // 1000}, or reinstall fastlm with FASTLM_CUDA=1 where nvcc is no newer than the driver"
        )
    return None


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _is_whole(path: Path) -> bool:
    """Whether the file is as long as its ELF header says: to load one that was cut short would end the process."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:4] != b"\x7fELF":
        return False
    sections, size, count = (int.from_bytes(head[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    return path.stat().st_size >= sections + size * count
