"""`python -m benchmarks report DIR`: the results of a folder as a page, README.md there, with pictures.

Reads every *.jsonl of DIR that holds times of ops. The page has one line per op, every cell that is lost to plain PyTorch, and
what was not measured, each table with the date and commit it was measured at. --into FILE writes the table and one picture
between two marker lines of FILE as well, `<!-- benchmarks -->` above and below.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from statistics import median

from benchmarks.harness import Row
from benchmarks.lines import LOST, Cell, cells, read, size_text
from benchmarks.plots import draw

MARK = "<!-- benchmarks -->"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__.split("\n\n")[1])
    parser.add_argument("folder", type=Path, help="such as benchmarks/results/cpu-2core")
    parser.add_argument("--into", type=Path, action="append", default=[], help="a file with the marker lines")
    options = parser.parse_args(argv)
    runs = load(options.folder)
    if not runs:
        print(
            f"report: no times in {options.folder}/*.jsonl; `python -m benchmarks run --out` makes some",
            file=sys.stderr,
        )
        return 2
    pictures = draw(runs, options.folder)
    (options.folder / "README.md").write_text(page(runs, pictures), encoding="utf-8")
    print(f"wrote {options.folder / 'README.md'} and {', '.join(p.name for p in pictures)}")
    for file in options.into:
        insert(file, runs, pictures[0])
        print(f"wrote the table into {file}")
    return 0


def load(folder: Path) -> dict[str, tuple[dict, list[Row]]]:
    """File name -> (machine, rows), for the files of a folder that hold times of ops."""
    found = {path.name: read(path) for path in sorted(folder.glob("*.jsonl"))}
    return {name: run for name, run in found.items() if any(row.ms is not None for row in run[1])}


def page(runs: dict[str, tuple[dict, list[Row]]], pictures: list[Path]) -> str:
    """The whole page in Markdown."""
    parts = ["# Measured here", "Written by `python -m benchmarks report`; do not edit."]
    for name, (machine, rows) in runs.items():
        found = cells(rows)
        parts += [f"## {name}", stamp(machine), summary(found), _lost(found), _untimed(rows)]
    parts += ["## Pictures", *(f"![{p.stem.replace('-', ' ')}]({p.name})" for p in pictures)]
    return "\n\n".join(part for part in parts if part) + "\n"


def stamp(machine: dict) -> str:
    """Where and when a table was measured, on which code."""
    where = (
        machine.get("gpu") or f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('threads')} thread(s)"
    )
    versions = f"torch {machine.get('torch')}, triton {machine.get('triton')}"
    return f"{where}; {versions}; {machine.get('date', '?')[:10]}, commit {machine.get('commit')}."


def summary(found: list[Cell]) -> str:
    """One line per op: our speed relative to plain PyTorch's over its cells, the slowest, the fastest, and how many are lost."""
    lines = [
        "| op | cells | median | slowest cell | fastest cell | lost |",
        "|---|---|---|---|---|---|",
    ]
    for op in dict.fromkeys(cell.op for cell in found):
        speeds = sorted(((s, c) for c in found if c.op == op and (s := c.speed(c.plain))), key=lambda pair: pair[0])
        if speeds:
            lost = sum(s < LOST for s, _ in speeds)
            middle = median(s for s, _ in speeds)
            lines.append(
                f"| `{op}` | {len(speeds)} | {middle:.2f}x | {_cell(speeds[0])} | {_cell(speeds[-1])} | {lost or ''} |"
            )
    return "\n".join(lines)


def _cell(pair: tuple[float, Cell]) -> str:
    speed, cell = pair
    return f"{speed:.2f}x ({size_text(cell.size)}, {cell.dtype}, {cell.mode})"


def _lost(found: list[Cell]) -> str:
    rows = []
    for cell in found:
        speed = cell.speed(cell.plain)
        if speed is not None and speed < LOST:
            over = (cell.ours.ms - cell.plain.ms) * 1e3
            rows.append(
                f"| `{cell.op}` | {size_text(cell.size)} | {cell.dtype} | {cell.mode} | {speed:.2f}x | {over:,.0f} us |"
            )
    if not rows:
        return f"No cell is below {LOST} of plain PyTorch's speed."
    head = [f"Lost, below {LOST} of plain PyTorch's speed:", ""]
    head += ["| op | size | dtype | direction | speed | slower by |", "|---|---|---|---|---|---|"]
    return "\n".join(head + rows)


def _untimed(rows: list[Row]) -> str:
    by_reason: dict[tuple, dict[str, None]] = {}
    refused: dict[tuple, str] = {}  # of several sizes refused for being wrong, the first error stands for all
    for row in rows:
        if row.ms is None:
            reason = row.reason
            if reason.startswith("wrong"):
                reason = refused.setdefault((row.op, row.provider), reason)
            by_reason.setdefault((row.provider, reason), {})[f"`{row.op}`"] = None
    lines = [f"- {provider} ({', '.join(ops)}): {reason}" for (provider, reason), ops in by_reason.items()]
    return "\n".join(["Without a time:", "", *lines]) if lines else ""


def insert(file: Path, runs: dict[str, tuple[dict, list[Row]]], picture: Path) -> None:
    """Writes the summary of all runs and a picture between the marker lines of a file.

    Raises:
        SystemExit: the file does not have exactly two marker lines.
    """
    text = file.read_text(encoding="utf-8")
    before, *middle = text.split(MARK)
    if len(middle) != 2:
        raise SystemExit(f"report: {file} must hold the line {MARK} twice, once above and once below the table")
    found = [cell for _, rows in runs.values() for cell in cells(rows)]
    machines = dict.fromkeys(stamp(machine) for machine, _ in runs.values())
    where = os.path.relpath(picture, file.parent)
    block = "\n\n".join(["\n".join(machines), summary(found), f"![speed relative to plain PyTorch]({where})"])
    file.write_text(f"{before}{MARK}\n{block}\n{MARK}{middle[1]}", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
