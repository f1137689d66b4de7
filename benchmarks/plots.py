"""Pictures of results: speed beside plain PyTorch, the roofline, speed and memory against length."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import MODES, Row
from benchmarks.lines import LOST, Cell, cells, size_text

_COLOURS = {"forward": "#1f77b4", "backward": "#9467bd", "both": "#2ca02c"}
_RED = "#d62728"


def draw(runs: dict[str, tuple[dict, list[Row]]], folder: Path) -> list[Path]:
    """Draws what the rows allow into `folder`; returns the pictures made, that of the speeds first.

    The roofline needs rows with both bytes and FLOPs and a machine whose peaks were measured; memory needs a GPU's peaks.
    """
    import matplotlib

    matplotlib.use("Agg")
    found = [cell for _, rows in runs.values() for cell in cells(rows)]
    made = [_speeds(found, folder / "speed.png")]
    for machine, rows in runs.values():
        made += _roofline(machine, rows, folder / "roofline.png")
    made += _against_length(found, "speed", folder) + _against_length(found, "memory", folder)
    return made


def _save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def _speeds(found: list[Cell], path: Path) -> Path:
    """A line per op, a dot per cell: our speed relative to plain PyTorch's. Lost ones are red."""
    import matplotlib.pyplot as plt

    ops = list(dict.fromkeys(cell.op for cell in found if cell.speed(cell.plain)))[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(ops) + 1.2))
    shift = {"forward": 0.2, "backward": 0.0, "both": -0.2}
    for mode in MODES:
        points = [(s, ops.index(c.op) + shift[mode]) for c in found if c.mode == mode and (s := c.speed(c.plain))]
        if points:
            x, y = zip(*points)
            colours = [_RED if value < LOST else _COLOURS[mode] for value in x]
            axes.scatter(x, y, s=16, c=colours, alpha=0.75, linewidths=0)
            axes.scatter([], [], s=16, c=_COLOURS[mode], label=mode if mode != "both" else "forward + backward")
    axes.scatter([], [], s=16, c=_RED, label=f"lost: below {LOST}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(range(len(ops)), ops)
    axes.set_ylim(-0.6, len(ops) - 0.4)
    axes.set_xlabel("speed relative to plain PyTorch, every measured size and dtype (right is faster)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.5 / (0.34 * len(ops))), ncols=4, fontsize=8, frameon=False)
    return _save(figure, path)


def _roofline(machine: dict, rows: list[Row], path: Path) -> list[Path]:
    """Our fastest row of every forward cell at its FLOPs per byte, under the peaks measured at the start of the run."""
    import matplotlib.pyplot as plt

    copy = machine.get("copy_gbps")
    points: dict[tuple, list[tuple[float, float]]] = {}
    for cell in cells(rows):
        row = cell.ours
        if row and row.mode == "forward" and row.tflops and row.gbps:
            points.setdefault((cell.op, cell.dtype), []).append((1e3 * row.tflops / row.gbps, row.tflops))
    if not copy or not points:
        return []
    figure, axes = plt.subplots(figsize=(7, 4.5))
    left = min(x for column in points.values() for x, _ in column) / 2
    right = 2 * max(x for column in points.values() for x, _ in column)
    for dtype, style in (("bfloat16", "-"), ("float32", "--")):
        peak = machine.get(f"{dtype}_tflops")
        if peak and any(kind == dtype for _, kind in points):
            ridge = 1e3 * peak / copy
            xs = sorted({left, min(max(ridge, left), right), right})
            axes.plot(
                xs, [min(peak, x * copy / 1e3) for x in xs], style, color="black", linewidth=1, label=f"peak, {dtype}"
            )
    for (op, dtype), column in points.items():
        x, y = zip(*column)
        axes.scatter(x, y, s=18, marker="o" if dtype == "bfloat16" else "s", label=f"{op}, {dtype}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte that must be moved")
    axes.set_ylabel("TFLOP/s, forward")
    axes.set_title("Roofline; both peaks measured at the start of the run", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, loc="lower right")
    return [_save(figure, path)]


def _against_length(found: list[Cell], what: str, folder: Path) -> list[Path]:
    """A picture per op measured at three or more lengths S with all else but the batch equal: a panel per dtype and mode."""
    import matplotlib.pyplot as plt

    groups: dict[tuple, list[Cell]] = {}
    for cell in found:
        if "S" in cell.size:
            rest = {k: v for k, v in cell.size.items() if k not in ("S", "B")}
            groups.setdefault((cell.op, size_text(rest)), []).append(cell)
    made = []
    for (op, rest), members in groups.items():
        if what == "memory":
            members = [c for c in members if any(row.peak_mb for row in c.rows.values())]
        if len({c.size["S"] for c in members}) < 3:
            continue
        panels = list(dict.fromkeys((c.dtype, c.mode) for c in members))
        figure, all_axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.2), squeeze=False)
        for axes, (dtype, mode) in zip(all_axes[0], panels):
            lines: dict[str, list[tuple[int, float]]] = {}
            for cell in members:
                if (cell.dtype, cell.mode) == (dtype, mode):
                    for name, row in cell.rows.items():
                        value = row.peak_mb if what == "memory" else row.tflops or row.gbps
                        if value:
                            lines.setdefault(name, []).append((cell.size["S"], value))
            for name, column in lines.items():
                axes.plot(*zip(*sorted(column)), marker="o", markersize=3, label=name)
            axes.set_xscale("log", base=2)
            axes.set_title(f"{dtype}, {mode}", fontsize=9)
            axes.set_xlabel("length S")
            axes.grid(alpha=0.3)
        rate = "TFLOP/s" if any(row.tflops for c in members for row in c.rows.values()) else "GB/s"
        all_axes[0][0].set_ylabel("peak memory, MiB" if what == "memory" else rate)
        all_axes[0][0].legend(fontsize=7)
        figure.suptitle(f"{op} {rest}", fontsize=10)
        figure.tight_layout()
        taken = sum(f"{op}-{what}" in path.name for path in made)
        made.append(_save(figure, folder / f"{op}-{what}{f'-{taken + 1}' if taken else ''}.png"))
    return made
