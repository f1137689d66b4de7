"""The softcap of scores and logits in plain torch, with derivatives that keep their digits.

tanh's own derivative in torch is 1 - tanh^2, of which little is left where tanh is near 1: at 9 softcaps nothing in fp32.
With e = exp(-2 |u|) it is 4 e / (1 + e)^2, good to rounding everywhere. The kernels' form is kernels/common.py's tanh_and_slope.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops._tensor import is_dual, is_eager


def capped(z: Tensor, softcap: float) -> Tensor:
    """softcap tanh(z / softcap), a new tensor."""
    if not is_eager() or is_dual():
        return _formula(z, softcap)
    if z.requires_grad and torch.is_grad_enabled():
        return _Capped.apply(z, softcap)
    return _plain(z, softcap)


def slope(u: Tensor) -> Tensor:
    """The derivative of tanh at u, a new tensor."""
    e = u.abs().mul_(-2).exp_()
    return e.div_((e + 1).square_()).mul_(4)


def _plain(z, softcap):
    return softcap * torch.tanh(z / softcap)


def _formula(z, softcap):
    """For derivatives of any order and whatever transforms or records; five times the time of a tanh and its derivative."""
    u = z / softcap
    size = torch.where(u < 0, -u, u)  # not abs, whose derivative at 0 is 0
    e = torch.exp(-2 * size)
    far = (1 - e) / (1 + e)
    return softcap * torch.where(size < 1, torch.tanh(u), torch.where(u < 0, -far, far))


class _Capped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, softcap):
        ctx.save_for_backward(z)
        ctx.softcap = softcap
        return _plain(z, softcap)

    @staticmethod
    def backward(ctx, gradient):
        (z,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            (found,) = torch.autograd.grad(_formula(z, ctx.softcap), z, gradient, create_graph=True)
            return found, None
        return slope(z / ctx.softcap) * gradient, None
