import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastlm.train import checkpoint
from tests.train.killed_run import SETTINGS, run
from tests.train.tiny import losses

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process: sums may be split by the number of threads
    yield
    torch.set_num_threads(before)


def start(out, **settings):
    command = [sys.executable, "-m", "tests.train.killed_run", json.dumps({"out": str(out), **settings})]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process, out, step):
    """Returns once the run has logged the step; fails if the process ends before."""
    deadline = time.monotonic() + 60
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def final_weights(out):
    path, skipped = checkpoint.latest_valid(out / "checkpoints")
    assert skipped == []
    return {name: load_file(path / name) for name in (checkpoint.MODEL, checkpoint.OPTIMIZER)}


def assert_bitwise_equal(a, b):
    for file in a:
        assert a[file].keys() == b[file].keys()
        for name in a[file]:
            assert torch.equal(a[file][name], b[file][name]), f"{file}: {name}"


def test_killed_at_random_moments_and_resumed_is_bit_for_bit_the_uninterrupted_run(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    rng = random.Random(7)
    for step in (5, 17, 29):
        process = start(killed, resume=step > 5)
        wait_for_step(process, killed, step + rng.randrange(3))
        time.sleep(0.05 * rng.random())  # into a step, an evaluation or a half-written checkpoint
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert run(out=str(killed), resume=True).step == SETTINGS["steps"]
    run(out=str(whole))
    assert losses(killed) == losses(whole)
    assert len(losses(whole)[0]) == SETTINGS["steps"]
    assert_bitwise_equal(final_weights(killed), final_weights(whole))
    assert not list(killed.rglob(".writing*"))


def test_killed_before_the_first_checkpoint_starts_from_the_beginning(tmp_path, capsys):
    run(out=str(tmp_path / "whole"), steps=4)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 4.0}\n{"kind"')
    run(out=str(tmp_path / "killed"), steps=4, resume=True)
    assert "starting from the beginning" in capsys.readouterr().out
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_finished_run_resumed_adds_nothing_and_with_more_steps_goes_on(tmp_path):
    first = run(out=str(tmp_path), steps=5, schedule="constant")
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert run(out=str(tmp_path), steps=5, schedule="constant", resume=True) == first
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    run(out=str(tmp_path), steps=9, schedule="constant", resume=True)
    run(out=str(tmp_path / "whole"), steps=9, schedule="constant")
    assert losses(tmp_path)[0] == losses(tmp_path / "whole")[0]
    assert_bitwise_equal(final_weights(tmp_path), final_weights(tmp_path / "whole"))


def test_ctrl_c_from_outside(tmp_path):
    process = start(tmp_path, steps=100_000)
    wait_for_step(process, tmp_path, 3)
    os.kill(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert "stopping after this step" in said
    assert "--resume" in said
    path, _ = checkpoint.latest_valid(tmp_path / "checkpoints")
    assert int(path.name[5:]) == max(losses(tmp_path)[0])
