"""Tests in two processes over gloo: both run one script as `script RANK FOLDER`, and leave what they found as RANK.json."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_both(script, folder: Path) -> None:
    """Runs the script as rank 0 and rank 1 at once, the checkout on the path. AssertionError with their output if one fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    both = [subprocess.Popen([sys.executable, str(script), str(rank), str(folder)], **pipes) for rank in (0, 1)]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)


def results_of(folder: Path) -> list[dict]:
    """What each process found: name of a check -> None or its traceback."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def failures(results: list[dict], start: str) -> str:
    """The tracebacks of the checks whose name begins so; there must be such checks."""
    found = [(name, problem) for one in results for name, problem in one.items() if name.startswith(start)]
    assert found, f"no check of {start}"
    return "\n".join(f"{name}:\n{problem}" for name, problem in found if problem)
