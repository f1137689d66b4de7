"""Row statistics of logits and gradients from them, in two kernels: what a loss needs whose statistics are finished outside, over
other rows or other ranks; and the loops over chunks of linear_logprobs (see chunked_loss.py). One program owns a row.

    statistics(logits, target, stats, class_weight, scale, softcap)
        logits [R, V], target [R]; writes stats [5, R] fp32: per row the maximum of x,
        sum exp(x - maximum), sum exp(x - maximum) (x - maximum), sum w (x - maximum) (w: class_weight [V] fp32, None for ones,
        False where the sum is not wanted) and x of the target, 0 if that is not in [0, V).
    gradient(logits, target, factors, class_weight, spread, entropy, ignore_index, scale, softcap)
        overwrites logits by d(loss)/d(logits), d(loss)/dx being hit (p - onehot) + all p - even w - dentropy p (log p + H), or
        0 in ignored rows; factors [7, R] fp32: maximum and log sum exp(x - maximum) over all classes, hit, all, even (read if
        `spread`), dentropy, H (read if `entropy`).
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from . import chunked_loss
from .loss_rows import LOWEST, add_to_moments, kind_of_softcap, logit, logit_and_slope, store_gradient


@triton.jit
def _add_tile(z_ptr, col, mask, inside, weight_ptr, peak, sums, moments, total, pivot, scale, softcap, MASKED: tl.constexpr,
              TOTAL: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    x = logit(z_ptr + col, mask, scale, softcap, SOFTCAP)
    if TOTAL:
        wx = x - pivot
        if weight_ptr is not None:
            wx *= tl.load(weight_ptr + col, mask=inside)
        total += tl.where(inside, wx, 0.0) if MASKED else wx
    peak, sums, moments = add_to_moments(x, inside, peak, sums, moments, MASKED)
    return peak, sums, moments, total


@triton.jit(do_not_specialize=["stride_s"])
def _loss_statistics_kernel(
    z_ptr, target_ptr, stats_ptr, weight_ptr, weight_sum_ptr, stride_z, stride_s, V, scale, softcap, TOTAL: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * stride_z
    index = tl.load(target_ptr + row)
    here = (index >= 0) & (index < V)
    picked = logit(z_ptr + tl.where(here, index, 0), None, scale, softcap, SOFTCAP)
    # What logits share would take the digits of their sum: one of them, the target if it is here, is taken off each.
    pivot = tl.where(picked > float("-inf"), picked, 0.0)
    lane = tl.arange(0, BLOCK_V)
    peak = tl.full((), LOWEST, tl.float32)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    moments = tl.zeros((BLOCK_V,), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    full = V // BLOCK_V * BLOCK_V
    tail = full + lane  # up to the row's padded end, which keeps accesses wide
    for start in range(0, full, BLOCK_V):
        peak, sums, moments, total = _add_tile(z_ptr, start + lane, None, None, weight_ptr, peak, sums, moments, total, pivot,
                                               scale, softcap, False, TOTAL, SOFTCAP)  # fmt: skip
    if full < V:
        peak, sums, moments, total = _add_tile(z_ptr, tail, tail < stride_z, tail < V, weight_ptr, peak, sums, moments,
                                               total, pivot, scale, softcap, True, TOTAL, SOFTCAP)  # fmt: skip
    stats_ptr += row
    tl.store(stats_ptr, peak)
    tl.store(stats_ptr + stride_s, tl.sum(sums, 0))
    tl.store(stats_ptr + 2 * stride_s, tl.sum(moments, 0))
    if TOTAL:
        weight_sum = V * 1.0
        if weight_ptr is not None:
            weight_sum = tl.load(weight_sum_ptr)
        below = tl.sum(total, 0)  # -inf where a class is ruled out
        tl.store(stats_ptr + 3 * stride_s, tl.where(below > float("-inf"), below + weight_sum * (pivot - peak), below))
    else:
        tl.store(stats_ptr + 3 * stride_s, 0.0)
    tl.store(stats_ptr + 4 * stride_s, tl.where(here, picked, 0.0))


@triton.jit
def _write_tile(z_ptr, col, mask, inside, weight_ptr, target, peak, log_sum, hit, everywhere, even, dentropy, height, live,
                scale, softcap, SPREAD: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    x, slope = logit_and_slope(z_ptr + col, mask, scale, softcap, SOFTCAP)
    log_p = (x - peak) - log_sum  # not x - lse: a large lse is rounded, x - peak is not
    p = tl.exp(log_p)
    g = hit * (p - tl.where(col == target, 1.0, 0.0))
    g += everywhere * p  # last: it would round away what is left of p - 1
    if ENTROPY:
        log_p = tl.where(log_p < -1000.0, -1000.0, log_p)  # -inf times its p of 0 would be NaN
        g -= dentropy * (p * (log_p + height))
    if SPREAD:
        w = 1.0
        if weight_ptr is not None:
            w = tl.load(weight_ptr + col, mask=inside)
        g -= even * w
    store_gradient(z_ptr + col, mask, g, slope, 1.0, live, scale)


@triton.jit(do_not_specialize=["stride_f"])
def _loss_gradient_kernel(
    z_ptr, target_ptr, factors_ptr, weight_ptr, stride_z, stride_f, V, ignore_index, scale, softcap,
    SPREAD: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * stride_z
    factors_ptr += row
    target = tl.load(target_ptr + row)
    live = target != ignore_index
    peak = tl.load(factors_ptr)
    log_sum = tl.load(factors_ptr + stride_f)
    hit = tl.load(factors_ptr + 2 * stride_f)
    everywhere = tl.load(factors_ptr + 3 * stride_f)
    even = tl.load(factors_ptr + 4 * stride_f)
    dentropy = tl.load(factors_ptr + 5 * stride_f)
    height = tl.load(factors_ptr + 6 * stride_f)
    lane = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V * BLOCK_V
    tail = full + lane
    for start in range(0, full, BLOCK_V):
        _write_tile(z_ptr, start + lane, None, None, weight_ptr, target, peak, log_sum, hit, everywhere, even, dentropy,
                    height, live, scale, softcap, SPREAD, ENTROPY, SOFTCAP)  # fmt: skip
    if full < V:
        _write_tile(z_ptr, tail, tail < stride_z, tail < V, weight_ptr, target, peak, log_sum, hit, everywhere, even,
                    dentropy, height, live, scale, softcap, SPREAD, ENTROPY, SOFTCAP)  # fmt: skip


def _launch(logits):
    rows, vocabulary = logits.shape
    block = min(4096, triton.next_power_of_2(max(vocabulary, 128)))
    stride = logits.stride(0) if rows > 1 else vocabulary  # that of a single row is not its padded width
    return (rows,), stride, vocabulary, {"BLOCK_V": block, "num_warps": max(4, min(16, block // 512))}


def statistics(logits, target, stats, class_weight, scale, softcap):
    grid, stride, vocabulary, settings = _launch(logits)
    total, class_weight = class_weight is not False, None if class_weight is False else class_weight
    _loss_statistics_kernel[grid](
        logits, target.contiguous(), stats, class_weight, None if class_weight is None else class_weight.sum(), stride,
        stats.stride(0), vocabulary, scale, 1.0 if softcap is None else softcap,
        TOTAL=total, SOFTCAP=kind_of_softcap(softcap), **settings,
    )  # fmt: skip


def gradient(logits, target, factors, class_weight, spread, entropy, ignore_index, scale, softcap):
    grid, stride, vocabulary, settings = _launch(logits)
    _loss_gradient_kernel[grid](
        logits, target.contiguous(), factors, class_weight, stride, factors.stride(0), vocabulary, ignore_index,
        scale, 1.0 if softcap is None else softcap,
        SPREAD=spread, ENTROPY=entropy, SOFTCAP=kind_of_softcap(softcap), **settings,
    )  # fmt: skip


linear_logprobs_fwd = functools.partial(chunked_loss.logprobs_forward, statistics)
linear_logprobs_bwd = functools.partial(chunked_loss.logprobs_backward, gradient)
