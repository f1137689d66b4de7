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
