"""The corpus every machine has: the source text of the running Python's standard library."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import NamedTuple

from fastlm.errors import UserError

# Tests, vendored packages and machine-made tables: long, and unlike the code a reader would call Python.
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "encodings",
    "pydoc_data",
    "turtledemo",
    "lib-dynload",
    "__phello__",
    "__pycache__",
}


class StandardLibrary(NamedTuple):
    """Paths of the .py files, sorted: `train`, and the held-out `validation` files."""

    train: list[str]
    validation: list[str]


def standard_library_sources(held_out: float = 0.05) -> StandardLibrary:
    """The running Python's standard library as a corpus, about 9 MB, split by file.

    A file is held out when a hash of its path inside the library says so, so the split is the same on every machine with
    the same Python, and nearly the same for other versions.

    Args:
        held_out: the share of the files that is held out.

    Raises:
        UserError: this Python comes without the source of its standard library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-"))
        here = Path(folder).relative_to(root)
        names += [
            (here / name).as_posix() for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    split = StandardLibrary([], [])
    for name in sorted(names):
        draw = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") / 2**64
        (split.validation if draw < held_out else split.train).append(str(root / name))
    if not split.train or not split.validation:
        raise UserError(
            f"the source of Python's standard library is not in {root}; name text files of your own as sources"
        )
    return split
