"""What the user sees while training: a progress bar on a terminal, plain lines elsewhere (a file, a pipe, CI)."""

from __future__ import annotations

import sys
from typing import Any


class Terminal:
    """Prints lines, under which a rich progress bar stays in place when stdout is a terminal."""

    def __init__(self) -> None:
        self._bar = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            self._bar = Progress(BarColumn(bar_width=12), TaskProgressColumn(), TextColumn("{task.description}"))
            self._task = self._bar.add_task("starting", total=1.0)
            self._bar.start()

    def say(self, text: str) -> None:
        """One line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def progress(self, share: float, learning: str, speed: str) -> None:
        """Moves the bar to `share` of the run, with two texts above each other beside it; a plain line where there is no bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=share, description=f"{learning}\n{speed}")  # fits 80 columns
        else:
            print(f"{learning}  {speed}", flush=True)

    def close(self) -> None:
        """Takes the bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def learning_text(record: dict[str, Any], steps: int | None) -> str:
    """What a training record of metrics.jsonl says about learning."""
    return (
        f"{_step(record, steps)}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad norm {record['grad_norm']:.2f}"
    )


def speed_text(record: dict[str, Any], seconds_left: float | None) -> str:
    """What a training record says about speed, and how long the run will still take."""
    share = record["share_of_peak"]
    text = f"{record['tokens_per_second']:,.0f} tok/s  {share:.{0 if share >= 0.1 else 1}%} of peak"
    return text if seconds_left is None else f"{text}  {duration(seconds_left)} left"


def evaluation_line(record: dict[str, Any], steps: int | None) -> str:
    """An evaluation record of metrics.jsonl as one readable line."""
    losses = f"validation loss {record['validation_loss']:.4f}  training loss {record['train_loss']:.4f}"
    return f"{_step(record, steps)}  {losses}  gap {record['gap']:+.4f}{'  best so far' if record['best'] else ''}"


def _step(record: dict[str, Any], steps: int | None) -> str:
    return f"step {record['step']:>{len(str(steps))}}/{steps}" if steps else f"step {record['step']}"


def duration(seconds: float) -> str:
    """9 -> 0:09, 192 -> 3:12, 4000 -> 1:06:40."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
