"""`python -m benchmarks run`: times the ops and prints a table."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import Bench, Row, measure
from benchmarks.peaks import peaks, set_shares
from benchmarks.report import Lines, machine, size_text, table

SECONDS = {"tiny": 0.01, "quick": 0.3, "full": 1.0}  # per size, dtype and mode


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


def run_op(
    stem: str,
    suite: str,
    device: str,
    lines: Lines,
    rates: dict[str, float],
    wanted: Callable[[str], bool] = lambda provider: True,
) -> list[Row]:
    """Measures one op, writing lines as it goes and a progress line on stderr; returns the rows. `rates` are peaks()'s."""
    rows: list[Row] = []
    for bench in benches(stem):
        for size in bench.sizes_of(suite, device):
            for dtype in bench.dtypes[device]:
                start = time.monotonic()
                found = measure(bench, size, dtype, device, seconds=SECONDS[suite], wanted=wanted)
                set_shares(found, rates)
                lines.add(found)
                rows += found
                took = time.monotonic() - start
                print(f"  {bench.op} {size_text(size)} {str(dtype)[6:]}: {took:.1f} s", file=sys.stderr, flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks run", description=__doc__)
    parser.add_argument("--op", action="append", help="stem of an op (several allowed); default all")
    parser.add_argument("--suite", choices=sorted(SECONDS), default="quick", help="tiny is for rehearsals")
    parser.add_argument("--quick", dest="suite", action="store_const", const="quick", help="short for --suite quick")
    parser.add_argument("--provider", action="append", help="measure only this one (several allowed) and the plain one")
    parser.add_argument("--skip", action="append", default=[], help="leave this provider out (several allowed)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder; rows are appended to ops.jsonl there")
    parser.add_argument("--list", action="store_true", help="print the ops that have a benchmark, and stop")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(ops_with_benchmarks()))
        return 0
    rates = peaks((torch.float32, torch.bfloat16)) if options.device == "cuda" else {}
    header = machine(options.device) | {name: round(value, 3) for name, value in rates.items()}
    print("  ".join(f"{k}: {v}" for k, v in header.items() if k != "kind"))
    lines = Lines(options.out and options.out / "ops.jsonl", header)

    def wanted(provider: str) -> bool:
        return provider not in options.skip and (not options.provider or provider in options.provider)

    for stem in options.op or ops_with_benchmarks():
        print(table(run_op(stem, options.suite, options.device, lines, rates, wanted)), "\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
