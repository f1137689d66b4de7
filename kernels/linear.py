"""The gradients of a linear layer as torch's products. Plain torch: runs without Triton."""

from __future__ import annotations

import torch

from .matmul import bias_grad, empty_grad, matrix, weight_grad


def linear_bwd(dy, x, weight, bias, need):
    """-> the gradients of x, weight and bias, for y = x weight^T + bias, all of one dtype; an empty tensor for each whose bit of
    `need` (1, 2, 4) is 0."""
    grads = [empty_grad(x, t, False) for t in (x, weight, bias)]
    rows = matrix(dy)
    if need & 1:
        grads[0] = torch.mm(rows, weight).view(x.shape)
    if need & 2:
        grads[1] = weight_grad(rows, matrix(x), weight)
    if need & 4:
        grads[2] = bias_grad(rows, bias)
    return tuple(grads)
