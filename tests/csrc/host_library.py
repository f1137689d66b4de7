"""Compiles a kernel file for the host body of csrc/device and runs its launchers on tensors, by ctypes."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.wheels import build_library

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BUILT = ROOT / "build" / "csrc_host"
TORCH = torch.__path__[0]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # fastlm_dtype
# -O1: these kernels run for milliseconds and compile for seconds. Fibers change stacks by longjmp, which _FORTIFY_SOURCE forbids.
# no-gnu-unique: or libraries loaded side by side would share one machine.
FLAGS = [
    "-x", "c++", "-std=c++20", "-O1", "-fPIC", "-DFASTLM_HOST", "-U_FORTIFY_SOURCE", "-fno-gnu-unique",
    "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized",
]  # fmt: skip
# (name, order of threads and blocks, blocks live at once)
ORDERS = (("forward", 0, 2), ("backward", 1, 1), ("random", 2, 3))
# Those of kernels with asynchronous work: copies at once (early) or only when nothing else can go on (late, + 4), and the same of
# matrix products (+ 8).
ASYNC_ORDERS = tuple(
    (
        f"{name}, copies {copies}, products {products}",
        number + 4 * (copies == "late") + 8 * (products == "late"),
        resident,
    )
    for name, number, resident in ORDERS
    for copies in ("early", "late")
    for products in ("early", "late")
)
COPY_ORDERS = tuple(o for o in ASYNC_ORDERS if o[0].endswith("products early"))  # for kernels without matrix products

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


class HostError(Exception):
    """A launcher's error code, with the report of the host body if it made one."""


class In:
    """A tensor that a kernel reads."""

    mode = 0

    def __init__(self, tensor: Tensor | None):
        self.tensor = tensor


class Both(In):
    """One that holds values and that it reads and writes."""

    mode = 1


class Out(In):
    """One that it writes; a read of what it has not written is an error."""

    mode = 2


def _span(t: Tensor) -> int:
    """Bytes from the first to the last element."""
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))) * t.element_size() if t.numel() else 0


class HostLibrary:
    """A compiled file. `suffix` is appended to the names of its functions."""

    _last: HostLibrary | None = None  # that ran

    def __init__(self, path: Path, suffix: str = ""):
        self._path, self._suffix = path, suffix
        self._dll = ctypes.CDLL(str(path))
        self._dll.fastlm_host_report.restype = ctypes.c_char_p
        self._dll.fastlm_host_unwritten.restype = ctypes.c_int64
        self._dll.fastlm_host_unwritten.argtypes = [ctypes.c_void_p]
        self._dll.fastlm_host_reset.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
        self._dll.fastlm_host_buffer.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int]

    def with_suffix(self, suffix: str) -> HostLibrary:
        return HostLibrary(self._path, suffix)

    def run(self, function: str, *values, order: str = "forward", buffers: dict | None = None) -> None:
        """Calls `int function(values..., void* stream)`, every In, Out and Both registered as a buffer.

        values: In, Out, Both or None for pointers, int for int64_t, float for float, a dict of such for a pointer to a struct of
        these members in this order (tuples become nested structs of int64_t; ctypes values stay as they are).
        buffers: others, by name, that a kernel reaches through pointers in memory.
        Raises HostError with the report; also if bytes of a dense output were not written.
        """
        # Stacks are kept for the next launch; those of every library in one process would be more mappings than Linux allows.
        if HostLibrary._last is not None and HostLibrary._last._path != self._path:
            HostLibrary._last._dll.fastlm_host_release()
        HostLibrary._last = self
        (_, number, resident) = next(o for o in ORDERS + ASYNC_ORDERS if o[0] == order)
        self._dll.fastlm_host_reset(number, 1, resident)
        for name, buffer in (buffers or {}).items():
            self._pointer(name, buffer)
        outputs = [v for v in _flat(values) if isinstance(v, Out) and v.tensor is not None and v.tensor.numel()]
        arguments = [self._argument(f"argument {i}", v) for i, v in enumerate(values)]
        code = getattr(self._dll, function + self._suffix)(*arguments, ctypes.c_void_p())
        report = self._dll.fastlm_host_report().decode()
        if code or report:
            raise HostError(f"{function} returned {code}: {report or 'no report'}")
        for out in outputs:
            missing = self._dll.fastlm_host_unwritten(out.tensor.data_ptr())
            if out.tensor.is_contiguous() and missing:
                raise HostError(f"{function} left {missing} bytes of an output unwritten")

    @contextmanager
    def without_clusters(self) -> Iterator[None]:
        """Launchers find a GPU that has no clusters (most_cluster_blocks() is 1), until the block ends."""
        self._dll.fastlm_host_clusters(1)
        try:
            yield
        finally:
            self._dll.fastlm_host_clusters(8)

    def _pointer(self, name: str, value: In):
        if value.tensor is None:
            return ctypes.c_void_p()
        address = value.tensor.data_ptr()
        self._dll.fastlm_host_buffer(address, _span(value.tensor), name.encode(), value.mode)
        return ctypes.c_void_p(address)

    def _argument(self, name: str, value):
        if value is None:
            return ctypes.c_void_p()
        if isinstance(value, In):
            return self._pointer(name, value)
        if isinstance(value, dict):
            members = {n: self._argument(n, v) for n, v in value.items()}
            struct = type("Struct", (ctypes.Structure,), {"_fields_": [(n, type(m)) for n, m in members.items()]})
            return ctypes.byref(struct(*members.values()))
        if isinstance(value, tuple):
            return (ctypes.c_int64 * len(value))(*value)
        if isinstance(value, int):
            return ctypes.c_int64(value)
        return ctypes.c_float(value) if isinstance(value, float) else value


