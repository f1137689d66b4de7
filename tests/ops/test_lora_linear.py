"""lora_linear: the contract, the accuracy, what it saves and allocates."""

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.testing import Case, check_accuracy, check_op, check_reference

BACKENDS = ("torch",)


def _make(bias, sizes=(7, 19, 21, 5)):
    """x [2, S, D], weight [D_out, D], a [r, D], b [D_out, r] and a bias."""

    def make(dtype, device):
        S, D, D_out, r = sizes
        shapes = [(2, S, D), (D_out, D), (r, D), (D_out, r), *([(D_out,)] if bias else [])]
        return tuple(torch.randn(s, dtype=torch.float64).to(dtype).to(device) for s in shapes)

    return make


def _case(bias, scale=2.0):
    def plain(x, weight, a, b, bias=None):
        return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)

    return Case(
        "lora_linear",
        lambda *args, backend: ops.lora_linear(*args, scale=scale, backend=backend),
        _make(bias),
        _make(bias, (2, 3, 2, 1)),
        plain=plain,
        autocast="cast",
        empty=_make(bias, (0, 5, 4, 3)),
    )


CASES = {"bias": _case(True), "plain": _case(False, 0.5), "scale_one": _case(False, 1.0)}
ALL = pytest.mark.parametrize("name", CASES)


@ALL
def test_reference(name):
    check_reference(CASES[name])


@pytest.mark.parametrize("name", ["bias", "plain"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_contract(name, backend, device):
    check_op(CASES[name], backend, device)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(name, backend, dtype, device):
    check_accuracy(CASES[name], backend, dtype, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_weight_costs_no_product_and_gets_no_gradient(backend, device, monkeypatch):
    from fastlm.kernels import lora_linear as steps

    asked = []
    real = steps.weight_grad
    monkeypatch.setattr(steps, "weight_grad", lambda *args: asked.append(args[2].shape) or real(*args))
    x, weight, a, b = (t.requires_grad_(i > 1) for i, t in enumerate(_make(False)(torch.float32, device)))
    ops.lora_linear(x, weight, a, b, backend=backend).sum().backward()
    assert weight.grad is None and x.grad is None
    assert asked == [a.shape, b.shape]


def test_the_weight_may_be_of_another_dtype_and_order(device):
    x, weight, a, b = (t.requires_grad_() for t in _make(False)(torch.float32, device))
    want = ops.lora_linear(x.bfloat16(), weight, a, b)
    other = weight.detach().t().contiguous().t().requires_grad_()
    got = ops.lora_linear(x.bfloat16(), other, a, b)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)
    want.sum().backward()
    got.sum().backward()
    assert other.grad.dtype == torch.float32 and other.grad.stride() == other.stride()
    torch.testing.assert_close(other.grad, weight.grad)


def test_errors():
    x, weight, a, b = torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    with pytest.raises(ValueError, match=r"weight \[D_out, 8\] like x's last dimension, got \[3, 8\] and \[6, 7\]"):
        ops.lora_linear(x, weight[:, :7], a, b)
    with pytest.raises(ValueError, match=r"a must be \[r, 8\] like x's last dimension, got \[8, 2\]"):
        ops.lora_linear(x, weight, a.t(), b)
    with pytest.raises(ValueError, match=r"b must be \[6, 2\] like weight's rows and a's, got \[2, 6\]"):
        ops.lora_linear(x, weight, a, b.t())
    with pytest.raises(ValueError, match=r"bias must be \[6\] like weight's rows, got \[5\]"):
        ops.lora_linear(x, weight, a, b, torch.randn(5))
    with pytest.raises(TypeError, match="lora_linear: weight must be floating point, got torch.int8"):
        ops.lora_linear(x, weight.to(torch.int8), a, b)
