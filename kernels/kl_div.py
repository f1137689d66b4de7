"""Divergence of two rows of logits, and its gradient with respect to the first: one program owns a row of each.

With q and p the softmaxes of the student's and the teacher's logits, the first pass gathers maximum and sum of both (online
softmax) and, for the two Kullback-Leibler divergences, their value at once: a running sum of p (log p - log q) is rescaled
as the sums are. A mixture needs a second pass for its value, as its logarithm wants the finished sums. A last pass writes
the gradient. It can begin from stored statistics, which is how the backward of `kl_div` reads each logit once; `linear_kl_div`
has all passes in one launch and writes the gradient over the student's logits. Rows that do not count are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import at_two_strides, empty_beside
from .loss_rows import (
    LOWEST,
    add_to_softmax,
    ends_of,
    kind_of_softcap,
    logit,
    logit_and_slope,
    peels,
    row_of,
    store_gradient,
    strides,
)

FORWARD, REVERSE, MIXTURE = range(3)  # KL(teacher || student), KL(student || teacher), and what lies between
_FORWARD, _REVERSE = tl.constexpr(FORWARD), tl.constexpr(REVERSE)
# Per row: both maxima, the logarithms of both sums of exp(x - maximum), and the mean of what the gradient is the excess of.
STATISTICS = 5


@triton.jit
def _logits(x_ptr, y_ptr, mask, options, X_SOFTCAP: tl.constexpr, Y_SOFTCAP: tl.constexpr):
    """-> both tiles of logits, and the slope of the first's softcap."""
    x_scale, y_scale, x_softcap, y_softcap, _, _ = options
    x, slope = logit_and_slope(x_ptr, mask, x_scale, x_softcap, X_SOFTCAP)
    return x, logit(y_ptr, mask, y_scale, y_softcap, Y_SOFTCAP), slope


@triton.jit
def _add_to_cross(a, b, mask, old_a, new_a, old_b, new_b, b_sums, cross, MASKED: tl.constexpr):
    """cross: per lane, the sum of w ((b - its maximum) - (a - its maximum)) with w = exp(b - its maximum)."""
    shrink = tl.exp(old_b - new_b)
    # What vanishes beside the new maximum goes, even if it was infinite.
    cross = tl.where(shrink > 0, (cross + b_sums * ((new_a - old_a) - (new_b - old_b))) * shrink, 0.0)
    weight = tl.exp(b - new_b)
    if MASKED:
        weight = tl.where(mask, weight, 0.0)
    return cross + tl.where(weight == 0, 0.0, weight * ((b - new_b) - (a - new_a)))  # 0 log 0 = 0; a NaN stays one


