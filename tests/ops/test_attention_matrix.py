"""Every pair of attention's features, and a sample of triples: forward and all gradients under the accuracy rule."""

import pytest
import torch

from fastlm.testing import check_accuracy
from tests.ops import attention_matrix as matrix

TRIPLES = 60


def _id(names):
    return " + ".join(names)


@pytest.mark.parametrize("names", matrix.pairs(), ids=_id)
def test_pairs(names, device):
    _check(names, device)


@pytest.mark.parametrize("names", matrix.triples(TRIPLES), ids=_id)
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