def _flat(values) -> list:
    return [v for value in values for v in (value.values() if isinstance(value, dict) else [value])]


@functools.cache
def _compiler() -> bytes:
    return subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout


@functools.cache
def library(source: str, *flags: str) -> HostLibrary:
    """The library of one kernel file (a path from the repository's root), compiled unless that was done before: the file's
    name holds a hash of the sources, the flags and the compiler."""
    return HostLibrary(link([ROOT / source], *flags))


def link(sources: Sequence[Path], *flags: str) -> Path:
    """The path of a library made from sources; each is compiled unless an object of the same text, flags and compiler stands."""
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _object(source, flags), sources))
    key = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    built = BUILT / f"{sources[0].stem}-{len(sources)}-{key}.so"
    return _made(built, ["g++", "-shared", *map(str, objects), f"-L{TORCH}/lib", "-Wl,--as-needed", "-ltorch_cpu"])


def _object(source: Path, flags: tuple[str, ...]) -> Path:
    if source.parent.name == "bindings":
        flags += ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", f"{TORCH}/include")
    key = hashlib.sha256(_compiler() + repr((FLAGS, flags, torch.__version__)).encode())
    for part in build_library.included(source):
        key.update(part.read_bytes())
    built = BUILT / f"{source.stem}-{key.hexdigest()[:16]}.o"
    head = [] if flags or built.exists() else ["-include", str(_head())]
    return _made(built, ["g++", *FLAGS, *flags, *head, f"-I{CSRC}", "-c", str(source)])


def _head() -> Path:
    """A header that includes device/device.h, precompiled: read anew it costs each kernel file 0.6 to 1.3 s of its 3 to 7."""
    device = CSRC / "device" / "device.h"
    key = hashlib.sha256(_compiler() + repr((FLAGS, str(device))).encode())
    for part in build_library.included(device):
        key.update(part.read_bytes())
    head = BUILT / f"head-{key.hexdigest()[:16]}.h"
    if not head.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        head.write_text(f'#include "{device}"\n', encoding="utf-8")
    _made(head.with_suffix(".h.gch"), ["g++", *FLAGS, f"-I{CSRC}", "-x", "c++-header", "-c", str(head)])
    return head


def _made(built: Path, command: list[str]) -> Path:
    """The file, after `command -o file` unless it stands already. Of those that want the same one makes it, the others wait."""
    if built.exists():
        return built
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / f"{built.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            partly = BUILT / f"partly-{built.name}"
            done = subprocess.run([*command, "-o", str(partly)], capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"
            os.replace(partly, built)  # at once: who does not wait sees it whole
    return built


def planted(
    source: str,
    bugs: dict[str, tuple[str, str]],
    folder: Path,
    headers: Sequence[str] = (),
    without: str = r"case FASTLM_B?FLOAT16: .*",
) -> dict[str, HostLibrary]:
    """name -> the library of a kernel file with that mistake: `old`, which stands in it once, is `new`.

    One file in `folder` holds all, each in a namespace, so that headers are compiled once; and each for fp32 alone, as far as the
    launcher chooses by `case FASTLM_...`. headers: those of csrc in which mistakes may be too, each before what it includes.
    without: which lines are left out, that fewer kernels are compiled.
    """
    text = (ROOT / source).read_text(encoding="utf-8")
    for name in headers:
        here = (CSRC / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        text = here + text.replace(f'#include "{name}"\n', "")
    text = re.sub(without, "", text)
    parts = re.findall(r"#include .*\n", text)
    for i, (old, new) in enumerate(bugs.values()):
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {source}"
        changed = re.sub(r'(extern "C" int \w+)\(', rf"\1_{i}(", text.replace(old, new))
        parts.append(f"namespace bug_{i} {{\n{changed}\n}}\n")
    path = folder / Path(source).name
    path.write_text("".join(parts), encoding="utf-8")
    return {name: library(str(path)).with_suffix(f"_{i}") for i, name in enumerate(bugs)}


def same_in_all_orders(
    run: Callable[[str], tuple[Tensor, ...]], orders: Sequence[tuple] = ORDERS
) -> tuple[Tensor, ...]:
    """What run(order) returns, after checking that it is the same, bit for bit, in every order of threads and blocks; with
    orders=ASYNC_ORDERS (or COPY_ORDERS) also of asynchronous work."""
    first = None
    for name, _, _ in orders:
        found = run(name)
        if first is None:
            first = found
        for a, b in zip(first, found):
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), (
                f"order {name} gives other bits than {orders[0][0]}"
            )
    return first


def outputs(lib, function, *values, shape, dtype=torch.float32):
    """What the case writes to its output, the same in all orders."""

    def run(order):
        out = torch.full(shape, -99, dtype=dtype)
        lib.run(function, *[Out(out) if v is Out else v for v in values], order=order)
        return (out,)

    return same_in_all_orders(run)[0]
