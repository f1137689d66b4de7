"""Planted bugs: a wrong kernel must turn a check red."""

from __future__ import annotations

import importlib
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlm.ops._op import REGISTRY


@contextmanager
def planted_bug(op: str, old: str, new: str, *, backend: str = "triton", file: str | None = None) -> Iterator[None]:
    """Runs the block with the op's launchers taken from a copy of the kernel folder, in whose `file` (default: that of the
    forward launcher) `old` became `new`.

    For tests that show that a wrong kernel turns a check red. Raises ValueError if `old` is not in the file.
    """
    import fastlm.kernels

    target = REGISTRY[op]
    launchers = [launcher.split(":") if isinstance(launcher, str) else None for launcher in target.kernels[backend]]
    stem = file or launchers[0][0]
    folder = Path(fastlm.kernels.__path__[0])
    source = (folder / f"{stem}.py").read_text(encoding="utf-8")
    if old not in source:
        raise ValueError(f"planted_bug: {old!r} is not in kernels/{stem}.py")
    with tempfile.TemporaryDirectory() as copies:
        for path in folder.glob("*.py"):  # files: triton reads the source of its kernels
            (Path(copies) / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        (Path(copies) / f"{stem}.py").write_text(source.replace(old, new), encoding="utf-8")
        package = types.ModuleType("_planted_kernels")
        package.__path__ = [copies]
        sys.modules[package.__name__] = package
        before = dict(target._loaded)
        try:
            for slot, launcher in enumerate(launchers):
                if launcher:
                    module = importlib.import_module(f"{package.__name__}.{launcher[0]}")
                    target._loaded[backend, slot] = getattr(module, launcher[1])
            yield
        finally:
            target._loaded.clear()
            target._loaded.update(before)
            for name in [n for n in sys.modules if n.split(".")[0] == package.__name__]:
                del sys.modules[name]
