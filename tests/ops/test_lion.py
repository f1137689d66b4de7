"""lion_ against the paper. Its modes are in test_optimizer_modes.py, its contract in test_optimizer_contract.py."""

import math

import pytest
import torch

from fastlm import ops
from fastlm.testing import assert_accurate, planted_bug
from tests.ops.optimizer_cases import BACKENDS, SHAPES

each_backend = pytest.mark.parametrize("backend", BACKENDS)
OPTIONS = {"lr": 0.05, "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.3}


def _lists(device, dtype=torch.float32, state_dtype=None):
    make = lambda d: [torch.randn(s, dtype=torch.float64).to(d).to(device) for s in SHAPES]  # noqa: E731
    return make(dtype), make(dtype), make(state_dtype or dtype)


def _steps(lists, backend, steps=3, **options):
    params, grads, m = ([t.clone() for t in tensors] for tensors in lists)
    for step in range(1, steps + 1):
        scaled = [(g * (1 + step % 2)).to(g.dtype) for g in grads]
        assert ops.lion_(params, scaled, m, backend=backend, **(OPTIONS | options)) is None
    return params + m


def _published(lists, steps=3, grad_scale=1.0):
    """Algorithm 2 of arXiv:2302.06675, line by line, in the dtype of the lists."""
    params, grads, m = ([t.clone() for t in tensors] for tensors in lists)
    eta, beta1, beta2, decay = (OPTIONS[k] for k in ("lr", "beta1", "beta2", "weight_decay"))
    for step in range(1, steps + 1):
        for i in range(len(params)):
            g = grads[i] * ((1 + step % 2) * grad_scale)
            c = m[i] * beta1 + g * (1 - beta1)
            params[i] = params[i] - eta * (torch.sign(c) + decay * params[i])
            m[i] = m[i] * beta2 + g * (1 - beta2)
    return params + m


def _check(backend, device):
    lists = _lists(device)
    exact = _published([[t.double() for t in tensors] for tensors in lists], grad_scale=0.5)
    for a, b in zip(_steps(lists, backend, grad_scale=0.5), exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


@each_backend
def test_follows_the_paper(backend, device):
    _check(backend, device)


@each_backend
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16, torch.float32)], ids=str
)
def test_accuracy(backend, dtypes, device):
    """One step in 16 bits: after it signs of what was rounded differ."""
    lists = _lists(device, *dtypes)
    exact = _published([[t.double() for t in tensors] for tensors in lists], 1)
    plain = [
        t.to(d)
        for t, d in zip(
            _published([[t.float() for t in tensors] for tensors in lists], 1), [dtypes[0]] * 3 + [dtypes[1]] * 3
        )
    ]
    for g, e, p in zip(_steps(lists, backend, 1), exact, plain):
        assert_accurate(g, e, p, f"lion_ {backend} {dtypes}")


def test_fp64_follows_the_paper():
    lists = _lists("cpu", torch.float64)
    for backend in ("reference", "torch"):
        for a, b in zip(_steps(lists, backend), _published(lists)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each_backend
def test_no_gradient_is_no_step_and_nan_is_seen(backend, device):
    p, m = torch.ones(4, device=device), torch.zeros(4, device=device)
    ops.lion_([p], [torch.zeros(4, device=device)], [m], lr=0.1, backend=backend)
    assert (p == 1).all() and (m == 0).all()
    ops.lion_([p], [torch.tensor([1.0, float("nan"), 0.0, -1.0], device=device)], [m], lr=0.1, backend=backend)
    torch.testing.assert_close(p, torch.tensor([0.9, float("nan"), 1.0, 1.1], device=device), equal_nan=True)


@each_backend
def test_numbers_may_be_tensors(backend, device):
    params, grads, m = _lists(device)
    two = [[[t.clone() for t in tensors] for tensors in (params, m)] for _ in range(2)]
    ops.lion_(two[0][0], grads, two[0][1], lr=0.05, grad_scale=0.5, weight_decay=0.1, backend=backend)
    lr, scale = (torch.tensor(n, device=device) for n in (0.05, 0.5))
    if (
        backend == "triton"
    ):  # as the kernel takes them from the device, which on the CPU happens under torch.compile only
        from fastlm.ops.lion import OP

        OP.forward(two[1][0], grads, two[1][1], *[[]] * 4, lr, None, scale, None, None, [],
                   0.0, 1.0, 0.0, 0.0, 0.9, 0.99, 0.1, backend)  # fmt: skip
    else:
        ops.lion_(two[1][0], grads, two[1][1], lr=lr, grad_scale=scale, weight_decay=0.1, backend=backend)
    for a, b in zip(two[0][0] + two[0][1], two[1][0] + two[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@each_backend
def test_an_infinite_moment_keeps_its_sign(backend, device):
    p, g = torch.zeros(4, device=device), torch.tensor([1.0, 1.0, -math.inf, 1.0], device=device)
    m = torch.tensor([math.inf, -math.inf, math.inf, 0.0], device=device)
    ops.lion_([p], [g], [m], lr=0.5, backend=backend)
    inf, nan = math.inf, math.nan
    torch.testing.assert_close(p.cpu(), torch.tensor([-0.5, 0.5, nan, -0.5]), equal_nan=True)
    torch.testing.assert_close(m.cpu(), torch.tensor([inf, -inf, nan, 0.01]), equal_nan=True)


@each_backend
def test_betas_of_zero_forget(backend, device):
    """A large moment leaves no rounding of its own in what is much smaller."""
    p, g, m = (torch.full((3,), x, device=device) for x in (0.0, -1e-3, 1e5))
    ops.lion_([p], [g], [m], lr=0.5, beta1=0.0, beta2=0.0, backend=backend)
    assert (p == 0.5).all() and torch.equal(m, g)


@pytest.mark.parametrize(
    "old, new",
    [
        ("high1, low1, rest1, g)", "high2, low2, rest2, g)"),  # the sign of the new m instead of the interpolation
        ("high2, low2, rest2, g)", "high1, low1, rest1, g)"),
        ("p -= decay * p", "p -= 0.0"),
        ("tl.where(c < 0, -1.0, c)", "1.0"),
        ("(tl.float32) * scale", "(tl.float32)"),
    ],
    ids=["beta1", "beta2", "decay", "sign", "scale"],
)
def test_planted_bug_is_seen(old, new, device):
    with planted_bug("lion_", old, new), pytest.raises(AssertionError):
        _check("triton", device)


def test_explain_and_errors():
    p, g = [torch.randn(3, 4)], [torch.randn(3, 4)]
    assert ops.explain(ops.lion_, p, g, g, lr=0.1).backend == "torch"
    with pytest.raises(ValueError, match=r"lion_: beta1 must be in \[0, 1\), got 1.0"):
        ops.lion_(p, g, g, lr=0.1, beta1=1.0)
    with pytest.raises(ValueError, match="lion_: seed needs step"):
        ops.lion_(p, g, g, lr=0.1, seed=3)
    with pytest.raises(ValueError, match="params, grads, exp_avgs must be equally long"):
        ops.lion_(p, g, [], lr=0.1)
