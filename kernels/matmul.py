"""Products by torch's own library (cuBLAS, oneDNN), as ops built around linear layers want them. Plain torch: any device."""

from __future__ import annotations

import math

import torch


def matrix(x):
    """x [..., D] as [N, D]; a view wherever its strides allow."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear(x, weight, bias=None, out=None):
    """x [N, D], weight [F, D] -> x weight^T + bias, [N, F]; all of one dtype."""
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def is_transposed(weight):
    """True for a matrix that lies in memory as the transpose of a contiguous one (GPT-2's Conv1D hands over weight.t())."""
    return weight.stride(0) == 1 and weight.stride(1) > 1


def weight_grad(dy, x, weight, scale=1.0):
    """scale * dy^T x, the gradient of weight [F, D] for dy [N, F] and x [N, D], in weight's dtype and memory order.

    An optimizer keeps gradients in the parameter's order: in any other one they would be copied.
    """
    if is_transposed(weight):
        return _product(x.t(), dy, weight.dtype, scale).t()
    return _product(dy.t(), x, weight.dtype, scale)


def _product(a, b, dtype, scale):
    """scale * a b, rounded once to dtype where the library can."""
    if dtype == torch.float32 and a.dtype.itemsize == 2 and a.device.type == "cuda":  # out_dtype is for 16-bit inputs
        wide = torch.mm(a, b, out_dtype=dtype)
        return wide if scale == 1.0 else wide.mul_(scale)
    if scale == 1.0:
        return torch.mm(a, b).to(dtype)
    out = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    return torch.addmm(out, a, b, beta=0, alpha=scale, out=out).to(dtype)  # beta=0: `out` is not read


def bias_grad(dy, bias):
    """The column sums of dy [N, F], summed in fp32 (torch's order, the same in every run), rounded once to bias's dtype."""
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, bias.dtype)).to(bias.dtype)


def empty_grad(x, t, needed):
    """A tensor as the gradient of t has it (a matrix as `weight_grad` gives it): for shape functions. Without elements if t is
    None (then of x's dtype) or no gradient is needed."""
    dtype = x.dtype if t is None else t.dtype
    if t is None or not needed:
        return torch.empty(0, dtype=dtype, device=x.device)
    if t is not x and t.ndim == 2 and is_transposed(t):
        return torch.empty((t.shape[1], t.shape[0]), dtype=dtype, device=x.device).t()
    return torch.empty(t.shape, dtype=dtype, device=x.device)


def cast(dtype, *tensors):
    """The tensors in `dtype`; None stays None."""
    return [None if t is None else t.to(dtype) for t in tensors]


def why_not_fused(wins, x, gated):
    """The reason to take torch's products for x [..., D] rather than a fused Triton product, or None where that was measured to
    be faster. `wins`: (compute capability's major, gated) -> the fewest and most rows of x."""
    major = torch.cuda.get_device_capability(x.device)[0] if x.device.type == "cuda" else 0
    fewest, most = wins.get((major, gated), (1, 0))
    if fewest <= math.prod(x.shape[:-1]) <= most:
        return None
    return "torch's products are taken where the fused ones were not measured to be faster"
