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
        return
    draws = [tuple(torch.randn_like(a) for a in args) for _ in range(7)]
    check_accuracy(case, "triton", dtype, device, [args, *draws])


def test_the_readme_has_the_table():
    text = matrix.README.read_text(encoding="utf-8")
    assert matrix.with_table(text) == text, "run `python tests/ops/attention_matrix.py`"


def test_decode_attention_takes_what_the_table_says():
    parameters = inspect.signature(ops.decode_attention).parameters
    assert {word for word in matrix._DECODE.values() if word != "always"} <= set(parameters)