@triton.jit
def _add_tile(x_ptr, y_ptr, mask, state, options,
              KIND: tl.constexpr, X_SOFTCAP: tl.constexpr, Y_SOFTCAP: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """One tile of the first pass. state: both maxima, both sums of exp(x - maximum) per lane, and cross (see there)."""
    x_peak, y_peak, x_sums, y_sums, cross = state
    x, y, _ = _logits(x_ptr, y_ptr, mask, options, X_SOFTCAP, Y_SOFTCAP)
    x, y = x * options[4], y * options[4]
    new_x, new_x_sums = add_to_softmax(x, mask, x_peak, x_sums, MASKED)
    new_y, new_y_sums = add_to_softmax(y, mask, y_peak, y_sums, MASKED)
    if KIND == _FORWARD:
        cross = _add_to_cross(x, y, mask, x_peak, new_x, y_peak, new_y, y_sums, cross, MASKED)
    if KIND == _REVERSE:
        cross = _add_to_cross(y, x, mask, y_peak, new_y, x_peak, new_x, x_sums, cross, MASKED)
    return new_x, new_y, new_x_sums, new_y_sums, cross


@triton.jit
def _log_probabilities(x_ptr, y_ptr, mask, row, options, X_SOFTCAP: tl.constexpr, Y_SOFTCAP: tl.constexpr):
    """-> the slope of the student's softcap, log q and log p of one tile. row: the statistics."""
    x, y, slope = _logits(x_ptr, y_ptr, mask, options, X_SOFTCAP, Y_SOFTCAP)
    # The maximum first: a large log-sum-exp is rounded, and a difference from the maximum is not.
    return slope, (x * options[4] - row[0]) - row[2], (y * options[4] - row[1]) - row[3]


@triton.jit
def _log_mixture(q, p, beta):
    """log m. Parts of subnormal probabilities may round to 0 where those do not, and log 0 times them would be infinite."""
    m = beta * p + (1.0 - beta) * q
    return tl.log(tl.maximum(m, 1.1754944e-38, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _value_tile(x_ptr, y_ptr, mask, row, sums, options,
                X_SOFTCAP: tl.constexpr, Y_SOFTCAP: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """One tile of a mixture's value. sums: per lane, those of q (log q - log m) and of p (log p - log m)."""
    beta = options[5]
    _, log_q, log_p = _log_probabilities(x_ptr, y_ptr, mask, row, options, X_SOFTCAP, Y_SOFTCAP)
    q, p = tl.exp(log_q), tl.exp(log_p)
    if MASKED:
        q, p = tl.where(mask, q, 0.0), tl.where(mask, p, 0.0)
    log_m = _log_mixture(q, p, beta)
    of_q = tl.where(q == 0, 0.0, q * (log_q - log_m))
    of_p = tl.where(p == 0, 0.0, p * (log_p - log_m))
    return sums[0] + of_q, sums[1] + of_p


@triton.jit
def _gradient_tile(x_ptr, y_ptr, dx_ptr, mask, row, factor, options,
                   KIND: tl.constexpr, X_SOFTCAP: tl.constexpr, Y_SOFTCAP: tl.constexpr):  # fmt: skip
    slope, log_q, log_p = _log_probabilities(x_ptr, y_ptr, mask, row, options, X_SOFTCAP, Y_SOFTCAP)
    q = tl.exp(log_q)
    if KIND == _FORWARD:
        gradient = q - tl.exp(log_p)
    elif KIND == _REVERSE:
        gradient = tl.where(q == 0, 0.0, q * (log_q - log_p - row[4]))
    else:
        beta = options[5]
        log_m = _log_mixture(q, tl.exp(log_p), beta)
        gradient = tl.where(q == 0, 0.0, (1.0 - beta) * q * (log_q - log_m - row[4]))
    store_gradient(dx_ptr, mask, gradient, slope, factor * options[4], True, options[0])


@triton.jit
def _value(x_ptr, y_ptr, first, begin: tl.constexpr, full, end, options,
           KIND: tl.constexpr, X_SOFTCAP: tl.constexpr, Y_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """All passes but the gradient's -> the row's divergence and its statistics."""
    col = tl.arange(0, BLOCK_V)
    zeros = tl.zeros((BLOCK_V,), tl.float32)
    lowest = tl.full((), LOWEST, tl.float32)
    state = (lowest, lowest, zeros, zeros, zeros)
    if begin > 0:
        mask = (col >= first) & (col < end)
        state = _add_tile(x_ptr + col, y_ptr + col, mask, state, options, KIND, X_SOFTCAP, Y_SOFTCAP, True)
    for start in range(begin, full, BLOCK_V):
        at = start + col
        state = _add_tile(x_ptr + at, y_ptr + at, None, state, options, KIND, X_SOFTCAP, Y_SOFTCAP, False)
    if full < end:
        at = full + col
        state = _add_tile(x_ptr + at, y_ptr + at, at < end, state, options, KIND, X_SOFTCAP, Y_SOFTCAP, True)
    x_peak, y_peak, x_sums, y_sums, cross = state
    x_sum, y_sum = tl.sum(x_sums, 0), tl.sum(y_sums, 0)
    row = (x_peak, y_peak, tl.log(x_sum), tl.log(y_sum))
    if KIND == _FORWARD:
        value = tl.sum(cross, 0) / y_sum + tl.log(x_sum / y_sum)
        return value, (row[0], row[1], row[2], row[3], value)
    elif KIND == _REVERSE:
        value = tl.sum(cross, 0) / x_sum + tl.log(y_sum / x_sum)
        return value, (row[0], row[1], row[2], row[3], value)
    else:
        sums = (zeros, zeros)
        if begin > 0:
            mask = (col >= first) & (col < end)
            sums = _value_tile(x_ptr + col, y_ptr + col, mask, row, sums, options, X_SOFTCAP, Y_SOFTCAP, True)
        for start in range(begin, full, BLOCK_V):
            at = start + col
            sums = _value_tile(x_ptr + at, y_ptr + at, None, row, sums, options, X_SOFTCAP, Y_SOFTCAP, False)
        if full < end:
            at = full + col
            sums = _value_tile(x_ptr + at, y_ptr + at, at < end, row, sums, options, X_SOFTCAP, Y_SOFTCAP, True)
        of_q, of_p, beta = tl.sum(sums[0], 0), tl.sum(sums[1], 0), options[5]
        return beta * of_p + (1.0 - beta) * of_q, (row[0], row[1], row[2], row[3], of_q)


@triton.jit
def _write_zeros(dx_ptr, first, begin: tl.constexpr, full, end, BLOCK_V: tl.constexpr):
    col = tl.arange(0, BLOCK_V)
    zeros = tl.zeros((BLOCK_V,), dx_ptr.dtype.element_ty)
    if begin > 0:
        tl.store(dx_ptr + col, zeros, mask=(col >= first) & (col < end))
    for start in range(begin, full, BLOCK_V):
        tl.store(dx_ptr + start + col, zeros)
    if full < end:
        tl.store(dx_ptr + full + col, zeros, mask=full + col < end)


@triton.jit(do_not_specialize=["N", "inner_x", "inner_y", "inner_dx"])  # one compile, whatever the batch
def _kl_div_rows_kernel(
    x_ptr, y_ptr, mask_ptr, factor_ptr, loss_ptr, statistics_ptr, dx_ptr, inner_x, stride_xo, stride_xi,
    inner_y, stride_yo, stride_yi, inner_dx, stride_dxo, stride_dxi,
    N, V, x_scale, y_scale, x_softcap, y_softcap, inverse_t, beta,
    KIND: tl.constexpr, STORED: tl.constexpr, WITH_GRAD: tl.constexpr,
    X_SOFTCAP: tl.constexpr, Y_SOFTCAP: tl.constexpr, PEEL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    x_start, first = row_of(n, inner_x, stride_xo, stride_xi, PEEL)
    y_start, first = row_of(n, inner_y, stride_yo, stride_yi, PEEL)  # the same distance
    x_ptr, y_ptr = x_ptr + x_start, y_ptr + y_start
    begin: tl.constexpr = BLOCK_V if PEEL else 0
    full, end = ends_of(first, V, PEEL, BLOCK_V)
    options = (x_scale, y_scale, x_softcap, y_softcap, inverse_t, beta)
    factor = 1.0
    if factor_ptr is not None:
        factor = tl.load(factor_ptr + n).to(tl.float32)
    live = True
    if mask_ptr is not None:
        live = tl.load(mask_ptr + n) != 0
    if statistics_ptr is not None:
        statistics_ptr += n
    if live:
        if STORED:
            row = (tl.load(statistics_ptr), tl.load(statistics_ptr + N), tl.load(statistics_ptr + 2 * N),
                   tl.load(statistics_ptr + 3 * N), tl.load(statistics_ptr + 4 * N))  # fmt: skip
        else:
            value, row = _value(x_ptr, y_ptr, first, begin, full, end, options, KIND, X_SOFTCAP, Y_SOFTCAP, BLOCK_V)
            tl.store(loss_ptr + n, value)
        if WITH_GRAD:
            dx_start, first = row_of(n, inner_dx, stride_dxo, stride_dxi, PEEL)
            dx_ptr += dx_start
            col = tl.arange(0, BLOCK_V)
            if PEEL:
                mask = (col >= first) & (col < end)
                _gradient_tile(x_ptr + col, y_ptr + col, dx_ptr + col, mask, row, factor, options,
                               KIND, X_SOFTCAP, Y_SOFTCAP)  # fmt: skip
            for start in range(begin, full, BLOCK_V):
                at = start + col
                _gradient_tile(x_ptr + at, y_ptr + at, dx_ptr + at, None, row, factor, options,
                               KIND, X_SOFTCAP, Y_SOFTCAP)  # fmt: skip
            if full < end:
                at = full + col
                _gradient_tile(x_ptr + at, y_ptr + at, dx_ptr + at, at < end, row, factor, options,
                               KIND, X_SOFTCAP, Y_SOFTCAP)  # fmt: skip
        elif statistics_ptr is not None:
            for i in tl.static_range(5):
                tl.store(statistics_ptr + i * N, row[i])
    else:
        if not STORED:
            tl.store(loss_ptr + n, 0.0)
            if statistics_ptr is not None:
                for i in tl.static_range(5):
                    tl.store(statistics_ptr + i * N, 0.0)
        if WITH_GRAD:
            dx_start, first = row_of(n, inner_dx, stride_dxo, stride_dxi, PEEL)
            _write_zeros(dx_ptr + dx_start, first, begin, full, end, BLOCK_V)


def kind_of(beta):
    return FORWARD if beta == 0 else REVERSE if beta == 1 else MIXTURE


def launch(x, y, mask, factor, loss, statistics, dx, beta, temperature,
           scales=(1.0, 1.0), softcaps=(None, None), stored=False):  # fmt: skip
    """The kernel on logits [..., V]. dx None: no gradient, and the statistics [5, N] are written unless None; else the gradient
    of sum(factor * loss) goes into dx (which may be x, or lies as empty_beside has it), from the statistics if `stored`."""
    N, V = x.shape[:-1].numel(), x.shape[-1]
    if N == 0:
        return
    x, y = at_two_strides(x), at_two_strides(y)
    out = x if dx is None else at_two_strides(dx)
    # A mixture's two loops spilled 8 to 16 bytes at 2048.
    block = min(1024 if kind_of(beta) == MIXTURE else 2048, triton.next_power_of_2(max(V, 128)))
    _kl_div_rows_kernel[(N,)](
        x[0], y[0], mask, factor, loss, statistics, out[0], *strides(x), *strides(y), *strides(out), N, V,
        *scales, *(1.0 if s is None else s for s in softcaps), 1.0 / temperature, beta,
        KIND=kind_of(beta), STORED=stored, WITH_GRAD=dx is not None,
        X_SOFTCAP=kind_of_softcap(softcaps[0]), Y_SOFTCAP=kind_of_softcap(softcaps[1]),
        PEEL=peels(x, y, out), BLOCK_V=block, num_warps=max(4, min(8, block // 256)),
    )  # fmt: skip


def flat_mask(mask):
    return mask if mask is None else mask.reshape(-1).contiguous().view(torch.uint8)


def kl_div_fwd(student, teacher, mask, beta, temperature):
    """-> losses [...] and statistics [5, N], fp32."""
    loss = torch.empty(student.shape[:-1], dtype=torch.float32, device=student.device)
    statistics = torch.empty((STATISTICS, loss.numel()), dtype=torch.float32, device=student.device)
    launch(student, teacher, flat_mask(mask), None, loss, statistics, None, beta, temperature)
    return loss, statistics


def kl_div_bwd(dloss, student, teacher, mask, statistics, beta, temperature):
    """-> the gradient of the student's logits in their dtype, as empty_beside lays it out."""
    x = at_two_strides(student)[0]
    dx, factor = empty_beside(x), dloss.reshape(-1).contiguous()
    launch(x, teacher, flat_mask(mask), factor, factor, statistics, dx, beta, temperature, stored=True)
    return dx
