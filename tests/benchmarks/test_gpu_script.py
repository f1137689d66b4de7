"""benchmarks/gpu.sh: its errors, its order and limits with stand-ins for what it runs, and (slow) the whole path on a CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.run import ops_with_benchmarks

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


PYTHON = r"""#!/bin/bash
# Plays Python on a GPU machine: says what was asked of it, and gives what each part of a bad day gives.
case "$*" in
  *"-m pip"*) echo "kernel.cu(7): error: no such instruction" ; exit 1 ;;
  *xdist*) exit 0 ;;
  "- 0") echo "fastlm from a stand-in" ;;
  *tests.csrc.conformance*) echo "conformance: all 3 cases agree; 9 values" ;;
  *"-m pytest"*csrc*) echo "2 passed, 9 deselected in 1.00s" ;;
  *"-m pytest"*)
    echo "tests/ops/test_mlp.py::test_it broke the GPU's context, so its process ends: CUDA error"
    echo "FAILED tests/ops/test_mlp.py::test_it"; echo "1 failed, 3 passed in 2.00s"; exit 1 ;;
  *softmax*--no-compiled*)
    printf '  1/2: rms_norm M=1 bfloat16\n  2/2, 3 s left: rms_norm M=2 bfloat16\nCUDA error: broken\nrms_norm: exit status 1\n'
    printf '  1/2: softmax M=3 bfloat16\nsoftmax: stopped after its 40 s\n'; exit 1 ;;
esac
"""
TIMEOUT = r"""#!/bin/bash
echo "$3 ${*:4}" >>"$CALLS"
exec "${@:4}"
"""


def _on_a_bad_day(tmp_path, *arguments):
    """(what was started under a limit: the seconds and the command; the summary), with stand-ins for Python and timeout."""
    (tmp_path / "bin").mkdir()
    for name, text in (("python", PYTHON), ("timeout", TIMEOUT)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PYTHON": str(tmp_path / "bin" / "python"),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
    }
    command = ["bash", str(SCRIPT), *arguments, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = [line.split(" ", 2)[::2] for line in (tmp_path / "calls").read_text().splitlines()]
    return [(int(seconds), words) for seconds, words in calls], (tmp_path / "out" / "summary.txt").read_text()


def test_a_plain_call_does_what_is_worth_most_first_and_keeps_time_for_the_rest(tmp_path):
    calls, summary = _on_a_bad_day(tmp_path)
    parts = ["pip install", "conformance", "test_rms_norm.py", "test_cuda_library.py", "--op attention", "--op rms_norm",
             "bench_train", "bench_generate", "bench_train", "bench_generate", "--op rms_norm", "--op attention"]  # fmt: skip
    assert len(calls) == len(parts) and all(part in words for part, (_, words) in zip(parts, calls)), calls
    limits = [seconds for seconds, _ in calls]
    assert limits[1] == 100 and limits[2] == limits[3] == 120 and limits[0] <= 525 - 420
    assert "--no-compiled" in calls[5][1] and calls[5][0] <= 525 - 90 and "--compiled" in calls[10][1]
    files = re.findall(r"(\S+/tests/ops/test_\w+\.py)", calls[2][1])
    assert len(files) == 12 and all(Path(file).exists() for file in files)
    assert sorted(re.findall(r"--op (\S+)", calls[4][1] + calls[5][1])) == ops_with_benchmarks()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "generate.jsonl", "ops.jsonl", "ops.txt", "summary.txt", "tests.txt", "train.jsonl"]  # fmt: skip


def test_parts_that_take_all_they_may_leave_the_others_what_they_need():
    text = SCRIPT.read_text()
    share = text[text.index("# What each part needs") : text.index("# Parts of tests.txt")]
    code = """
limit=525 dry=0 only=""
wants() { true; }
for part in install:150 conformance:100 op_tests:120 kernel_tests:120 attention:120 ops:400 models:60; do
  seconds=$(share ${part#*:} ${part%:*})
  echo $seconds
  SECONDS=$((SECONDS + seconds))
done
"""
    done = subprocess.run(["bash", "-c", share + code], capture_output=True, text=True, check=True)
    taken = [int(line) for line in done.stdout.split()]
    assert sum(taken) <= 525 and all(took >= need for took, need in zip(taken, (100, 60, 60, 50, 50, 110, 60)))


def test_what_went_wrong_is_in_the_summary(tmp_path):
    _, summary = _on_a_bad_day(tmp_path)
    assert "on with the checkout as it is, without CUDA kernels" in summary and "(7): error: no such" in summary
    assert "op tests: 1 failed, 3 passed" in summary and "kernel tests: 2 passed" in summary
    assert "broke the GPU's context" in summary and "FAILED tests/ops/test_mlp.py" in summary
    assert "rms_norm: exit status 1, at  2/2, 3 s left: rms_norm M=2 bfloat16\n    CUDA error: broken\n" in summary
    assert "softmax: stopped after its 40 s, at  1/2: softmax M=3 bfloat16\n" in summary


def test_two_calls_do_all_of_it(tmp_path):
    calls, _ = _on_a_bad_day(tmp_path, "--only", "correctness")
    assert "tests/ops -n 12" in calls[1][1] and calls[1][0] == 400 and "test_cuda_library.py" in calls[2][1]
    (tmp_path / "again").mkdir()
    calls, _ = _on_a_bad_day(tmp_path / "again", "--only", "ops", "--only", "models")
    assert "--op attention" in calls[1][1] and calls[2][0] > 350 and "-m pytest" not in str(calls)


def test_a_rehearsal_of_one_part_does_no_other(tmp_path):
    calls, _ = _on_a_bad_day(tmp_path, "--dry", "--only", "models")
    assert ["pip" in calls[0][1], "bench_train" in calls[1][1], "bench_generate" in calls[2][1]] == [True] * 3
    assert len(calls) == 3


def test_out_of_time_is_said(tmp_path):
    calls, summary = _on_a_bad_day(tmp_path, "--seconds", "14")
    assert "out of time before ops\n" in summary and "out of time before training gpt2\n" in summary and len(calls) == 4


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses on a CPU")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_conformance(tmp_path):
    done = _run("--dry", "--only", "conformance", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "philox" in (tmp_path / "tests.txt").read_text()
    summary = (tmp_path / "summary.txt").read_text()
    assert re.search(r"conformance: passed \(\d+ s\): conformance: all \d+ cases agree", summary)
    assert "nothing is installed" in summary and "tests:" not in summary and (tmp_path / "ops.jsonl").read_text() == ""


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
    assert "memcheck: passed" in summary and "racecheck: passed" in summary, done.stdout + done.stderr
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
    names = ["generate.jsonl", "ops.jsonl", "ops.txt", "summary.txt", "tests.txt", "train.jsonl"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert (
        "installed the checkout" in summary
        and "op tests (hot ops): passed" in summary
        and "kernel tests: passed" in summary
    )
    assert f"{os.sep}site{os.sep}fastlm{os.sep}__init__.py" in summary  # the installed one, not the checkout
    assert "rms_norm                 float32  forward" in summary and summary.splitlines()[-1].endswith("out")
