"""`fastlm doctor`: what is installed, which devices there are, and which backend each op can use here, with reasons."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from fastlm._version import __version__

_OPTIONAL = ("triton", "numpy", "safetensors", "tokenizers", "transformers", "tensorboard")


def report() -> dict[str, Any]:
    """Everything `fastlm doctor` prints, as plain data: versions, devices, ops (backend -> "ok" or the reason),
    host, library (of the CUDA kernels)."""
    from fastlm import ops  # noqa: F401  registers every op
    from fastlm.ops._op import BACKENDS, REGISTRY, missing_backends

    missing = missing_backends()
    table = {}
    for name, op in sorted(REGISTRY.items()):
        table[name] = {b: missing.get(b, "ok") if b in op.backends else "not written for this op" for b in BACKENDS}
    return {
        "versions": _versions(),
        "devices": _devices(),
        "host": _host(),
        "library": _library(),
        "ops": table,
    }


def _versions() -> dict[str, str]:
    found = {"fastlm": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in _OPTIONAL:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.version.cuda:
        found["cuda (torch's)"] = torch.version.cuda
    return found


def _devices() -> list[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = [
        f"cpu: {cores} cores, {torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}"
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            f"cuda:{i}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs"
        )
    return devices


def _host() -> str:
    if importlib.util.find_spec("fastlm._host") is not None:
        return "compiled (fastlm._host)"
    return f"numpy twin: no compiled fastlm._host for Python {platform.python_version()}; reinstall with a C++ compiler"


def _library() -> str:
    from fastlm.ops import _cuda

    return _cuda.unavailable() or f"{_cuda.PATH}, version {_cuda.VERSION}"


def show() -> None:
    """Prints the report as tables."""
    from rich.console import Console
    from rich.table import Table

    console, data = Console(), report()
    facts = Table.grid(padding=(0, 2))
    for name, version in data["versions"].items():
        facts.add_row(f"[bold]{name}[/]", version)
    for device in data["devices"]:
        facts.add_row("[bold]device[/]", device)
    facts.add_row("[bold]host loops[/]", data["host"])
    facts.add_row("[bold]CUDA kernels[/]", data["library"])
    console.print(facts, highlight=False)
    backends = list(next(iter(data["ops"].values())))
    console.print("\nBackends of each op, in the order in which `auto` prefers them")
    table = Table("op", *backends)
    reasons: dict[str, str] = {}
    for name, row in data["ops"].items():
        cells = []
        for backend, state in row.items():
            if state == "ok":
                cells.append("[green]yes[/]")
            elif state == "not written for this op":
                cells.append("[dim]-[/]")
            else:
                reasons[backend] = state
                cells.append("[yellow]no[/]")
        table.add_row(name, *cells)
    console.print(table)
    for backend, reason in reasons.items():
        console.print(f"[yellow]{backend}[/]: {reason}", highlight=False)
    console.print(
        "[dim]- : not written for this op. On CPU tensors `auto` takes torch or the reference; anywhere it passes over what "
        "was not measured to be faster (ops.explain says so).[/]"
    )
