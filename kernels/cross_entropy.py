"""Cross entropy of rows of logits, and its gradient into a new tensor: one program owns a row.

The forward reads each logit once (online softmax, see loss_rows.py) and keeps the maximum and the logarithm of the sum of
exp(x - maximum), from which the backward makes the gradient in one more pass. Ignored rows are not read. Logits without
their last position, [:, :-1], are read where they lie.
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


@triton.jit
def _read_tile(z_ptr, at, first, mask, weight_ptr, state, picked, scale, softcap, MASKED: tl.constexpr, SMOOTHING: tl.constexpr,
               SOFTCAP: tl.constexpr):  # fmt: skip
    """state: the maximum, and per lane the sums of exp(x - maximum) and of w (x - picked) (w: class weights)."""
    peak, sums, total = state
    x = logit(z_ptr + at, mask, scale, softcap, SOFTCAP)
    if SMOOTHING:
        wx = x - picked
        if weight_ptr is not None:
            wx *= tl.load(weight_ptr + (at - first), mask=mask)
        total += tl.where(mask, wx, 0.0) if MASKED else wx
    peak, sums = add_to_softmax(x, mask, peak, sums, MASKED)
    return peak, sums, total


@triton.jit
def _write_tile(z_ptr, dz_ptr, at, first, mask, weight_ptr, row, scale, softcap, SMOOTHING: tl.constexpr,
                SOFTCAP: tl.constexpr):  # fmt: skip
    target, peak, log_sum, share, spread, weight_sum, pull, factor = row
    x, slope = logit_and_slope(z_ptr + at, mask, scale, softcap, SOFTCAP)
    p = tl.exp((x - peak) - log_sum)  # not x - lse: a large lse is rounded, x - peak is not
    g = share * (p - tl.where(at - first == target, 1.0, 0.0))
    if SMOOTHING:
        w = 1.0
        if weight_ptr is not None:
            w = tl.load(weight_ptr + (at - first), mask=mask)
        g += spread * (weight_sum * p - w)
    g += pull * p  # last: it would round away what is left of p - 1
    store_gradient(dz_ptr + at, mask, g, slope, factor, True, scale)


@triton.jit
def _share_of(target, V, smoothing, weight_ptr, weight_sum_ptr):
    """-> whether the target is a class, its index, the weight of its term, and the sum of all class weights."""
    valid = (target >= 0) & (target < V)
    index = tl.where(valid, target, 0)
    share, weight_sum = 1.0 - smoothing, V * 1.0
    if weight_ptr is not None:
        share *= tl.load(weight_ptr + index)
        weight_sum = tl.load(weight_sum_ptr)
    return valid, index, share, weight_sum


@triton.jit(do_not_specialize=["N", "inner_z"])  # one compile, whatever the batch
def _cross_entropy_fwd_kernel(
    z_ptr, target_ptr, weight_ptr, weight_sum_ptr, loss_ptr, statistics_ptr, inner_z, stride_zo, stride_zi, N, V, ignore_index,
    smoothing, z_loss, scale, softcap, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, PEEL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offset, first = row_of(row, inner_z, stride_zo, stride_zi, PEEL)
    z_ptr += offset
    target = tl.load(target_ptr + row)
    loss, peak, log_sum = 0.0, 0.0, 0.0
    if target != ignore_index:
        valid, index, share, weight_sum = _share_of(target, V, smoothing, weight_ptr, weight_sum_ptr)
        picked = logit(z_ptr + first + index, None, scale, softcap, SOFTCAP)
        lane = tl.arange(0, BLOCK_V)
        zeros = tl.zeros((BLOCK_V,), tl.float32)
        state = (tl.full((), LOWEST, tl.float32), zeros, zeros)
        begin: tl.constexpr = BLOCK_V if PEEL else 0
        full, end = ends_of(first, V, PEEL, BLOCK_V)
        if PEEL:
            state = _read_tile(z_ptr, lane, first, (lane >= first) & (lane < end), weight_ptr, state, picked, scale, softcap,
                               True, SMOOTHING, SOFTCAP)  # fmt: skip
        for start in range(begin, full, BLOCK_V):
            state = _read_tile(
                z_ptr, start + lane, first, None, weight_ptr, state, picked, scale, softcap, False, SMOOTHING, SOFTCAP
            )
        if full < end:
            state = _read_tile(z_ptr, full + lane, first, full + lane < end, weight_ptr, state, picked, scale, softcap, True,
                               SMOOTHING, SOFTCAP)  # fmt: skip
        peak, sums, total = state
        log_sum = tl.log(tl.sum(sums, 0))
        lse = peak + log_sum
        # peak - picked first: it is exact where the target is the maximum, and the loss small.
        loss = share * (log_sum + (peak - picked)) + z_loss * lse * lse
        if SMOOTHING:
            even = smoothing / V * (weight_sum * (log_sum + (peak - picked)) - tl.sum(total, 0))
            loss += tl.where(picked > float("-inf"), even, 0.0)  # the loss is infinite already
        loss = tl.where(valid, loss, float("nan"))
    tl.store(loss_ptr + row, loss)
    tl.store(statistics_ptr + row, peak)
    tl.store(statistics_ptr + N + row, log_sum)


@triton.jit(do_not_specialize=["N", "inner_z", "inner_dz"])
def _cross_entropy_bwd_kernel(
    z_ptr, target_ptr, weight_ptr, weight_sum_ptr, factor_ptr, statistics_ptr, dz_ptr, inner_z, stride_zo, stride_zi,
    inner_dz, stride_dzo, stride_dzi, N, V, ignore_index, smoothing, z_loss, scale, softcap,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, PEEL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offset, first = row_of(row, inner_z, stride_zo, stride_zi, PEEL)
    z_ptr += offset
    offset, first = row_of(row, inner_dz, stride_dzo, stride_dzi, PEEL)  # the same distance
    dz_ptr += offset
    lane = tl.arange(0, BLOCK_V)
    begin: tl.constexpr = BLOCK_V if PEEL else 0
    full, end = ends_of(first, V, PEEL, BLOCK_V)
    target = tl.load(target_ptr + row)
    if target != ignore_index:
        _, _, share, weight_sum = _share_of(target, V, smoothing, weight_ptr, weight_sum_ptr)
        peak, log_sum = tl.load(statistics_ptr + row), tl.load(statistics_ptr + N + row)
        factor = tl.load(factor_ptr + row).to(tl.float32)
        of_row = (target, peak, log_sum, share, smoothing / V, weight_sum, 2.0 * z_loss * (peak + log_sum), factor)
        if PEEL:
            _write_tile(z_ptr, dz_ptr, lane, first, (lane >= first) & (lane < end), weight_ptr, of_row, scale, softcap,
                        SMOOTHING, SOFTCAP)  # fmt: skip
        for start in range(begin, full, BLOCK_V):
            _write_tile(
                z_ptr, dz_ptr, start + lane, first, None, weight_ptr, of_row, scale, softcap, SMOOTHING, SOFTCAP
            )
        if full < end:
            _write_tile(z_ptr, dz_ptr, full + lane, first, full + lane < end, weight_ptr, of_row, scale, softcap,
                        SMOOTHING, SOFTCAP)  # fmt: skip
    else:
        zeros = tl.zeros((BLOCK_V,), dz_ptr.dtype.element_ty)
        if PEEL:
            tl.store(dz_ptr + lane, zeros, mask=(lane >= first) & (lane < end))
        for start in range(begin, full, BLOCK_V):
            tl.store(dz_ptr + start + lane, zeros)
        if full < end:
            tl.store(dz_ptr + full + lane, zeros, mask=full + lane < end)


def _launch(kernel, target, weight, outputs, placed, ignore_index, smoothing, z_loss, scale, softcap):
    """placed: the logits, and their gradient if there is one, as at_two_strides returns them."""
    N, V = target.numel(), placed[0][0].shape[-1]
    if N == 0:
        return
    weight = None if weight is None else weight.float().contiguous()
    block = min(4096, triton.next_power_of_2(max(V, 128)))
    kernel[(N,)](
        placed[0][0], target.reshape(-1).contiguous(), weight, None if weight is None else weight.sum(), *outputs,
        *(number for tensor in placed for number in strides(tensor)), N, V,
        ignore_index, smoothing, z_loss, scale, 1.0 if softcap is None else softcap,
        SMOOTHING=smoothing != 0, SOFTCAP=kind_of_softcap(softcap), PEEL=peels(*placed), BLOCK_V=block,
        num_warps=max(4, min(16, block // 512)),
    )  # fmt: skip


def cross_entropy_fwd(input, target, weight, ignore_index, smoothing, z_loss, scale, softcap):
    """-> losses, target's shape, and statistics [2, N], fp32."""
    loss = torch.empty(target.shape, dtype=torch.float32, device=input.device)
    statistics = torch.empty((2, target.numel()), dtype=torch.float32, device=input.device)
    _launch(
        _cross_entropy_fwd_kernel, target, weight, (loss, statistics), [at_two_strides(input)],
        ignore_index, smoothing, z_loss, scale, softcap,
    )  # fmt: skip
    return loss, statistics


def cross_entropy_bwd(dloss, input, target, weight, statistics, ignore_index, smoothing, z_loss, scale, softcap):
    """-> the gradient of the logits in their dtype, as empty_beside lays it out."""
    z = at_two_strides(input)
    dz = empty_beside(z[0])
    _launch(
        _cross_entropy_bwd_kernel, target, weight, (dloss.reshape(-1).contiguous(), statistics, dz), [z, at_two_strides(dz)],
        ignore_index, smoothing, z_loss, scale, softcap,
    )  # fmt: skip
    return dz
