"""What a conformance run has found so far, kept in a file, and the parent that goes on after a kernel has ended its process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

BROKEN = 3  # exit status of a process whose GPU can do no more; the next case needs another one
PATIENCE = 20.0  # seconds for a kernel of microseconds
RESTARTS = 8  # each costs some ten seconds


class DeviceError(Exception):
    """A launch was refused; the GPU can go on."""


class DeviceBroken(DeviceError):
    """A kernel failed or hangs: nothing more runs in this process."""


def wait_for(query: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Returns when `query` is true. Raises DeviceBroken if it is not within `seconds`."""
    end = time.monotonic() + seconds
    while not query():
        if time.monotonic() > end:
            raise DeviceBroken(f"HUNG: the kernel did not end within {seconds:g} s")
        time.sleep(0.0002)


@dataclass
class Tally:
    """What was found so far. `path`: the file that keeps it for the process after this one."""

    next: int = 0  # case
    bad: list[str] = field(default_factory=list)
    values: int = 0
    start: float = field(default_factory=time.time)
    path: Path | None = None

    @classmethod
    def read(cls, path: Path) -> Tally:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() and path.stat().st_size else {}
        return cls(**kept, path=path)

    def begin(self, name: str) -> None:
        """Counts the case as bad until it has ended: it may end the process."""
        self.next += 1
        self.bad.append(name)
        self.write()

    def good(self) -> None:
        """The case begun last was right."""
        self.bad.pop()
        self.write()

    def write(self) -> None:
        if self.path is not None:
            entries = asdict(self)
            del entries["path"]
            self.path.write_text(json.dumps(entries), encoding="utf-8")

    def verdict(self, cases: int) -> str:
        """The last line of a run."""
        bad, missing = len(self.bad), cases - self.next
        words = f"{bad} of {cases} cases differ or failed" if bad else f"all {cases} cases agree"
        words += f", {missing} were not run" if missing else ""
        return f"conformance: {words}; {self.values} values, {time.time() - self.start:.1f} s"


def run_apart(arguments: Sequence[str], cases: int, path: Path) -> int:
    """`python -m tests.csrc.conformance` in a process, and from the next case on in another as often as a case ends one."""
    command = [sys.executable, "-m", "tests.csrc.conformance", *arguments, "--tally", str(path)]
    for _ in range(RESTARTS + 1):
        before = Tally.read(path).next
        try:
            status = subprocess.run(command).returncode
        except KeyboardInterrupt:  # out of time
            print(f"\n{Tally.read(path).verdict(cases)}", flush=True)
            return 1
        tally = Tally.read(path)
        if status in (0, 1, 2) and (tally.next == cases or status == 2):
            return status
        if status != BROKEN:
            print(f"FAILED  its process ended with exit status {status}", flush=True)
        if tally.next == before:  # it did not come as far as a case
            return 1
        if tally.next == cases:
            break
    print(tally.verdict(cases), flush=True)
    return 1
