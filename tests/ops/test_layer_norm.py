import sys

import pytest
import torch

from fastlm import ops
from fastlm.testing import assert_accurate
from tests.ops.norm_cases import Norm, NormTests


def _bias_alone(x, bias, *, backend):
    return ops.layer_norm(x, None, bias, backend=backend)


@pytest.mark.parametrize("few", [None, 0])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torch_form_with_a_bias_alone(dtype, trained, few, monkeypatch):
    if few is not None:
        monkeypatch.setattr(sys.modules["fastlm.ops.norm_torch"], "_FEW", few)
    x, bias, dy = (torch.randn(s).to(dtype) for s in ((6, 40), (40,), (6, 40)))

    def run(kind, backend):
        a, b = x.to(kind).requires_grad_(), bias.to(kind).requires_grad_(trained)
        y = _bias_alone(a, b, backend=backend)
        return y, *torch.autograd.grad(y, [a, b] if trained else [a], dy.to(kind))

    for found, exact, plain in zip(
        run(dtype, "torch"), run(torch.float64, "reference"), run(dtype, "reference"), strict=True
    ):
        assert found.dtype == dtype
        assert_accurate(found, exact, plain)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_torch_form_with_a_bias_alone_differentiates_twice(trained):
    x, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 5), (5,)))
    inputs = (x.requires_grad_(), bias.requires_grad_(trained))
    assert torch.autograd.gradgradcheck(lambda a, b: _bias_alone(a, b, backend="torch"), inputs)


class TestLayerNorm(NormTests):
    norm = Norm("layer_norm")

    @pytest.mark.parametrize(
        "old, new",
        [
            ("x = tl.where(live, x - mean[:, None], 0.0)", "x = x - mean[:, None]"),  # the padding in the variance
            ("x = tl.where(live, x - mean[:, None], 0.0)", "x = tl.where(live, x, 0.0)"),  # not centred
            ("g -= centre", "g -= 0.0"),  # the mean of the gradient forgotten
            ("dweight += dy * xhat", "dweight = dy * xhat"),  # only the last block of rows counted
            ("mask=live)\n    partial", "mask=live & (row < M - 1)[:, None])\n    partial"),  # the last row of dx not written
        ],
        ids=["padding", "centre", "mean", "dweight", "dx_tail"],
    )  # fmt: skip
    def test_planted_bug_is_seen(self, old, new, device):
        self.sees(old, new, device, kind="r", shape=(2100, 6) if "dweight" in old else None)

    @pytest.mark.parametrize(
        "old, new",
        [
            ("(here - mean) * (here - mean) * (count * start / (start + count))", "0.0"),  # between the blocks
            ("mean += (here - mean) * (count / (start + count))", "mean = here"),
            ("tl.minimum(N - start, BLOCK_N)", "tl.minimum(BLOCK_N, BLOCK_N)"),  # the last block taken for a whole one
            ("tl.store(centre_ptr + row, tl.sum(centre, 1) / N)", "tl.store(centre_ptr + row, tl.sum(centre, 1) * 0)"),
        ],
        ids=["between", "mean", "last_block", "centre"],
    )
    def test_planted_bug_in_wide_rows_is_seen(self, old, new, device):
        self.sees(old, new, device, file="norm_wide", kind="", shape=(2, 9000 if "centre_ptr" in old else 33000))
