"""Ctrl-C and termination while training: finish the step, save, say how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable


class TrainingInterrupted(Exception):
    """Training was stopped by a signal, after the step was finished and a checkpoint saved.

    No KeyboardInterrupt, which command-line frameworks swallow: the message says how to resume. `exit_status` is the shell's
    convention, 130 for Ctrl-C and 143 for SIGTERM.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_status = 128 + signal_number


class StopRequest:
    """While the context is open, SIGINT and SIGTERM set `signal_number` instead of killing; a second one kills as usual.

    Signals can be caught in the main thread only; elsewhere this does nothing.

    Args:
        notice: called once with a line for the user, at the first signal.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.signal_number: int | None = None
        self._notice = notice
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        self.signal_number = number
        for other in self._previous:
            signal.signal(other, signal.default_int_handler if other == signal.SIGINT else signal.SIG_DFL)
        self._notice("stopping after this step, then saving; once more to stop at once without saving")
