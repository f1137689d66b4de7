"""tests/gpu_guard.py, with a stand-in for torch: who broke the GPU is named, and the tests after it run in a new process."""

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = """
import sys, types
cuda = types.SimpleNamespace(broken=False, is_available=lambda: True, is_initialized=lambda: True)
def synchronize():
    if cuda.broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
cuda.synchronize = synchronize
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
from gpu_guard import pytest_runtest_makereport
"""
TESTS = """
import sys
cuda = sys.modules["torch"].cuda
def test_fails():
    assert cuda.broken
def test_breaks():
    cuda.broken = True
    raise ValueError("the culprit's own words")
def test_after():
    assert not cuda.broken
def test_hangs():
    import time
    time.sleep(60)
def test_last():
    assert not cuda.broken
"""


@pytest.mark.parametrize("parallel", [True, False])
def test_who_broke_the_gpu_is_named(tmp_path, parallel):
    if parallel:
        pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {Path(__file__).parent}\n")
    options = ["-n", "1", "--max-worker-restart", "24", "--maxschedchunk", "4"] if parallel else []
    options += ["-o", "faulthandler_timeout=2", "-o", "faulthandler_exit_on_timeout=true"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    out = done.stdout + done.stderr
    assert "test_it.py::test_breaks broke the GPU's context" in out and "illegal memory access" in out
    if parallel:  # as benchmarks/gpu.sh runs them: those after it, and after one that hangs, in processes of their own
        assert "3 failed, 2 passed" in out and "the culprit's own words" in out
        assert all(f"test_it.py::{name}" in out for name in ("test_fails", "test_breaks", "test_hangs"))
    else:
        assert done.returncode == 3 and "test_after" not in out
