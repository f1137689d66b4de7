"""A linear layer with a low-rank update as a few products, for every form of it. Plain torch: runs without Triton.

    u = x a^T [N, r];   y = x weight^T + bias + scale * u b^T

The backward has the same shape: v = dy b, dx = dy weight + scale * v a. `product(x, weight, u, b, bias, scale)` is what both
are made of; no form of it makes a second tensor of y's size.
"""

from __future__ import annotations

import torch

from .matmul import bias_grad, cast, empty_grad, linear, matrix, weight_grad, why_not_fused


def library_product(x, weight, u, b, bias, scale):
    """x weight^T + bias + scale * u b^T, by torch's products: the second is added in place."""
    return linear(x, weight, bias).addmm_(u, b.t(), alpha=scale)


def forward(product, x, weight, a, b, bias, scale):
    """-> y [..., D_out] and u [..., r], which the backward needs."""
    lead, rows = x.shape[:-1], matrix(x)
    w, a, b, bias = cast(x.dtype, weight, a, b, bias)
    u = linear(rows, a)
    y = product(rows, w, u, b, bias, scale)
    return y.view(*lead, y.shape[1]), u.view(*lead, u.shape[1])


def backward(product, dy, x, u, weight, a, b, bias, need, scale):
    """-> the gradients of x, weight, a, b and bias; an empty tensor for each whose bit of `need` (1 for x, 2 for weight, ...)
    is 0."""
    need_x, need_weight, need_a, need_b, need_bias = ((need >> i) & 1 for i in range(5))
    grads = [empty_grad(x, t, False) for t in (x, weight, a, b, bias)]
    lead = x.shape[:-1]
    dy, x, u = matrix(dy), matrix(x), matrix(u)
    w, a_cast, b_cast = cast(x.dtype, weight, a, b)
    if need_x or need_a:
        v = torch.mm(dy, b_cast)
    if need_x:
        grads[0] = product(dy, w.t(), v, a_cast.t(), None, scale).view(*lead, x.shape[1])
    if need_weight:
        grads[1] = weight_grad(dy, x, weight)
    if need_a:
        grads[2] = weight_grad(v, x, a, scale)
    if need_b:
        grads[3] = weight_grad(dy, u, b, scale)
    if need_bias:
        grads[4] = bias_grad(dy, bias)
    return tuple(grads)


def lora_linear_fwd(*args):
    """`forward` with torch's products."""
    return forward(library_product, *args)


def lora_linear_bwd(*args):
    """`backward` with torch's products."""
    return backward(library_product, *args)


# Where the product in one pass was measured to be faster than torch's two: (compute capability's major, False) -> the fewest
# and most rows of x. Nothing was measured.
ONE_PASS_WINS: dict[tuple[int, bool], tuple[int, int]] = {}


def why_not_one_pass(x):
    """The reason why `auto` passes over the Triton form for this x, or None where that was measured to be faster."""
    return why_not_fused(ONE_PASS_WINS, x, False)
