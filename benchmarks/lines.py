"""Results as JSON lines: what a run leaves, and how it is read back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.harness import OURS, Row

LOST = 0.97  # below this share of plain PyTorch's speed a cell is called lost: two equal runs may differ by 3 %


class Lines:
    """JSON lines appended as the run goes, so that a run that is stopped leaves what it had. path None writes nothing."""

    def __init__(self, path: Path | None, header: dict) -> None:
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.write([header])

    def add(self, rows: Iterable[Row]) -> None:
        self.write({"kind": "time" if r.ms is not None else "no time", **asdict(r)} for r in rows)

    def write(self, entries: Iterable[dict]) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            for entry in entries:
                file.write(json.dumps({k: v for k, v in entry.items() if v is not None}) + "\n")


def runs_of(path: Path) -> list[tuple[dict, list[Row]]]:
    """Every run in a JSON lines file of op times: its machine, and its rows. Lines that a stopped run left half written are
    skipped.

    Raises:
        FileNotFoundError: there is no such file.
    """
    runs: list[tuple[dict, list[Row]]] = []
    names = {f.name for f in fields(Row)}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry.get("kind") == "machine":
            runs.append((entry, []))
        elif entry.get("kind") in ("time", "no time"):
            if not runs:
                runs.append(({}, []))
            runs[-1][1].append(Row(**{k: v for k, v in entry.items() if k in names}))
    return runs


def read(path: Path) -> tuple[dict, list[Row]]:
    """The rows of a JSON lines file of op times, and the description of the machine of its last run.

    Of a cell that was measured more than once the latest row counts. A cell that has a time now loses the reason it had for
    having none, and the other way round.

    Raises:
        FileNotFoundError: there is no such file.
    """
    runs = runs_of(path)
    rows: dict[tuple, Row] = {}
    for row in (row for _, found in runs for row in found):
        whole = (row.op, row.provider, size_key(row.size), row.dtype)
        if row.ms is None and row.mode == "all":
            rows = {key: old for key, old in rows.items() if key[:4] != whole}
        else:
            rows.pop((*whole, "all"), None)
        rows.pop((*whole, row.mode), None)  # so that the latest comes last
        rows[(*whole, row.mode)] = row
    return (runs[-1][0] if runs else {}), list(rows.values())


def size_key(size: dict) -> str:
    """The size as text that does not depend on the order of its keys."""
    return json.dumps(size, sort_keys=True)


@dataclass(frozen=True)
class Cell:
    """One op at one size and dtype in one mode: the rows that have a time, by provider."""

    op: str
    size: dict
    dtype: str
    mode: str
    rows: dict[str, Row]

    @property
    def plain(self) -> Row | None:
        """The yardstick: the row that the run's speedups are relative to."""
        return next((r for name, r in self.rows.items() if r.speedup == 1.0 and not name.startswith(OURS)), None)

    @property
    def ours(self) -> Row | None:
        """The fastest of our own, if there is any."""
        return _fastest(row for name, row in self.rows.items() if name.startswith(OURS))

    @property
    def rival(self) -> Row | None:
        """The fastest of the others, plain PyTorch among them."""
        return _fastest(row for name, row in self.rows.items() if not name.startswith(OURS))

    def speed(self, other: Row | None) -> float | None:
        """Our speed relative to that of another row of the cell: 2.0 is twice as fast, None is not measured."""
        ours = self.ours
        return other.ms / ours.ms if ours and other else None

    def __str__(self) -> str:
        return f"{self.op} {size_text(self.size)} {self.dtype} {self.mode}"


def cells(rows: Iterable[Row]) -> list[Cell]:
    """The rows with a time, gathered by op, size, dtype and mode, in the order in which they first appear."""
    found: dict[tuple, Cell] = {}
    for row in rows:
        if row.ms is not None:
            key = (row.op, size_key(row.size), row.dtype, row.mode)
            cell = found.setdefault(key, Cell(row.op, row.size, row.dtype, row.mode, {}))
            cell.rows[row.provider] = row
    return list(found.values())


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=lambda row: row.ms, default=None)


def size_text(size: dict) -> str:
    """`M=1024 N=768`."""
    return " ".join(f"{k}={v}" for k, v in size.items())
