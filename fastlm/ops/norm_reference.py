"""The formula of the norms in plain torch, for rms_norm and layer_norm alike, and the dropout before it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops._tensor import compute_dtype
from fastlm.ops.random_bits import philox

_COUNTERS = 1 << 15  # of Philox at a time on the CPU: what it computes with stays in the cache


def kept(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Which elements of x [..., N] dropout keeps: bool, of x's shape.

    Philox 4x32-10 with key seed[0] and counter (column // 4, row, row >> 32, seed[1]), rows counted through; of its four
    words the one of column % 4, kept if it is at least p * 2^32.
    """
    n = x.shape[-1]
    rows, groups = x.numel() // max(n, 1), -(-n // 4)
    threshold = int(p * 2**32)
    group = torch.arange(groups, device=x.device)
    row = torch.arange(rows, device=x.device).unsqueeze(-1)
    step = rows
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        step = max(1, _COUNTERS // max(groups, 1))
    parts = []
    for some in row.split(step) if step < rows else (row,):
        words = philox(seed[0], group, some, some >> 32, seed[1])
        parts.append(torch.stack([word >= threshold for word in words], -1))
    found = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found.flatten(1)[:, :n].reshape(x.shape)


def dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x with its dropped elements 0 and the others times 1 / (1 - p); linear, and its own transpose."""
    return torch.where(kept(x, seed, p), x * (1 / (1 - p)), 0.0)


def normalised(x, weight, bias, eps, weight_offset, rounding, centred):
    """(x - mean) * rstd * (weight_offset + weight) + bias in fp32 (fp64 for fp64); rounding: the dtype to which xhat is
    rounded before it is scaled, or None."""
    dtype = compute_dtype(x)
    xhat = x.to(dtype)
    if centred:
        xhat = xhat - xhat.mean(-1, keepdim=True)
    y = xhat * torch.rsqrt(xhat.pow(2).mean(-1, keepdim=True) + eps)
    if rounding is not None and rounding != dtype:
        y = y.to(rounding).to(dtype)
    if weight is not None:
        y = y * (weight_offset + weight.to(dtype) if weight_offset else weight.to(dtype))
    return y if bias is None else y + bias.to(dtype)


def norm_reference(x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p, *, centred):
    """The reference of both norms: y, or with a residual (y, residual_out)."""
    total, out = x, x.dtype
    if seed is not None:
        total = dropped(x.to(compute_dtype(x)), seed, dropout_p)
    if residual is not None:
        dtype = compute_dtype(residual)
        total = (total.to(dtype) + residual.to(dtype)).to(residual.dtype)
    y = normalised(total, weight, bias, eps, weight_offset, out if llama else None, centred).to(out)
    return y if residual is None else (y, total)
