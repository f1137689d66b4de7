"""Every pair of attention's features, and a sample of triples: forward and all gradients under the accuracy rule."""

import inspect

import pytest
import torch

from fastlm import ops
from fastlm.testing import check_accuracy
from tests.ops import attention_matrix as matrix


def _id(names):
    return " + ".join(names)


@pytest.mark.parametrize("names", matrix.pairs(), ids=_id)
def test_pairs(names, device):
    _check(names, device)


@pytest.mark.parametrize("names", matrix.triples(matrix.TRIPLES), ids=_id)
def test_triples(names, device):
    _check(names, device)


def _check(names, device):
    """Where a gradient has a few elements only (sinks), over eight draws."""
    case, args, dtype = matrix.case_of(names, device)
    if "sinks" not in names:
        check_accuracy(case, "triton", dtype, device, args)
        if device == "cpu" and matrix.backend_of(case, args) == "torch":
            _same_as_the_reference(case, args, dtype)
        return
    draws = [tuple(torch.randn_like(a) for a in args) for _ in range(7)]
    check_accuracy(case, "triton", dtype, device, [args, *draws])


def _same_as_the_reference(case, args, dtype):
    """The torch form says the same thing; how exactly is torch's affair (its exponential has fewer digits than the rule asks)."""
    found = []
    for backend in ("torch", "reference"):
        leaves = [a.detach().requires_grad_() for a in args]
        out = case.fn(*leaves, backend=backend)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, **tolerance)


def test_the_readme_has_the_table():
    text = matrix.README.read_text(encoding="utf-8")
    assert matrix.with_table(text) == text, "run `python tests/ops/attention_matrix.py`"


def test_decode_attention_takes_what_the_table_says():
    parameters = inspect.signature(ops.decode_attention).parameters
    assert {word for word in matrix._DECODE.values() if word != "always"} <= set(parameters)
