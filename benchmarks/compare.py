"""`python -m benchmarks compare OLD NEW`: what got slower, beyond what two runs of the same code differ by.

OLD and NEW are folders with an ops.jsonl, or such files, of one run each or more (`run --out` appends). Times are compared cell
by cell (op, size, dtype, mode, provider). Each run timed plain PyTorch in turns with the rest: a time counts as a multiple of
plain PyTorch's in the same run, so that a slower machine is no alarm. A cell is one if NEW's best run is slower than OLD's worst
by more than --tolerance, and by more than the medians may be off. On a busy machine make two runs of each: what equal runs
differ by is then known. A cell that has lost its time, or needs more memory, is an alarm too. Exit status 1 with an alarm.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import OURS, Row
from benchmarks.lines import Cell, cells, runs_of, size_key

TOLERANCE = 0.05
_MEMORY = 1.05
_ERRORS = 3.0  # standard errors
_INDEPENDENT = 30  # samples of one run are not independent: more than this many make its median no surer
_MIB = 1.0  # less than the allocator's rounding


@dataclass
class Comparison:
    """What two runs say about each other: lines of text by kind, and how many cells both have."""

    alarms: list[str] = field(default_factory=list)
    faster: list[str] = field(default_factory=list)
    compared: int = 0
    new: int = 0

    def __str__(self) -> str:
        lines = [f"{self.compared} times compared, {self.new} are new"]
        lines += [f"slower: {text}" for text in self.alarms] + [f"faster: {text}" for text in self.faster]
        return "\n".join(lines if self.alarms else [*lines, "no alarm"])


def compare(old: list[list[Row]], new: list[list[Row]], tolerance: float = TOLERANCE) -> Comparison:
    """Compares two sets of runs.

    Args:
        old, new: the rows of each run, as benchmarks.lines.runs_of returns them.
        tolerance: what a time may grow by, as a share of it, whatever the samples say.
    """
    result = Comparison()
    before, found = _by_provider(old), _by_provider(new)
    for key, times in found.items():
        if key not in before:
            result.new += 1
            continue
        result.compared += 1
        if key[-1].startswith(OURS):  # another's times are not ours to repair
            _times(result, before[key], times, tolerance)
            _memory(result, before[key], times)
    _lost(result, before, found, new)
    return result


@dataclass(frozen=True)
class _Time:
    """A provider's time in one run."""

    cell: Cell
    row: Row

    @property
    def multiple(self) -> float:
        """Of plain PyTorch's time in the same run; the milliseconds themselves where that was not measured."""
        return self.row.ms / self.cell.plain.ms if self.cell.plain else self.row.ms

    @property
    def error(self) -> float:
        """How far `multiple` may be off, as a share of it."""
        return math.hypot(_error(self.row), _error(self.cell.plain) if self.cell.plain else 0.0)


def _by_provider(runs: list[list[Row]]) -> dict[tuple, list[_Time]]:
    """(op, size, dtype, mode, provider) -> its time in every run that has one."""
    found: dict[tuple, list[_Time]] = {}
    for rows in runs:
        for cell in cells(rows):
            for name, row in cell.rows.items():
                found.setdefault((*_key(cell), name), []).append(_Time(cell, row))
    return found


def _key(cell: Cell) -> tuple:
    return cell.op, size_key(cell.size), cell.dtype, cell.mode


def _times(result: Comparison, old: list[_Time], new: list[_Time], tolerance: float) -> None:
    def gap(worst: _Time, best: _Time) -> float:
        """By how much more than it may, `best` is above `worst`; below 0 for no alarm."""
        return best.multiple / worst.multiple - 1 - max(tolerance, math.hypot(worst.error, best.error))

    def text(a: _Time, b: _Time) -> str:
        drift = (
            f" beside plain PyTorch's {b.cell.plain.ms / a.cell.plain.ms:.2f}x" if a.cell.plain and b.cell.plain else ""
        )
        change = f"{a.row.ms:.4f} -> {b.row.ms:.4f} ms, {b.multiple / a.multiple:.2f}x the time{drift}"
        return f"{b.cell} {b.row.provider}: {change}"

    def by_multiple(times: list[_Time]) -> list[_Time]:
        return sorted(times, key=lambda t: t.multiple)

    old, new = by_multiple(old), by_multiple(new)
    if gap(old[-1], new[0]) > 0:
        result.alarms.append(text(old[-1], new[0]))
    elif gap(new[-1], old[0]) > 0:
        result.faster.append(text(old[0], new[-1]))


def _error(row: Row) -> float:
    """How far the median may be off, as a share of it: _ERRORS standard errors of a normal sample's median, its quartile
    distance taken as twice that of the lower half, since what interrupts a call only ever makes it longer."""
    return _ERRORS * 0.93 * 2 * (row.ms - row.q1) / row.ms / math.sqrt(min(row.samples, _INDEPENDENT))


def _memory(result: Comparison, old: list[_Time], new: list[_Time]) -> None:
    was, now = (min((t.row.peak_mb for t in times if t.row.peak_mb is not None), default=None) for times in (old, new))
    if was is not None and now is not None and now > _MEMORY * was + _MIB:
        result.alarms.append(f"{new[0].cell} {new[0].row.provider}: peak memory {was:.1f} -> {now:.1f} MiB")


def _lost(result: Comparison, before: dict, found: dict, new: list[list[Row]]) -> None:
    """Times of ours that NEW has a reason for not having. Cells that NEW did not measure at all are no alarm."""
    reasons = {(r.op, size_key(r.size), r.dtype, r.provider): r for rows in new for r in rows if r.ms is None}
    for key, times in before.items():
        row = reasons.get((*key[:3], key[4]))
        if row and key not in found and row.mode in ("all", key[3]) and key[4].startswith(OURS):
            result.alarms.append(f"{times[0].cell} {key[4]}: {row.reason}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__.split("\n\n")[1])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"default {TOLERANCE}")
    options = parser.parse_args(argv)
    runs = []
    for path in (options.old, options.new):
        path = path / "ops.jsonl" if path.is_dir() else path
        if not path.is_file():
            print(f"compare: no {path}; give a folder that `python -m benchmarks run --out` wrote", file=sys.stderr)
            return 2
        runs.append([run for run in runs_of(path) if run[1]])
    old, new = runs
    for name in ("cpu", "gpu", "torch", "triton", "threads"):
        was, now = ({machine.get(name) for machine, _ in several} for several in runs)
        if was != now:
            print(f"the runs differ in {name}: {was} and {now}")
    result = compare([rows for _, rows in old], [rows for _, rows in new], options.tolerance)
    print(result)
    return 1 if result.alarms else 0


if __name__ == "__main__":
    raise SystemExit(main())
