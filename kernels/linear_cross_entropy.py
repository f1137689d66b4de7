"""The loss of one chunk of logits and, in place, its gradient; the loop over chunks is in chunked_loss.py, what is shared with
other losses in loss_rows.py. One program owns a row, reads it twice and writes it once."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import chunked_loss
from .loss_rows import LOWEST, add_to_softmax, kind_of_softcap, logit, logit_and_slope, store_gradient


@triton.jit
def _add_tile(z_ptr, col, mask, inside, weight_ptr, peak, sums, total, picked, scale, softcap, MASKED: tl.constexpr,
              SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    """One tile of the first pass -> the maximum, sums of exp(x - maximum), and of w (x - picked) (w: class weights) per lane."""
    x = logit(z_ptr + col, mask, scale, softcap, SOFTCAP)
    if SMOOTHING:
        wx = x - picked
        if weight_ptr is not None:
            wx *= tl.load(weight_ptr + col, mask=inside)
        total += tl.where(inside, wx, 0.0) if MASKED else wx
    peak, sums = add_to_softmax(x, inside, peak, sums, MASKED)
    return peak, sums, total


@triton.jit
def _write_tile(z_ptr, col, mask, inside, weight_ptr, target, peak, inverse_sum, share, spread, weight_sum, pull, factor, live,
                scale, softcap, WEIGHTS: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    """One tile of the second pass: the gradient over the logits."""
    x, slope = logit_and_slope(z_ptr + col, mask, scale, softcap, SOFTCAP)
    p = tl.exp(x - peak) * inverse_sum  # not exp(x - lse): a large lse is rounded, x - peak is not
    g = p - tl.where(col == target, 1.0, 0.0)
    if WEIGHTS or SMOOTHING:
        g *= share
    if SMOOTHING:
        w = 1.0
        if WEIGHTS:
            w = tl.load(weight_ptr + col, mask=inside)
        g += spread * (weight_sum * p - w)
    g += pull * p  # last: it would round away what is left of p - 1
    store_gradient(z_ptr + col, mask, g, slope, factor, live, scale)


@triton.jit
def _linear_cross_entropy_rows_kernel(
    z_ptr, target_ptr, loss_ptr, factor_ptr, weight_ptr, weight_sum_ptr, stride_z, V, ignore_index, smoothing, z_loss,
    scale, softcap, WITH_GRAD: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * stride_z
    target = tl.load(target_ptr + row)
    live = target != ignore_index
    valid = (target >= 0) & (target < V)
    index = tl.where(valid, target, 0)
    picked = logit(z_ptr + index, None, scale, softcap, SOFTCAP)
    share, weight_sum = 1.0 - smoothing, V * 1.0
    if weight_ptr is not None:
        share *= tl.load(weight_ptr + index)
        weight_sum = tl.load(weight_sum_ptr)
    lane = tl.arange(0, BLOCK_V)
    peak = tl.full((), LOWEST, tl.float32)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    full = V // BLOCK_V * BLOCK_V
    # The last tile is read and written up to the row's padded end, which keeps its accesses wide; padding counts for nothing.
    tail = full + lane
    for start in range(0, full, BLOCK_V):
        peak, sums, total = _add_tile(
            z_ptr, start + lane, None, None, weight_ptr, peak, sums, total, picked, scale, softcap, False, SMOOTHING, SOFTCAP
        )  # fmt: skip
    if full < V:
        peak, sums, total = _add_tile(
            z_ptr, tail, tail < stride_z, tail < V, weight_ptr, peak, sums, total, picked, scale, softcap, True,
            SMOOTHING, SOFTCAP,
        )  # fmt: skip
    sum_exp = tl.sum(sums, 0)
    log_sum = tl.log(sum_exp)
    lse = peak + log_sum
    spread = smoothing / V
    # peak - picked first: it is exact where the target is the maximum, and the loss small.
    loss = share * (log_sum + (peak - picked)) + z_loss * lse * lse
    if SMOOTHING:
        even = spread * (weight_sum * (log_sum + (peak - picked)) - tl.sum(total, 0))
        loss += tl.where(picked > float("-inf"), even, 0.0)  # the loss is infinite already
    loss = tl.where(valid, loss, float("nan"))
    tl.store(loss_ptr + row, tl.where(live, loss, 0.0))
    if WITH_GRAD:
        factor = 1.0
        if factor_ptr is not None:
            factor = tl.load(factor_ptr + row).to(tl.float32)
        inverse_sum, pull = 1.0 / sum_exp, 2.0 * z_loss * lse
        for start in range(0, full, BLOCK_V):
            _write_tile(z_ptr, start + lane, None, None, weight_ptr, target, peak, inverse_sum, share, spread, weight_sum,
                        pull, factor, live, scale, softcap, weight_ptr is not None, SMOOTHING, SOFTCAP)  # fmt: skip
        if full < V:
            _write_tile(z_ptr, tail, tail < stride_z, tail < V, weight_ptr, target, peak, inverse_sum, share, spread,
                        weight_sum, pull, factor, live, scale, softcap, weight_ptr is not None, SMOOTHING,
                        SOFTCAP)  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def _scale_kernel(x_ptr, factor_ptr, y_ptr, n, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr).to(tl.float32)
    if not IN_PLACE or factor != 1.0:  # what loss.backward() asks for needs no pass over the gradients
        if start + BLOCK <= n:  # without a mask: 16-byte accesses
            x = tl.load(x_ptr + start + lane).to(tl.float32)
            tl.store(y_ptr + start + lane, (x * factor).to(y_ptr.dtype.element_ty))
        else:
            x = tl.load(x_ptr + start + lane, mask=start + lane < n).to(tl.float32)
            tl.store(y_ptr + start + lane, (x * factor).to(y_ptr.dtype.element_ty), mask=start + lane < n)


def _rows(logits, target, loss, row_scale, class_weight, class_sum, with_grad, ignore_index, label_smoothing, z_loss, scale,
          softcap):  # fmt: skip
    rows, vocabulary = logits.shape
    block = min(4096, triton.next_power_of_2(max(vocabulary, 128)))
    # A buffer of one row has any stride; its padded width is then unknown.
    stride = logits.stride(0) if rows > 1 else vocabulary
    _linear_cross_entropy_rows_kernel[(rows,)](
        logits, target.contiguous(), loss, row_scale, class_weight, class_sum, stride, vocabulary, ignore_index,
        label_smoothing, z_loss, scale, 1.0 if softcap is None else softcap,
        WITH_GRAD=with_grad, SMOOTHING=label_smoothing != 0, SOFTCAP=kind_of_softcap(softcap), BLOCK_V=block,
        num_warps=max(4, min(16, block // 512)),
    )  # fmt: skip


def _scaled(t, factor):
    y = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    _scale(t.contiguous(), factor, y)
    return y


def _scale(x, factor, y):
    if x.numel():
        grid = (triton.cdiv(x.numel(), 2048),)
        _scale_kernel[grid](x, factor, y, x.numel(), IN_PLACE=x is y, BLOCK=2048, num_warps=4)


def scale_(t, factor):
    """t *= factor (0-d, fp32) for a contiguous t, rounded once; where the factor is 1 nothing is touched."""
    _scale(t, factor, t)


linear_cross_entropy_fwd = functools.partial(chunked_loss.forward, _rows)
linear_cross_entropy_bwd = functools.partial(chunked_loss.backward, _rows, _scaled)
