"""DDP, FSDP2 and distributed checkpoints: two processes on the CPU (gloo) give what one gives; see two_processes.py."""

from pathlib import Path

import pytest

from tests.optim.cases import CLASSES, MODES
from tests.two_ranks import failures, results_of, run_both


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """name of a check -> None or its traceback, of both processes; one pair of processes runs them all."""
    folder = tmp_path_factory.mktemp("two")
    run_both(Path(__file__).with_name("two_processes.py"), folder)
    return results_of(folder)


@pytest.mark.parametrize("name", CLASSES)
def test_steps(results, name):
    assert failures(results, f"steps {name}") == ""
    assert failures(results, f"clipping {name}") == ""


@pytest.mark.parametrize("mode", MODES)
def test_skip_and_checkpoint(results, mode):
    assert failures(results, f"skip {mode}") == ""
    assert failures(results, f"checkpoint {mode}") == ""


@pytest.mark.parametrize("what", ["real gradients", "full state dict", "averages", "checkpoint sgd"])
def test_others(results, what):
    assert failures(results, what) == ""
