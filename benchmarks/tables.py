"""Tables for the terminal."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.harness import Row
from benchmarks.lines import LOST, Cell, cells, read, size_text


def table(rows: list[Row]) -> str:
    """The rows of one op as aligned text, a block per (size, dtype, mode), the reasons for missing times at the end."""
    rate = "TFLOP/s" if any(r.tflops is not None for r in rows) else "GB/s"
    lines = [
        f"{'provider':16} {'ms':>10} {'quartiles':>21} {rate:>9} {'of peak':>7} {'x plain':>8}  {'host us':>8} {'peak MiB':>9}"
        f" {'launches':>8}"
    ]
    cell = None
    for r in rows:
        if r.ms is None:
            continue
        if cell != (r.size, r.dtype, r.mode):
            cell = (r.size, r.dtype, r.mode)
            lines.append(f"-- {r.op} {size_text(r.size)} {r.dtype} {r.mode}")
        value = r.tflops if rate == "TFLOP/s" else r.gbps
        lines.append(
            f"{r.provider:16} {r.ms:10.4f} {f'{r.q1:.4f} - {r.q3:.4f}':>21} {_number(value, 9)} {_percent(r.share)}"
            f" {_number(r.speedup, 8)}"
            f"  {_number(r.host_us, 8)} {_number(r.peak_mb, 9)} {r.launches or '-':>8}"
        )
    reasons: dict[tuple, list[str]] = {}
    for r in rows:
        if r.ms is None:
            reasons.setdefault((r.provider, r.reason), []).append(f"{size_text(r.size)} {r.dtype}")
    lines += [f"no time for {name} ({_few(where)}): {reason}" for (name, reason), where in reasons.items()]
    return "\n".join(lines)


def _few(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{items[0]} and {len(items) - 1} more"


def _number(value: float | None, width: int) -> str:
    if value is None:
        return f"{'-':>{width}}"
    return f"{value:{width}.3f}" if value < 10 else f"{value:{width}.1f}"


def _percent(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{value:7.0%}"


def short_table(path: Path) -> str:
    """One line per op, dtype and direction: our fastest provider beside plain torch and torch.compile, at the worst size and the
    middle one, and its share of the machine's peak; then what has no time and why. Missing providers are left out."""
    _, rows = read(path)
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells(rows):
        if cell.ours:
            groups.setdefault((cell.op, cell.dtype, cell.mode), []).append(cell)
    lines = [
        f"{'least, middle of the sizes':42} {'sizes':>5}  {'of peak':24}{'speed to torch':24}{'to torch.compile':24}{'lost':>5}"
    ]
    for (op, dtype, mode), members in groups.items():
        if mode == "both" and (op, dtype, "backward") in groups:
            continue  # the sum of the two others, but for the host's part
        plain = [cell.speed(cell.plain) for cell in members]
        compiled = [cell.speed(cell.rows.get("torch.compile")) for cell in members]
        lines.append(
            f"{op:24} {dtype:8} {mode:8} {len(members):5}  {_spread([c.ours.share for c in members], _percent):24}"
            f"{_spread(plain, _times):24}{_spread(compiled, _times):24}{sum(s is not None and s < LOST for s in plain):5}"
        )
    reasons = Counter((r.op, r.provider, r.reason[:90]) for r in rows if r.ms is None)
    lines += [f"no time: {' '.join(key)} ({n} times)" for key, n in reasons.items() if not key[2].startswith("missing")]
    return "\n".join(lines)


def _spread(values: list[float | None], form: Callable[[float], str]) -> str:
    known = [v for v in values if v is not None]
    return f"{form(min(known)).strip()}, {form(median(known)).strip()}" if known else "-"


def _times(value: float) -> str:
    return f"{value:.2f}"


if __name__ == "__main__":
    print(short_table(Path(sys.argv[1])))
