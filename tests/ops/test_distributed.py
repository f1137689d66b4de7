"""DTensor inputs through each op's sharding rule, and a model under FSDP2: two processes on the CPU give the plain result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, on the CPU")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """name of a check -> None or its traceback, of both processes; one pair of processes runs them all."""
    folder = tmp_path_factory.mktemp("two")
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "two_processes.py")]
    both = [
        subprocess.Popen(
            [*command, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def _failures(results, start):
    found = [(name, problem) for one in results for name, problem in one.items() if name.startswith(start)]
    assert found, f"no check of {start}"
    return "\n".join(f"{name}:\n{problem}" for name, problem in found if problem)


@pytest.mark.parametrize(
    "op",
    [
        "rms_norm",
        "layer_norm",
        "softmax",
        "activation",
        "glu",
        "mlp",
        "gated_mlp",
        "lora_linear",
        "fp8_linear",
        "quantized_linear",
        "rotary",
        "attention",
        "linear_cross_entropy",
        "cross_entropy",
        "kl_div",
        "linear_kl_div",
        "linear_logprobs",
    ],
)
def test_dtensors(results, op):
    assert _failures(results, op) == ""


@pytest.mark.parametrize("check", ["options", "inference mode", "fsdp2"])
def test_the_rest(results, check):
    assert _failures(results, check) == ""


def test_every_op_with_a_gradient_is_here(results):
    import fastlm.ops  # noqa: F401 - fills the registry
    from fastlm.ops._op import REGISTRY

    here = {name.split(" ")[0] for name in results[0]}
    assert {name for name, op in REGISTRY.items() if op.backward is not None} <= here
