"""How far a run is: a bar with the time left on a terminal, a line per step elsewhere. Both on stderr."""

from __future__ import annotations

import sys
import time

from rich import progress
from rich.console import Console


class Progress:
    """Context manager around `total` steps; `now(what)` names the step that begins, `done()` ends it."""

    def __init__(self, total: int) -> None:
        self.total, self.count, self.start = total, 0, time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = progress.Progress(
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(elapsed_when_finished=True),
                progress.TextColumn("{task.description}"),
                console=Console(stderr=True),
                redirect_stdout=sys.stdout.isatty(),  # else a redirected table would land on the terminal
                transient=True,
            )
            self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def now(self, what: str) -> None:
        """Names the step that begins: the last line of a run that hung or died tells where."""
        if self.bar:
            self.bar.update(self.task, description=what)
            return
        passed = time.monotonic() - self.start
        left = f", {passed / self.count * (self.total - self.count):.0f} s left" if self.count else ""
        print(f"  {self.count + 1}/{self.total}{left}: {what}", file=sys.stderr, flush=True)

    def done(self) -> None:
        """Ends the step."""
        self.count += 1
        if self.bar:
            self.bar.advance(self.task)
