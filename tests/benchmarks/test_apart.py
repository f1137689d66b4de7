"""Calls in processes of their own: one that hangs or dies costs no other."""

import os
import sys
import time
from functools import partial

import pytest

from benchmarks import apart


def _write(path, word):
    with open(path, "a") as file:
        file.write(word + "\n")


def _deaf(path):
    """A kernel that never ends: no signal gets through to Python while it is waited for."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _write(path, f"deaf {os.getpid()}")
    time.sleep(60)


def test_one_that_hangs_or_dies_costs_no_other(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(apart, "_PATIENCE", 0.2)
    path = str(tmp_path / "done")
    calls = {
        "dies": partial(os._exit, 9),
        "slow": partial(time.sleep, 60),
        "deaf": partial(_deaf, path),
        "raises": partial(int, "x"),
        "good": partial(_write, path, "good"),
    }
    start = time.monotonic()
    assert apart.run(calls, 1.0) == ["dies", "slow", "deaf", "raises"]
    deaf, pid, good = (tmp_path / "done").read_text().split()
    assert time.monotonic() - start < 20 and (deaf, good) == ("deaf", "good")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    errors = capfd.readouterr().err
    assert "dies: exit status 9" in errors and "slow: stopped after its 1 s" in errors and "deaf: stopped" in errors
    assert "ValueError: invalid literal" in errors and "raises: exit status 1" in errors and "good" not in errors


def test_no_call_begins_when_the_time_is_over(tmp_path, capfd):
    assert apart.run({"one": partial(os._exit, 0)}, 9.0, limit=0.0) == ["one"]
    assert "one: not begun: out of time" in capfd.readouterr().err


def _fails_in_a_fork():
    raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")


def test_where_a_fork_cannot_use_the_gpu_processes_are_started_anew(capfd):
    """A process that is no fork needs no `prepare`, and has none of this one's state."""
    code = "import sys; assert 'benchmarks' not in sys.modules; print('began anew', flush=True)"
    calls = {"a": partial(exec, code), "b": partial(exec, code)}
    assert apart.run(calls, 60.0, prepare=_fails_in_a_fork) == []
    caught = capfd.readouterr()
    assert caught.out.count("began anew") == 2
    assert caught.err.count("a fork cannot use the GPU") == 1 and "Cannot re-initialize" in caught.err
    assert "benchmarks" in sys.modules
