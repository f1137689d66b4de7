"""DDP, FSDP2 and distributed checkpoints: two processes on the CPU (gloo) give what one gives; see two_processes.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.optim.cases import CLASSES, MODES


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """name of a check -> None or its traceback, of both processes; one pair of processes runs them all."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py"))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen([*command, str(rank), str(folder)], **pipes) for rank in (0, 1)]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def _check(results, start):
    found = [(name, problem) for one in results for name, problem in one.items() if name.startswith(start)]
    assert found, f"no check of {start}"
    problems = "\n".join(f"{name}:\n{problem}" for name, problem in found if problem)
    assert not problems, problems


@pytest.mark.parametrize("name", CLASSES)
def test_steps(results, name):
    _check(results, f"steps {name}")
    _check(results, f"clipping {name}")


@pytest.mark.parametrize("mode", MODES)
def test_skip_and_checkpoint(results, mode):
    _check(results, f"skip {mode}")
    _check(results, f"checkpoint {mode}")


@pytest.mark.parametrize("what", ["real gradients", "full state dict", "averages", "checkpoint sgd"])
def test_others(results, what):
    _check(results, what)
