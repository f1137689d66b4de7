"""Tables for the terminal."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from benchmarks.harness import Row
from benchmarks.lines import cells, read, size_key, size_text


def table(rows: list[Row]) -> str:
    """The rows of one op as aligned text, a block per (size, dtype, mode), the reasons for missing times at the end."""
    rate = "TFLOP/s" if any(r.tflops is not None for r in rows) else "GB/s"
    lines = [
        f"{'provider':16} {'ms':>10} {'quartiles':>21} {rate:>9} {'of peak':>7} {'x plain':>8}  {'host us':>8} {'peak MiB':>9} {'launches':>8}"
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
    """One line per cell of a JSON lines file: our fastest provider beside plain torch and torch.compile."""
    _, rows = read(path)
    found = cells(rows)
    apart = {(c.op, size_key(c.size), c.dtype) for c in found if c.mode == "backward"}
    lines = [
        f"{'op and size':52} {'dtype':9} {'mode':8} {'ours ms':>9} {'provider':14} {'of peak':>7} {'x torch':>8} {'x compile':>9}"
    ]
    for cell in found:
        ours = cell.ours
        if ours is None or (cell.mode == "both" and (cell.op, size_key(cell.size), cell.dtype) in apart):
            continue  # "both" is the sum of the two others, but for the host's part
        lines.append(
            f"{f'{cell.op} {size_text(cell.size)}':52} {cell.dtype:9} {cell.mode:8} {ours.ms:9.4f} {ours.provider:14}"
            f" {_percent(ours.share)} {_number(cell.speed(cell.plain), 8)}"
            f" {_number(cell.speed(cell.rows.get('torch.compile')), 9)}"
        )
    reasons = Counter((r.op, r.provider, r.reason[:90]) for r in rows if r.ms is None)
    lines += [f"no time: {' '.join(key)} ({n} times)" for key, n in reasons.items() if not key[2].startswith("missing")]
    return "\n".join(lines)


if __name__ == "__main__":
    print(short_table(Path(sys.argv[1])))
