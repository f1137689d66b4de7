"""The loss of one chunk of logits and, in place, its gradient; the loop over chunks is in chunked_loss.py.

One program owns a row. The first pass keeps a running maximum and, per lane, a running sum that is rescaled when the maximum
grows (online softmax, arXiv:1805.02867); the second writes the gradient over the logits, which by then mostly come from L2.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import chunked_loss


@triton.jit
def _tanh(x):
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2 |x|) <= 1: no overflow
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _logit(z_ptr, mask, softcap, SOFTCAP: tl.constexpr):
    x = tl.load(z_ptr, mask=mask).to(tl.float32)
    return softcap * _tanh(x / softcap) if SOFTCAP else x


@triton.jit
def _add_tile(z_ptr, mask, peak, sums, total, softcap, MASKED: tl.constexpr, SMOOTHING: tl.constexpr,
              SOFTCAP: tl.constexpr):  # fmt: skip
    """One tile of the first pass -> the new maximum, sums of exp(x - maximum) and of x per lane."""
    x = _logit(z_ptr, mask, softcap, SOFTCAP)
    if SMOOTHING:
        total += tl.where(mask, x, 0.0) if MASKED else x
    if MASKED:
        x = tl.where(mask, x, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(x, 0))
    sums = sums * tl.exp(peak - new_peak) + tl.exp(x - new_peak)
    return new_peak, sums, total


@triton.jit
def _write_tile(z_ptr, col, mask, target, peak, inverse_sum, pull, on, off, scale, live, softcap,
                SOFTCAP: tl.constexpr):  # fmt: skip
    """One tile of the second pass: the gradient over the logits."""
    x = _logit(z_ptr + col, mask, softcap, SOFTCAP)
    p = tl.exp(x - peak) * inverse_sum  # not exp(x - lse): a large lse is rounded, x - peak is not
    g = p - tl.where(col == target, on, off)
    g += pull * p  # last: it would round away what is left of p - 1
    if SOFTCAP:
        g *= 1.0 - (x / softcap) * (x / softcap)
    g = tl.where(live, g * scale, 0.0)  # a choice, not a product: an ignored row may hold anything
    tl.store(z_ptr + col, g.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_cross_entropy_rows_kernel(
    z_ptr, target_ptr, loss_ptr, scale_ptr, stride_z, V, ignore_index, smoothing, z_loss, softcap,
    WITH_GRAD: tl.constexpr, HAS_SCALE: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * stride_z
    target = tl.load(target_ptr + row)
    live = target != ignore_index
    valid = (target >= 0) & (target < V)
    picked = tl.load(z_ptr + tl.where(valid, target, 0)).to(tl.float32)
    if SOFTCAP:
        picked = softcap * _tanh(picked / softcap)
    col = tl.arange(0, BLOCK_V)
    peak = tl.full((), -3.0e38, tl.float32)  # finite: a whole tile of -inf must not give inf - inf
    sums = tl.zeros((BLOCK_V,), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    full = V // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):
        peak, sums, total = _add_tile(
            z_ptr + start + col, None, peak, sums, total, softcap, False, SMOOTHING, SOFTCAP
        )  # fmt: skip
    if full < V:
        peak, sums, total = _add_tile(
            z_ptr + full + col, full + col < V, peak, sums, total, softcap, True, SMOOTHING, SOFTCAP
        )  # fmt: skip
    sum_exp = tl.sum(sums, 0)
    log_sum = tl.log(sum_exp)
    lse = peak + log_sum
    # peak - picked first: it is exact where the target is the maximum, and the loss small.
    loss = log_sum + (peak - picked) + z_loss * lse * lse
    if SMOOTHING:
        loss += smoothing * (picked - tl.sum(total, 0) / V)
    loss = tl.where(valid, loss, float("nan"))
    tl.store(loss_ptr + row, tl.where(live, loss, 0.0))
    if WITH_GRAD:
        scale = tl.load(scale_ptr + row).to(tl.float32) if HAS_SCALE else 1.0
        inverse_sum, pull = 1.0 / sum_exp, 2.0 * z_loss * lse
        on, off = 1.0 - smoothing * ((V - 1) / V), smoothing / V
        for start in range(0, full, BLOCK_V):
            _write_tile(z_ptr, start + col, None, target, peak, inverse_sum, pull, on, off,
                        scale, live, softcap, SOFTCAP)  # fmt: skip
        if full < V:
            _write_tile(z_ptr, full + col, full + col < V, target, peak, inverse_sum, pull, on, off,
                        scale, live, softcap, SOFTCAP)  # fmt: skip


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, y_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    col = tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr).to(tl.float32)
    if start + BLOCK <= n:  # without a mask: 16-byte accesses
        x = tl.load(x_ptr + start + col).to(tl.float32)
        tl.store(y_ptr + start + col, (x * factor).to(y_ptr.dtype.element_ty))
    else:
        x = tl.load(x_ptr + start + col, mask=start + col < n).to(tl.float32)
        tl.store(y_ptr + start + col, (x * factor).to(y_ptr.dtype.element_ty), mask=start + col < n)


def _rows(logits, target, loss, row_scale, with_grad, ignore_index, label_smoothing, z_loss, softcap):
    rows, vocabulary = logits.shape
    block = min(4096, triton.next_power_of_2(max(vocabulary, 128)))
    _linear_cross_entropy_rows_kernel[(rows,)](
        logits, target.contiguous(), loss, loss if row_scale is None else row_scale,
        logits.stride(0), vocabulary, ignore_index, label_smoothing, z_loss, 1.0 if softcap is None else softcap,
        WITH_GRAD=with_grad, HAS_SCALE=row_scale is not None, SMOOTHING=label_smoothing != 0, SOFTCAP=softcap is not None,
        BLOCK_V=block, num_warps=max(4, min(16, block // 512)),
    )  # fmt: skip


def _scaled(t, factor):
    y = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    if t.numel():
        t = t.contiguous()
        _scale_kernel[(triton.cdiv(t.numel(), 2048),)](t, factor, y, t.numel(), BLOCK=2048, num_warps=4)
    return y


linear_cross_entropy_fwd = functools.partial(chunked_loss.forward, _rows)
linear_cross_entropy_bwd = functools.partial(chunked_loss.backward, _rows, _scaled)
