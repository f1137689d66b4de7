"""benchmarks/gpu.sh: its errors, and (slow) the whole path on a CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def _run(*arguments):
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(["bash", str(SCRIPT), *map(str, arguments)], env=environment, capture_output=True, text=True)


def test_help_and_unknown_option():
    done = _run("--help")
    assert done.returncode == 0 and "benchmarks/gpu.sh [--dry]" in done.stdout and "set -" not in done.stdout
    done = _run("--fast")
    assert done.returncode == 2 and done.stderr.strip() == "gpu.sh: unknown option --fast; see --help"
    done = _run("--only", "everything")
    assert (
        done.returncode == 2
        and "--only takes conformance, correctness, ops, attention, models or sanitizer, not 'everything'"
        in done.stderr
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses on a CPU")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_conformance(tmp_path):
    done = _run("--dry", "--only", "conformance", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "philox" in (tmp_path / "conformance.txt").read_text()
    summary = (tmp_path / "summary.txt").read_text()
    assert re.search(r"conformance: exit status 0 \(\d+ s\): conformance: all \d+ cases agree", summary)
    assert "tests:" not in summary and (tmp_path / "ops.jsonl").read_text() == ""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses on a CPU")
def test_sanitizer(tmp_path):
    """The tool is a stand-in that runs what it is given."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "under $2"; shift 6; exec "$@"\n')
    tool.chmod(0o755)
    environment = os.environ | {"PYTHON": sys.executable, "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), "--dry", "--only", "sanitizer", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "memcheck: exit status 0" in summary and "racecheck: exit status 0" in summary, done.stdout + done.stderr
    ran = (tmp_path / "out" / "tests.txt").read_text()
    assert "under memcheck" in ran and "under racecheck" in ran
    assert all(0 < int(n) <= 40 for n in re.findall(r"(\d+) skipped", ran)), ran


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses on a CPU")
def test_one_part(tmp_path):
    done = _run("--dry", "--only", "models", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "summary.txt").read_text()
    assert "tests:" not in summary and (tmp_path / "ops.jsonl").read_text() == ""
    for name in ("train", "generate"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        times = {row["provider"]: row["ms"] for row in rows if row["kind"] == name}
        assert times["fastlm"] > 0 and times["transformers"] > 0
    assert summary.count("tokens/s") == 6 and "MFU" in summary and "of copy rate" in summary


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses on a CPU")
def test_rehearsal(tmp_path):
    done = _run("--dry", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["conformance.txt", "generate.jsonl", "ops.jsonl", "ops.txt", "summary.txt", "tests.txt", "train.jsonl"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "installed the checkout" in summary and "tests: exit status 0" in summary
    assert f"{os.sep}site{os.sep}fastlm{os.sep}__init__.py" in summary  # the installed one, not the checkout
    assert "rms_norm                 float32  forward" in summary and summary.splitlines()[-1].endswith("out")
