"""lora_linear: the contract, the accuracy, what it saves and allocates."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import ops
from fastlm.kernels import lora_linear as steps
from fastlm.testing import (
    Case,
    check_accuracy,
    check_autocast,
    check_guards,
    check_op,
    check_reference,
    check_safety,
    check_strides,
    check_transforms,
    planted_bug,
)

BACKENDS = ("torch", "triton")
lora_module = sys.modules["fastlm.ops.lora_linear"]  # the name fastlm.ops.lora_linear is the function's


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch):
    monkeypatch.setattr(lora_module, "_SMALL", 0)


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


def test_small_calls_on_the_cpu(monkeypatch):
    monkeypatch.setattr(lora_module, "_SMALL", 1 << 16)
    for check in (check_safety, check_guards, check_strides, check_autocast, check_transforms):
        check(CASES["bias"], "torch", "cpu")  # derivatives of any order are torch's own
    for dtype in (torch.float32, torch.bfloat16):
        check_accuracy(CASES["bias"], "torch", dtype, "cpu")


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_are_x_and_the_low_rank_product(backend, device):
    args = tuple(t.requires_grad_() for t in _make(True)(torch.float32, device))
    saved, own = {}, {t.untyped_storage().data_ptr() for t in args[1:]}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.lora_linear(*args, backend=backend)
    x, rank = args[0], args[2].shape[0]
    assert sum(saved.values()) == x.nbytes + x.shape[0] * x.shape[1] * rank * 4


class _Count(TorchDispatchMode):
    """Storages of all tensors of a given number of elements that operators return."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.alive = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.alive += [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if t.numel() == self.numel]
        return out

    def made(self):
        return {t.untyped_storage().data_ptr() for t in self.alive}


def test_no_second_tensor_of_the_outputs_size(device):
    # D = D_out is the widest here, so a temporary of x's, y's or dx's size would be counted.
    x, weight, a, b = (
        t.requires_grad_(i != 1) for i, t in enumerate(_make(False, (20, 24, 24, 2))(torch.float32, device))
    )
    forward, backward = _Count(x.numel()), _Count(x.numel())
    with forward:
        y, u = steps.lora_linear_fwd(x.detach(), weight, a.detach(), b.detach(), None, 2.0)
    assert forward.made() - {x.untyped_storage().data_ptr()} == {y.untyped_storage().data_ptr()}
    dy = torch.randn_like(y)
    with backward:
        dx = steps.lora_linear_bwd(dy, x.detach(), u, weight, a.detach(), b.detach(), None, 0b01101, 2.0)[0]
    known = {t.untyped_storage().data_ptr() for t in (x, dy)}
    assert backward.made() - known == {dx.untyped_storage().data_ptr()}


@pytest.mark.parametrize("sizes", [(20, 40, 33, 17), (1, 1, 1, 1), (16, 32, 64, 16)], ids=str)
def test_several_tiles_and_single_elements(sizes, device):
    check_accuracy(CASES["bias"], "triton", torch.float32, device, _make(True, sizes)(torch.float32, device))


BUGS = {
    "scale": ("lora_product", "    acc *= scale\n", ""),
    "scale_of_all": ("lora_product", "    if bias_ptr is not None:", "    acc *= scale\n    if bias_ptr is not None:"),
    "rank_tail": ("products", "k[:, None] < K - start", "k[:, None] < K - start - 1"),
    "column_tail": ("lora_product", "& (col < N)[None, :]", "& (col < N - 1)[None, :]"),
    "stride": ("lora_product", "u.stride(0), *b.stride()[::-1]", "u.stride(0), *b.stride()"),
    "scale_of_da": ("lora_linear", "weight_grad(v, x, a, scale)", "weight_grad(v, x, a)"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(bug, device):
    file, old, new = BUGS[bug]
    case = CASES["bias"]
    wrong = pytest.raises(AssertionError, match="max error|unwritten|NaN or inf")
    with planted_bug("lora_linear", old, new, file=file), wrong:
        check_accuracy(case, "triton", torch.float32, device)
        check_guards(case, "triton", device)  # an unwritten element may by chance hold what was right


@pytest.mark.parametrize("small", [0, 1 << 16])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("other", [1, 2, 3, 4], ids=["weight", "a", "b", "bias"])
def test_one_tensor_of_another_dtype(other, grad, small, monkeypatch):
    monkeypatch.setattr(lora_module, "_SMALL", small)
    args = [t.bfloat16() for t in _make(True)(torch.float32, "cpu")]
    mixed = [t.float() if i == other else t for i, t in enumerate(args)]
    with torch.set_grad_enabled(grad):
        mixed = [t.requires_grad_(grad) for t in mixed]
        y = ops.lora_linear(*mixed, backend="torch")
        assert torch.equal(y, ops.lora_linear(*args, backend="torch"))
    if grad:
        y.sum().backward()
        assert [t.grad.dtype for t in mixed] == [t.dtype for t in mixed]
