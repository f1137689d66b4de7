"""Calls in processes of their own: one that hangs, dies or breaks the GPU's context costs itself and its own time, no more.

The processes are forks of this one, which imports torch once for all. CUDA does not live through a fork: whoever calls must not
have used the GPU, and where a fork cannot use it all the same, the processes are started anew instead.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping

import torch

_PATIENCE = 5  # seconds between asking a process to end and ending it
_NO_GPU = 77  # exit status of a fork that cannot use the GPU


def run(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    limit: float | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> list[str]:
    """Runs the calls one after the other, each for at most `seconds`, all for at most `limit`; the names of those that did not
    end well or were not begun. A line on stderr says what happened to each of them. `prepare` is called first in every fork; if
    it raises, this call and all after it get a process that is no fork (they must be picklable).
    """
    end = time.monotonic() + (limit if limit is not None else float("inf"))
    kind, failed = "fork", []
    for name, call in calls.items():
        reason = "not begun: out of time"
        if (left := end - time.monotonic()) > _PATIENCE:
            reason = _one(kind, call, prepare, min(seconds, left))
            if reason == f"exit status {_NO_GPU}" and kind == "fork":
                print("apart: a fork cannot use the GPU; every process is started anew", file=sys.stderr, flush=True)
                kind = "spawn"
                reason = _one(kind, call, prepare, min(seconds, left))
        if reason:
            failed.append(name)
            print(f"{name}: {reason}", file=sys.stderr, flush=True)
    return failed


def use_the_gpu() -> None:
    """A `prepare`: raises where this process cannot use the GPU."""
    torch.zeros(1, device="cuda")


def _forked(call: Callable[[], object], prepare: Callable[[], object]) -> None:
    try:
        prepare()
    except RuntimeError as error:
        print(f"apart: {error}", file=sys.stderr, flush=True)
        os._exit(_NO_GPU)
    call()


def _one(kind: str, call: Callable[[], object], prepare: Callable[[], object], seconds: float) -> str | None:
    """Why the call did not end well, or None."""
    sys.stdout.flush()
    sys.stderr.flush()
    context = multiprocessing.get_context(kind)
    child = context.Process(target=_forked, args=(call, prepare)) if kind == "fork" else context.Process(target=call)
    child.start()
    try:
        child.join(seconds)
        if child.exitcode is not None:
            return f"exit status {child.exitcode}" if child.exitcode else None
        os.kill(child.pid, signal.SIGINT)
        child.join(_PATIENCE)
        return f"stopped after its {seconds:.0f} s"
    finally:
        if child.is_alive():
            child.kill()
            child.join(_PATIENCE)
