"""Runs every instruction that the host body models on a GPU too, on random data, and compares what they give.

    python -m tests.csrc.conformance [--only NAME]... [--repeats N] [--seed N] [--dry]

One line an instruction: how many values were compared, how many differ, the worst error of approximate ones. Bits must be equal
(of NaN in fp32 only that it is one), errors within what csrc/device/cuda.h states. Exit status 0 if all agree, 1 if any differ or
the GPU failed, 2 if nothing could be run: no GPU, no compiler. --dry takes the host body in another order for the GPU.

A launch that is refused is a failure of its case. After a kernel that fails, or has not ended after 20 s, another process goes on
with the next case (conformance_run.py); --stand-in rehearses that.

The cases: tests/csrc/conformance_cases.py. Libraries are kept in build/conformance: a folder built elsewhere serves a machine
without nvcc and g++.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import hashlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.csrc.conformance_cases import CASES, Case
from tests.csrc.conformance_run import BROKEN, DeviceBroken, DeviceError, Tally, run_apart, wait_for
from tests.csrc.host_library import CSRC, FLAGS, ROOT, Both, HostError, HostLibrary, In, Out, link
from tests.wheels import build_library

BUILT = ROOT / "build" / "conformance"
HERE = Path(__file__).parent
DRY = "the host body, threads in random order, asynchronous work late"
_DRY_ORDER = "random, copies late, products late"


class CannotRun(Exception):
    """Something a comparison needs is not on this machine."""


@dataclasses.dataclass
class Found:
    """What a comparison counted."""

    values: int = 0
    wrong: int = 0
    worst: float = 0.0  # relative, of approximate values
    example: str = ""


def built(source: Path, architecture: str = "") -> Path:
    """The library of a file for the host body, or for a GPU (sm_90a). Compiled unless one of the same text and flags stands."""
    if architecture:
        command = ["-std=c++20", "-O3", f"-arch={architecture}", "-cudart", "static", "-Xcompiler", "-fPIC"]
    else:
        command = FLAGS
    command = [*command, f"-I{CSRC}", "-shared", str(source)]
    key = hashlib.sha256(repr([c.replace(str(ROOT), "") for c in command]).encode())
    for part in build_library.included(source):
        key.update(part.read_bytes())
    path = BUILT / f"{source.stem}-{architecture or 'host'}-{key.hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partly = path.with_suffix(".partly.so")
    try:
        if architecture:
            command = [build_library.find_nvcc(), *command, "-o", str(partly)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
        else:
            shutil.copyfile(link([source]), partly)  # that of the tests
    except (build_library.CannotBuild, OSError) as error:
        raise CannotRun(f"{path.name} is not built, and cannot be here: {error}") from None
    except AssertionError as error:
        raise CannotRun(f"{source.name} does not compile: {error}") from None
    return partly.replace(path)


def _results(values: Sequence) -> list[Tensor]:
    return [v.tensor for v in values if isinstance(v, Both | Out)]


def _argument(value: In | int | tuple[int, ...]) -> Any:
    if isinstance(value, In):
        return ctypes.c_void_p(value.tensor.data_ptr())
    return (ctypes.c_int64 * len(value))(*value) if isinstance(value, tuple) else ctypes.c_int64(value)


class Side:
    """One of the two that run launchers. `major` is its compute capability's, None for one that has every instruction."""

    major: int | None = None

    def __init__(self) -> None:
        self._opened: dict[str, Any] = {}

    def has(self, case: Case) -> bool:
        """Whether it has the instruction."""
        return self.major is None or not case.majors or self.major in case.majors

    def library(self, source: str) -> Any:
        """The library of a file, compiled when it is first asked for."""
        if source not in self._opened:
            self._opened[source] = self.open(HERE / source)
        return self._opened[source]

    def open(self, source: Path) -> Any:
        raise NotImplementedError

    def run(self, case: Case, values: Sequence) -> list[Tensor]:
        """What the Boths and Outs among the values hold after the launch; the values stay as they are."""
        raise NotImplementedError


class OnHost(Side):
    """The host body."""

    def __init__(self, order: str = "forward") -> None:
        super().__init__()
        self._order = order

    def open(self, source: Path) -> HostLibrary:
        return HostLibrary(built(source))

    def run(self, case: Case, values: Sequence) -> list[Tensor]:
        values = [type(v)(v.tensor.clone()) if isinstance(v, In) else v for v in values]
        self.library(case.source).run(case.launcher, *values, order=self._order)
        return _results(values)


