"""linear: the contract of the op. Its CUDA kernel: tests/csrc/test_linear.py."""

import sys

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.testing import (
    Case,
    check_accuracy,
    check_autocast,
    check_compile,
    check_double_backward,
    check_guards,
    check_reference,
    check_safety,
    check_strides,
    check_transforms,
)

OP = sys.modules["fastlm.ops.linear"].OP  # the name fastlm.ops.linear is the function's


def case_of(rows=5, N=19, K=45, bias=True):
    """x [rows, K], weight [N, K] and a bias."""

    def make(lead, N, K):
        def args(dtype, device):
            shapes = [(*lead, K), (N, K), *([(N,)] if bias else [])]
            return tuple(torch.randn(s, dtype=torch.float64).to(dtype).to(device) for s in shapes)

        return args

    return Case("linear", ops.linear, make((rows,), N, K), make((2,), 3, 4), plain=F.linear, autocast="cast",
                empty=make((0,), N, K))  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
def test_reference(bias):
    check_reference(case_of(bias=bias))


@pytest.mark.parametrize("bias", [True, False])
def test_contract(bias, device):
    """Of torch's own product and gradient, which do not go through the dispatcher's entry."""
    for check in (check_safety, check_guards, check_strides, check_autocast, check_transforms, check_compile):
        check(case_of(bias=bias), "torch", device)
    check_double_backward(case_of(bias=bias), "torch", device)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy(rows, dtype, device):
    check_accuracy(case_of(rows), "torch", dtype, device)


def test_other_dtypes_are_cast_to_x_s_and_get_gradients_in_their_own():
    x, weight, bias = torch.randn(2, 3, 8).bfloat16(), torch.randn(4, 8), torch.randn(4).half()
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    for backend in ("reference", "torch"):
        y = ops.linear(*tensors, backend=backend)
        assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 4)
        grads = torch.autograd.grad(y.float().sum(), tensors)
        assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float16]
        torch.testing.assert_close(grads[2], torch.full((4,), 6.0).half())


def test_reasons_against_the_kernel(monkeypatch):
    from fastlm.ops import _cuda

    monkeypatch.setattr(_cuda, "_asked", {"reason": None})

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, device="meta", dtype=dtype)

    for x, weight, words in (
        (meta(3, 3, 40), meta(6, 40), "it takes at most 8 rows of x, got 9"),
        (meta(2, 0), meta(6, 0), r"x must have 1 to 2\^28 columns .*, got 0 and 6"),
        (meta(2, 40, dtype=torch.float64), meta(6, 40), "its kernels take float32, bfloat16, float16, got float64"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.linear(x, weight, backend="cuda")
    assert ops.explain(ops.linear, meta(2, 4, 40), meta(6, 40), backend="cuda").backend == "cuda"
    assert "not measured" in OP._slower("cuda")


def test_errors():
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"x must be \[..., K\] and weight \[N, K\], got \[3, 8\] and \[4, 7\]"):
        ops.linear(x, weight[:, :7])
    with pytest.raises(ValueError, match=r"bias must be \[4\] like the rows of weight, got \[3\]"):
        ops.linear(x, weight, torch.randn(3))
    with pytest.raises(TypeError, match="weight must be floating point, got torch.int64"):
        ops.linear(x, weight.long())
    with pytest.raises(ValueError, match="weight must be on x's device cpu, got meta"):
        ops.linear(x, weight.to("meta"))
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        ops.linear(x, weight, backend="triton")
