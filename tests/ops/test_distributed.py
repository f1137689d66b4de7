"""DTensor inputs through each op's sharding rule, and a model under FSDP2: two processes on the CPU give the plain result."""

from pathlib import Path

import pytest
import torch

from tests.two_ranks import failures, results_of, run_both

HERE = Path(__file__).parent

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, on the CPU")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """name of a check -> None or its traceback, of both processes; one pair of processes runs them all."""
    folder = tmp_path_factory.mktemp("two")
    run_both(Path(__file__).with_name("two_processes.py"), folder)
    return results_of(folder)


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
        "linear",
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
    assert failures(results, op) == ""


@pytest.mark.parametrize("check", ["options", "inference mode", "fsdp2"])
def test_the_rest(results, check):
    assert failures(results, check) == ""


def test_every_op_with_a_gradient_is_here(results):
    import fastlm.ops  # noqa: F401 - fills the registry
    from fastlm.ops._op import REGISTRY

    here = {name.split(" ")[0] for name in results[0]}
    assert {name for name, op in REGISTRY.items() if op.backward is not None} <= here