class OnDevice(Side):
    """The GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.major, minor = torch.cuda.get_device_capability()
        self.architecture = f"sm_{self.major}{minor}" + "a" * (self.major >= 9)

    def open(self, source: Path) -> ctypes.CDLL:
        return ctypes.CDLL(str(built(source, self.architecture)))

    def run(self, case: Case, values: Sequence) -> list[Tensor]:
        try:
            values = [type(v)(v.tensor.cuda()) if isinstance(v, In) else v for v in values]
            arguments = [_argument(v) for v in values]
            stream = torch.cuda.current_stream()
            code = getattr(self.library(case.source), case.launcher)(*arguments, ctypes.c_void_p(stream.cuda_stream))
            wait_for(stream.record_event().query)
            results = [t.cpu() for t in _results(values)]
        except RuntimeError as error:  # a later call tells what the kernel did
            raise DeviceBroken(f"the kernel failed: {str(error).splitlines()[0]}") from None
        if code:
            raise DeviceError(f"the launch was refused with CUDA error {code}")
        return results


class StandIn(OnHost):
    """The host body as a GPU that refuses, fails or hangs at one case."""

    def __init__(self, name: str, how: str) -> None:
        super().__init__(_DRY_ORDER)
        self._name, self._how, self._broken = name, how, False

    def run(self, case: Case, values: Sequence) -> list[Tensor]:
        if self._broken:
            raise DeviceBroken("the kernel failed: it was broken before")
        if self._name in case.name:
            self._broken = self._how != "refuses"
            if self._how == "dies":
                os.abort()
            if self._how == "hangs":
                wait_for(lambda: False, 0.1)
            raise DeviceBroken("the kernel failed") if self._broken else DeviceError("the launch was refused")
        return super().run(case, values)


def compare(case: Case, device: Side, host: Side, seed: int, repeats: int) -> Found:
    """Runs a case on both with the same random data, `repeats` times."""
    total = Found()
    for i in range(repeats):
        values = case.make(torch.Generator().manual_seed(seed + i))
        pairs = zip(*(case.canonical(*side.run(case, values)) for side in (device, host)))
        for k, (found, want) in enumerate(pairs):
            wrong, worst = case.compare(found, want)
            total.values += wrong.numel()
            total.worst = max(total.worst, worst)
            if wrong.any() and not total.wrong:
                at = wrong.nonzero()[0].tolist()
                total.example = (
                    f"seed {seed + i}, result {k} at {at}: {found[tuple(at)]} where the host body has {want[tuple(at)]}"
                )
            total.wrong += int(wrong.sum())
    return total


def run(device: Side, host: Side, cases: Sequence[Case], seed: int, repeats: int, tally: Tally | None = None) -> int:
    """Prints a line for each case from tally.next on; 1 if any differs or fails, else 0; BROKEN if the GPU can do no more before
    all cases have run."""
    tally = tally or Tally()
    todo = cases[tally.next :]
    with ThreadPoolExecutor() as pool:  # compiles
        for side in (device, host):
            list(pool.map(side.library, {case.source for case in todo if device.has(case)}))
    for case in todo:
        print(f"{case.name:<44}", end=" ", flush=True)  # before it runs: the last line names what ended the process
        tally.begin(case.name)
        if not device.has(case):
            print(f"not run: for compute capability {', '.join(f'{m}.x' for m in case.majors)}")
            tally.good()
            continue
        try:
            found = compare(case, device, host, seed, repeats)
        except (HostError, DeviceError) as error:
            print(f"FAILED  {error}", flush=True)
            if isinstance(error, DeviceBroken) and tally.next < len(cases):
                return BROKEN
            continue
        tally.values += found.values
        worst = f"  worst error 2^{math.log2(found.worst):.1f}" if found.worst else ""
        print(
            f"{found.values:>9} values  {found.wrong:>6} differ{worst}" + (f"  {found.example}" if found.wrong else "")
        )
        if not found.wrong:
            tally.good()
    print(tally.verdict(len(cases)), flush=True)
    return 1 if tally.bad else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", action="append", help="cases whose name contains this; may be given again")
    parser.add_argument("--repeats", type=int, default=None, help="how often each case is run on other data (5; dry 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("--dry", action="store_true", help=f"for the GPU take {DRY}")
    parser.add_argument(
        "--stand-in", nargs=2, metavar=("NAME", "HOW"), help="a GPU that refuses, fails, hangs or dies there"
    )
    parser.add_argument("--tally", type=Path, help="what was found so far; with it the run stays in this process")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    cases = [c for c in CASES if not options.only or any(word in c.name for word in options.only)]
    if not cases:
        print(f"conformance: no case is named like {', '.join(options.only)}", file=sys.stderr)
        return 2
    if not (options.dry or options.stand_in or torch.cuda.is_available()):
        print(
            "conformance: torch sees no CUDA GPU; run it where there is one, or --dry for a rehearsal", file=sys.stderr
        )
        return 2
    if options.tally is None:
        with tempfile.TemporaryDirectory() as folder:
            return run_apart(arguments, len(cases), Path(folder, "tally.json"))
    tally = Tally.read(options.tally)
    try:
        if options.stand_in:
            device, name = StandIn(*options.stand_in), "a stand-in"
        elif options.dry:
            device, name = OnHost(_DRY_ORDER), DRY
        else:
            device = OnDevice()
            name = f"{torch.cuda.get_device_name()}, {device.architecture}"
        if tally.next == 0:
            print(f"conformance of {name} with the host body", flush=True)
        repeats = options.repeats if options.repeats is not None else 1 if options.dry else 5
        return run(device, OnHost(), cases, options.seed, repeats, tally)
    except CannotRun as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    result = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(result)  # a GPU that hangs is not waited for
