"""Triton's interpreter is wrong for bf16; with our repair it is right. The day the first half fails, drop the repair."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def errors():
    """Per kind of run, "plain", "repaired" or "quick": what each kernel got wrong, in an interpreter of their own."""
    command = [sys.executable, str(ROOT / "tests" / "interpreter_kernels.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_the_repair_bf16_is_wrong(errors):
    plain = errors["plain"]
    assert plain["dot torch.bfloat16"] > 1, "bf16 tl.dot is right by itself now"
    assert plain["add"] > 0 and plain["multiply"] > 0, "bf16 arithmetic is right by itself now"
    assert plain["dot torch.float16"] < 1e-3 and plain["dot torch.float32"] < 1e-3  # these never were wrong


def test_with_the_repair_bf16_is_right(errors):
    repaired = dict(errors["repaired"])
    repaired.pop("digest")
    for dtype in ("torch.bfloat16", "torch.float16", "torch.float32"):
        assert repaired.pop(f"dot {dtype}") < 1e-3
    assert repaired == dict.fromkeys(repaired, 0), "elements that differ from torch's own bf16, by operation"


def test_made_quick_it_says_the_same(errors):
    assert errors["quick"] == errors["repaired"] and len(errors["quick"]["digest"]) == 64
