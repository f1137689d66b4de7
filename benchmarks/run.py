"""`python -m benchmarks run`: times the ops, prints tables, leaves a page with pictures.

--apart N gives every op a process of its own and at most N seconds, so that a kernel that hangs or breaks the GPU's context costs
one op: benchmarks/apart.py.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from benchmarks import apart, report
from benchmarks.harness import OURS, Bench, Row, failure, measure
from benchmarks.lines import Lines, size_text
from benchmarks.machine import machine
from benchmarks.peaks import rates, set_shares
from benchmarks.progress import Progress
from benchmarks.tables import table

SECONDS = {"tiny": 0.01, "quick": 0.3, "full": 1.0}  # per size, dtype and mode
CPU_SHARE = 0.3  # of that on a CPU, where the quick suite is to end within five minutes


def is_compiled(provider: str) -> bool:
    """Whether torch compiles it, by its name."""
    return "compile" in provider or provider == "flex"


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
    rates: dict[str, float]
    wanted: Callable[[str], bool] = lambda provider: True
    left_out: dict[str, str] = field(default_factory=dict)
    count_launches: bool = False
    compiled_only: bool = False

    def cells(self, stem: str) -> list[tuple[Bench, dict, torch.dtype]]:
        """What measuring one op takes: each bench, size and dtype."""
        return [
            (bench, size, dtype)
            for bench in benches(stem)
            if not self.compiled_only or any(is_compiled(p.name) for p in bench.providers)
            for size in bench.sizes_of(self.suite, self.device)
            for dtype in bench.dtypes[self.device]
        ]

    def measure(self, bench: Bench, size: dict, dtype: torch.dtype) -> list[Row]:
        """The rows of one cell, written as each mode ends: a run that is stopped keeps them. A cell that cannot be measured at
        all is a row that says why; what broke the GPU's context is raised after that."""

        def keep(rows: list[Row]) -> None:
            set_shares(rows, self.rates)
            self.lines.add(rows)

        try:
            found = measure(
                bench,
                size,
                dtype,
                self.device,
                seconds=SECONDS[self.suite] * (CPU_SHARE if self.device == "cpu" else 1.0),
                wanted=self.wanted,
                left_out=self.left_out,
                count_launches=self.count_launches,
                keep=keep,
            )
        except Exception as error:  # its tensors do not fit, say: the next cell's may
            found = [Row(bench.op, bench.plain, size, str(dtype)[6:], "all", reason=failure(error))]
            keep(found)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks run", description=__doc__)
    parser.add_argument("--op", action="append", help="stem of an op (several allowed); default all")
    parser.add_argument("--suite", choices=sorted(SECONDS), default="quick", help="tiny is for rehearsals")
    parser.add_argument("--quick", dest="suite", action="store_const", const="quick", help="short for --suite quick")
    parser.add_argument("--provider", action="append", help="measure only this one (several allowed) and the plain one")
    parser.add_argument("--skip", action="append", default=[], help="leave this provider out (several allowed)")
    parser.add_argument("--no-compiled", action="store_true", help="leave out what torch compiles, which takes minutes")
    parser.add_argument("--compiled", action="store_true", help="only that, beside ours and the plain one")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default the GPU, if there is one")
    parser.add_argument("--out", type=Path, help="folder; rows are appended to ops.jsonl there, then a page is written")
    parser.add_argument("--rates", type=Path, help="file of the machine's rates; measured and written if there is none")
    parser.add_argument("--apart", type=float, metavar="SECONDS", help="a process and so many seconds for each op")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="with --apart: for all ops together")
    parser.add_argument("--launches", action="store_true", help="count kernel launches, which takes a second per time")
    parser.add_argument("--no-page", action="store_true", help="leave the page and its pictures out")
    parser.add_argument("--list", action="store_true", help="print the ops that have a benchmark, and stop")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.list:
        print("\n".join(ops_with_benchmarks()))
        return 0
    if options.device is None:
        # Asks without using the GPU, which forks could not use then.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.apart:
        prepare = apart.use_the_gpu if options.device == "cuda" else lambda: None
        calls = {stem: partial(_run, options, [stem]) for stem in options.op or ops_with_benchmarks()}
        failed = apart.run(calls, options.apart, options.limit, prepare)
    else:
        _run(options, options.op or ops_with_benchmarks())
        failed = []
    if options.out and not options.no_page:
        report.main([str(options.out)])
    return 1 if failed else 0


def _run(options: argparse.Namespace, stems: list[str]) -> None:
    """Measures these ops in this process."""
    device = options.device
    compilable = {p.name for stem in stems for bench in benches(stem) for p in bench.providers if is_compiled(p.name)}
    if options.compiled and not compilable:
        return
    found = {} if options.suite == "tiny" else rates(device, options.rates)
    header = machine(device) | {name: round(value, 3) for name, value in found.items()}
    print("  ".join(f"{k}: {v}" for k, v in header.items() if k != "kind"))

    def wanted(provider: str) -> bool:
        if options.compiled and not (is_compiled(provider) or provider.startswith(OURS)):
            return False
        if options.no_compiled and is_compiled(provider):
            return False
        return provider not in options.skip and (not options.provider or provider in options.provider)

    left_out = {}
    if device == "cpu" and options.suite != "full" and not options.provider:
        left_out = dict.fromkeys(compilable, "missing: compiling takes minutes on a CPU; --suite full has it")
    lines = Lines(options.out and options.out / "ops.jsonl", header)
    run = Run(options.suite, device, lines, found, wanted, left_out, options.launches, options.compiled)
    work = {stem: run.cells(stem) for stem in stems}
    with Progress(sum(map(len, work.values()))) as progress:
        for todo in work.values():
            rows: list[Row] = []
            for cell in todo:
                progress.now(f"{cell[0].op} {size_text(cell[1])} {str(cell[2])[6:]}")
                rows += run.measure(*cell)
                progress.done()
            if rows:
                print(table(rows), "\n", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
