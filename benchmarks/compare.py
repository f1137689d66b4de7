"""`python -m benchmarks compare OLD NEW`: what got slower, beyond what two runs of the same code differ by.

OLD and NEW are folders with an ops.jsonl, or such files. Times are compared cell by cell (op, size, dtype, mode, provider). Both
runs timed plain PyTorch in turns with the rest, so what it became slower or faster by is taken for the machine's doing and
divided out; then a cell is an alarm if it is slower by more than --tolerance and than both medians may be off. A cell that
has lost its time, or needs more memory, is an alarm too. Exit status 1 with an alarm, else 0.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import OURS, Row
from benchmarks.lines import Cell, cells, read, size_key, size_text

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


def compare(old: list[Row], new: list[Row], tolerance: float = TOLERANCE) -> Comparison:
    """Compares two runs' rows.

    Args:
        old, new: rows of one run each, as benchmarks.lines.read returns them.
        tolerance: what a time may grow by, as a share of it, whatever the samples say.
    """
    result = Comparison()
    before = {_key(cell): cell for cell in cells(old)}
    found = {_key(cell): cell for cell in cells(new)}
    for key, cell in found.items():
        earlier = before.get(key)
        for name, row in cell.rows.items():
            was = earlier.rows.get(name) if earlier else None
            if was is None:
                result.new += 1
                continue
            result.compared += 1
            _times(result, cell, was, row, earlier, tolerance)
            _memory(result, cell, was, row)
    _lost(result, before, found, new)
    return result


def _key(cell: Cell) -> tuple:
    return cell.op, size_key(cell.size), cell.dtype, cell.mode


def _drift(old: Cell, new: Cell) -> float:
    """What the machine alone made this cell slower by: the change of plain PyTorch, which nobody has touched."""
    a, b = old.plain, new.plain
    return b.ms / a.ms if a and b and a.provider == b.provider else 1.0


def _times(result: Comparison, cell: Cell, was: Row, row: Row, old: Cell, tolerance: float) -> None:
    if not row.provider.startswith(OURS):
        return  # another's times are not ours to repair
    drift, spread = _drift(old, cell), math.hypot(_error(was), _error(row))
    ratio = row.ms / (was.ms * drift)
    text = f"{cell} {row.provider}: {was.ms:.4f} -> {row.ms:.4f} ms, {ratio:.2f}x the time"
    text += f" beside plain PyTorch's {drift:.2f}x" if drift != 1.0 else ""
    if ratio > 1 + max(tolerance, spread):
        result.alarms.append(text)
    elif ratio < 1 / (1 + max(tolerance, spread)):
        result.faster.append(text)


def _error(row: Row) -> float:
    """How far the median may be off, as a share of it: _ERRORS standard errors of a normal sample's median, its quartile
    distance taken as twice that of the lower half, since what interrupts a call only ever makes it longer."""
    return _ERRORS * 0.93 * 2 * (row.ms - row.q1) / row.ms / math.sqrt(min(row.samples, _INDEPENDENT))


def _memory(result: Comparison, cell: Cell, was: Row, row: Row) -> None:
    if was.peak_mb is None or row.peak_mb is None or not row.provider.startswith(OURS):
        return
    if row.peak_mb > _MEMORY * was.peak_mb + _MIB:
        result.alarms.append(f"{cell} {row.provider}: peak memory {was.peak_mb:.1f} -> {row.peak_mb:.1f} MiB")


def _lost(result: Comparison, before: dict, found: dict, new: list[Row]) -> None:
    """Times of ours that NEW has a reason for not having. Cells that NEW did not measure at all are no alarm."""
    reasons = {(r.op, size_key(r.size), r.dtype, r.provider): r for r in new if r.ms is None}
    for key, cell in before.items():
        for name in cell.rows:
            row = reasons.get((*key[:3], name))
            gone = key not in found or name not in found[key].rows
            if row and gone and row.mode in ("all", cell.mode) and name.startswith(OURS):
                result.alarms.append(f"{row.op} {size_text(row.size)} {row.dtype} {cell.mode} {name}: {row.reason}")


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
        runs.append(read(path))
    (was, old), (now, new) = runs
    for name in ("cpu", "gpu", "torch", "triton", "threads"):
        if was.get(name) != now.get(name):
            print(f"the runs differ in {name}: {was.get(name)} and {now.get(name)}")
    result = compare(old, new, options.tolerance)
    print(result)
    return 1 if result.alarms else 0


if __name__ == "__main__":
    raise SystemExit(main())
