"""`python -m benchmarks run`: times the ops, prints tables, leaves a page with pictures."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.harness import Bench, Row, measure
from benchmarks.lines import Lines, size_text
from benchmarks.machine import machine
from benchmarks.peaks import peaks, set_shares
from benchmarks.progress import Progress
from benchmarks.tables import table

COMPILED = ("torch.compile", "compiled", "flex")  # the names under which benchmark files have what torch compiles
SECONDS = {"tiny": 0.01, "quick": 0.3, "full": 1.0}  # per size, dtype and mode
CPU_SHARE = 0.3  # of that on a CPU, where the quick suite is to end within five minutes


def ops_with_benchmarks() -> list[str]:
    """Stems with a benchmarks/ops/bench_<stem>.py."""
    return sorted(p.stem.removeprefix("bench_") for p in (Path(__file__).parent / "ops").glob("bench_*.py"))


def load(stem: str):
    """The module of one benchmark file."""
    if stem not in ops_with_benchmarks():
        raise SystemExit(f"benchmarks: no op {stem!r}; there is {', '.join(ops_with_benchmarks())}")
    return importlib.import_module(f"benchmarks.ops.bench_{stem}")


def benches(stem: str) -> list[Bench]:
    """What a benchmark file measures: its BENCH, which may be a list."""
    found = load(stem).BENCH
    return list(found) if isinstance(found, (list, tuple)) else [found]


@dataclass(frozen=True)
class Run:
    """What holds for every cell of a run: where, how long, by whom, and where the rows go."""

    suite: str
    device: str
    lines: Lines
    rates: dict[str, float]  # peaks()'s
    wanted: Callable[[str], bool] = lambda provider: True
    left_out: dict[str, str] = field(default_factory=dict)
    count_launches: bool = False

    def cells(self, stem: str) -> list[tuple[Bench, dict, torch.dtype]]:
        """What measuring one op takes: each bench, size and dtype."""
        return [
            (bench, size, dtype)
            for bench in benches(stem)
            for size in bench.sizes_of(self.suite, self.device)
            for dtype in bench.dtypes[self.device]
        ]

    def measure(self, bench: Bench, size: dict, dtype: torch.dtype) -> list[Row]:
        """The rows of one cell, which are written at once: a run that is stopped keeps them."""
        found = measure(
            bench,
            size,
            dtype,
            self.device,
            seconds=SECONDS[self.suite] * (CPU_SHARE if self.device == "cpu" else 1.0),
            wanted=self.wanted,
            left_out=self.left_out,
            count_launches=self.count_launches,
        )
        set_shares(found, self.rates)
        self.lines.add(found)
        return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks run", description=__doc__)
    parser.add_argument("--op", action="append", help="stem of an op (several allowed); default all")
    parser.add_argument("--suite", choices=sorted(SECONDS), default="quick", help="tiny is for rehearsals")
    parser.add_argument("--quick", dest="suite", action="store_const", const="quick", help="short for --suite quick")
    parser.add_argument("--provider", action="append", help="measure only this one (several allowed) and the plain one")
    parser.add_argument("--skip", action="append", default=[], help="leave this provider out (several allowed)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder; rows are appended to ops.jsonl there, then a page is written")
    parser.add_argument("--launches", action="store_true", help="count kernel launches, which takes a second per time")
    parser.add_argument("--no-page", action="store_true", help="leave the page and its pictures out")
    parser.add_argument("--list", action="store_true", help="print the ops that have a benchmark, and stop")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(ops_with_benchmarks()))
        return 0
    stems = options.op or ops_with_benchmarks()
    rates = {} if options.suite == "tiny" else peaks((torch.float32, torch.bfloat16), options.device)
    header = machine(options.device) | {name: round(value, 3) for name, value in rates.items()}
    print("  ".join(f"{k}: {v}" for k, v in header.items() if k != "kind"))

    def wanted(provider: str) -> bool:
        return provider not in options.skip and (not options.provider or provider in options.provider)

    left_out = {}
    if options.device == "cpu" and options.suite != "full" and not options.provider:
        left_out = dict.fromkeys(COMPILED, "missing: compiling takes minutes on a CPU; --suite full has it")
    lines = Lines(options.out and options.out / "ops.jsonl", header)
    run = Run(options.suite, options.device, lines, rates, wanted, left_out, options.launches)
    work = {stem: run.cells(stem) for stem in stems}
    with Progress(sum(map(len, work.values()))) as progress:
        for todo in work.values():
            rows: list[Row] = []
            for cell in todo:
                progress.now(f"{cell[0].op} {size_text(cell[1])} {str(cell[2])[6:]}")
                rows += run.measure(*cell)
                progress.done()
            print(table(rows), "\n", flush=True)
    if options.out and not options.no_page:
        report.main([str(options.out)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
