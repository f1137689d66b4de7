"""Softcaps where tanh is near 1: 1 - tanh^2 has no digits left there, and the slope has all of them."""

import pytest
import torch

from fastlm import ops
from fastlm.ops.softcap import capped

CAP = 30.0
WITH_REFERENCE = pytest.mark.parametrize("backend", ("reference", "torch", "triton"))


def _losses(backend):
    """name -> sum of losses of logits [1, V]; products with the identity change nothing."""
    target = torch.tensor([5])
    options = {"softcap": CAP, "scale": 1.5, "backend": backend}
    eye = lambda z: torch.eye(z.shape[1], dtype=z.dtype, device=z.device)  # noqa: E731
    of_student = {"student_softcap": CAP, "student_scale": 1.5, "backend": backend}
    losses = {
        "cross_entropy": lambda z: ops.cross_entropy(z, target.to(z.device), **options),
        "linear_cross_entropy": lambda z: ops.linear_cross_entropy(z, eye(z), target.to(z.device), **options),
        "linear_logprobs": lambda z: ops.linear_logprobs(z, eye(z), target.to(z.device), **options).logp.sum(),
    }
    for beta in (0.0, 0.5, 1.0):
        losses[f"linear_kl_div {beta}"] = lambda z, beta=beta: ops.linear_kl_div(
            z, eye(z), 0.1 * z.detach(), eye(z), beta=beta, **of_student
        )
    return losses


@WITH_REFERENCE
def test_slopes_of_losses(backend, device):
    """Up to nine softcaps, where they are 6e-8."""
    z = torch.linspace(-6 * CAP, 6 * CAP, 37, device=device)[None]
    exact = _losses("reference")
    for name, loss in _losses(backend).items():
        (got,), (want,) = (
            torch.autograd.grad(fn(x), x)
            for fn, x in ((loss, z.clone().requires_grad_()), (exact[name], z.double().requires_grad_()))
        )
        torch.testing.assert_close(got.double(), want, rtol=3e-5, atol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_slopes_of_attention(backend, device):
    z = torch.linspace(-9, 9, 17)

    def gradients(dtype, backend):
        k = (z.to(device, dtype)[:, None] * torch.full((16,), 5 / 16, dtype=dtype, device=device)).view(1, 17, 1, 16)
        q, k = torch.ones(1, 1, 1, 16, dtype=dtype, device=device).requires_grad_(), k.requires_grad_()
        v = torch.arange(17 * 16, dtype=dtype, device=device).sin().view(1, 17, 1, 16)
        return torch.autograd.grad(ops.attention(q, k, v, softcap=5.0, scale=1.0, backend=backend).sum(), (q, k))

    for got, want in zip(gradients(torch.float32, backend), gradients(torch.float64, "reference")):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=0)


def test_derivatives_of_any_order():
    """At 0, on both sides of the change of formulas, and far out; torch.func and forward mode take the plain formula."""
    z = torch.tensor([0.0, 1e-3, -2, 29.9, -30.1, 200, float("inf")], dtype=torch.float64)
    fn = lambda z: capped(z, CAP)  # noqa: E731
    t = torch.tanh(z / CAP)
    slopes = 1 / torch.cosh(z / CAP).square()
    finite = z[:-1].clone().requires_grad_()
    assert torch.autograd.gradcheck(fn, finite, check_forward_ad=True) and torch.autograd.gradgradcheck(fn, finite)
    first = torch.func.vmap(torch.func.grad(fn))(z)
    torch.testing.assert_close(first, slopes, rtol=1e-12, atol=1e-300)
    third = torch.func.vmap(torch.func.grad(torch.func.grad(torch.func.grad(fn))))(z[:-1])
    torch.testing.assert_close(third, (slopes * (4 * t.square() - 2 * slopes) / CAP**2)[:-1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.func.vmap(fn)(z), CAP * t, rtol=1e-14, atol=0)
