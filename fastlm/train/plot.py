"""loss.png from metrics.jsonl."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any


def draw_losses(records: list[dict[str, Any]], path: str | Path, *, dark: bool = False) -> bool:
    """Draws training loss (faint, and smoothed), validation loss and the gap between them over the steps.

    Args:
        records: as `read_metrics` gives them.
        path: the PNG to write (under a temporary name, then renamed).
        dark: light lines on a dark ground, for pages read in dark mode.

    Returns:
        False, with nothing written, if there is no training record yet.
    """
    train = [(r["step"], r["loss"]) for r in records if r.get("kind") == "train"]
    evaluations = [r for r in records if r.get("kind") == "evaluation"]
    if not train:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, ground, blue, orange = (
        ("#e6e6e6", "#17191d", "#6ea8fe", "#ffa657") if dark else ("#222", "#fff", "#1f5fbf", "#d2570b")
    )
    figure = Figure(figsize=(8, 4.5), dpi=150, facecolor=ground, layout="constrained")
    axes = figure.add_subplot(facecolor=ground)
    steps, losses = zip(*train)
    axes.plot(steps, losses, color=blue, alpha=0.35, linewidth=0.8)
    ends = len(losses) // 80  # where smoothing has little to work with, it would end in a hook
    shown = slice(ends, len(losses) - ends)
    axes.plot(steps[shown], smoothed(losses)[shown], color=blue, linewidth=1.8, label="training (smoothed)")
    if evaluations:
        at = [r["step"] for r in evaluations]
        held_out = [r["validation_loss"] for r in evaluations]
        axes.plot(at, held_out, color=orange, marker="o", markersize=4, linewidth=1.5, label="validation")
        axes.fill_between(
            at, [r["train_loss"] for r in evaluations], held_out, color=orange, alpha=0.12, linewidth=0, label="gap"
        )
        gap = f"gap {evaluations[-1]['gap']:+.3f}"
        offset = {"xytext": (0, 10), "textcoords": "offset points", "ha": "right"}
        axes.annotate(gap, (at[-1], held_out[-1]), **offset, color=orange, fontsize=9)
    _style(axes, ink, losses, evaluations)
    temporary = Path(path).with_suffix(".writing")
    FigureCanvasAgg(figure).print_figure(temporary, format="png")
    os.replace(temporary, path)
    return True


def _style(axes: Any, ink: str, losses: tuple[float, ...], evaluations: list[dict[str, Any]]) -> None:
    axes.set_xlabel("step", color=ink)
    axes.set_ylabel("loss (nats per token)", color=ink)
    axes.tick_params(colors=ink)
    axes.grid(alpha=0.15, color=ink)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(ink)
    axes.set_xlim(left=0)
    if len(losses) > 20:
        # The first steps fall from ln(vocabulary) and would squeeze all that matters into the lowest fifth.
        shown = [*losses[len(losses) // 20 :], *(r["validation_loss"] for r in evaluations)]
        margin = 0.05 * (max(shown) - min(shown)) + 1e-3
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.legend(frameon=False, labelcolor=ink)


def smoothed(values: tuple[float, ...] | list[float]) -> list[float]:
    """Mean over a window around each point, about a twentieth of the run wide, narrower towards both ends.

    The window is symmetric everywhere: a trailing mean would draw a falling loss too high, and show a gap with the wrong sign.
    """
    half = len(values) // 40
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        result.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return result
