"""What the losses have in common at the edges of dtypes and of autograd."""

import pytest
import torch

from fastlm import ops

BACKENDS = ("torch", "triton")
EACH = pytest.mark.parametrize("backend", BACKENDS)
WITH_REFERENCE = pytest.mark.parametrize("backend", ("reference", *BACKENDS))


def _divergences(x, y, backend, **options):
    """The same loss by kl_div and by linear_kl_div, whose products with the identity change nothing."""
    whole = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    yield lambda x: ops.kl_div(x, y, backend=backend, **options)
    yield lambda x: ops.linear_kl_div(x, whole, y, whole, backend=backend, **options)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@EACH
def test_mixtures_of_subnormal_probabilities(backend, beta, device):
    """Halves of the smallest subnormals round to 0."""
    x = torch.tensor([[0.0, -103.9, -103.5, -102.0, -88.0]], device=device).requires_grad_()
    y = torch.tensor([[0.0, -105.0, -104.5, -103.3, -90.0]], device=device)
    for fn in _divergences(x, y, backend, beta=beta):
        loss = fn(x)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.abs() < 1e-30 and gradient.abs().max() < 1e-30, (loss, gradient)
    nothing = torch.full_like(y, float("nan"))
    for fn in _divergences(x, nothing, backend, beta=beta):
        assert fn(x).isnan() and torch.autograd.grad(fn(x), x)[0].isnan().all()


def _linear_losses(hidden, weight, backend, **options):
    """Losses of rows whose target is class 2, and of rows whose teacher is sure of it."""
    target = torch.full(hidden.shape[:-1], 2, device=hidden.device)
    teacher = torch.zeros(weight.shape[0], 1, dtype=hidden.dtype, device=hidden.device)
    teacher[2] = 20
    ones = torch.ones_like(hidden[:, :1])
    yield ops.linear_cross_entropy(hidden, weight, target, z_loss=1e-9, backend=backend, **options)
    yield ops.linear_kl_div(hidden, weight, ones, teacher, backend=backend, **options)


def _like_tokens(backend, device, rows, peak=1.0, share=1.0, logits_bytes=None, far=False, **options):
    """The gradient of `rows` tokens alike, in fp16, against fp64's. peak: every token weight; far: a class is rare."""
    hidden = torch.full((rows, 2), 3.0, device=device).half()
    weight = torch.tensor([[0.1, 0.2], [0.3, 0.1], [-0.2, 0.3], [-1.5, -1.0]], device=device).half()[: 3 + far]
    if peak != 1:
        options["token_weight"] = torch.full((rows,), peak, device=device)
    found = []
    for dtype, name in ((torch.float16, backend), (torch.float64, "reference")):
        w = weight.to(dtype).requires_grad_()
        losses = _linear_losses(hidden.to(dtype), w, name, logits_bytes=logits_bytes, **options)
        found.append([(loss.detach(), *torch.autograd.grad(loss * share, w)) for loss in losses])
    for got, want in zip(*found, strict=True):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.double(), w, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("logits_bytes", [None, 1 << 18])
def test_a_sum_over_like_tokens_stays_in_fp16(logits_bytes, device):
    _like_tokens("torch", device, 100000, logits_bytes=logits_bytes)
    _like_tokens("torch", device, 100000, logits_bytes=logits_bytes, reduction="sum", share=1e-5)


@pytest.mark.parametrize("reduction, share", [("mean", 0.1), ("sum", 1e-5)])
@EACH
def test_large_token_weights_stay_in_fp16(backend, reduction, share, device):
    rows = 4096 if backend == "torch" else 64
    _like_tokens(backend, device, rows, peak=100.0 * 4096 / rows, share=share / 4096 * rows, reduction=reduction)


@EACH
def test_a_large_denominator_costs_no_digits_in_fp16(backend, device):
    """Few rows of a large batch: gradients of 1e-6, times the loss's scale."""
    _like_tokens(backend, device, 8, far=True, denominator=1e6, share=1e5)
    _like_tokens(backend, device, 8, far=True, denominator=torch.tensor(1e6), share=1e5)


@EACH
def test_fp16_without_a_row_that_counts(backend, device):
    """Whatever the weights of the rows that do not count."""
    for rows in (0, 5):
        hidden = torch.ones(rows, 2, device=device).half()
        weight = torch.ones(3, 2, device=device).half().requires_grad_()
        bad = torch.full((rows,), float("nan"), device=device)
        target = torch.full((rows,), -100, device=device)
        losses = (
            ops.linear_cross_entropy(hidden, weight, target, token_weight=bad, z_loss=0.1, backend=backend),
            ops.linear_kl_div(hidden, weight, hidden, weight, mask=target != -100, token_weight=bad, backend=backend),
        )
        for loss in losses:
            assert loss == 0 and not torch.autograd.grad(loss, weight)[0].any()
