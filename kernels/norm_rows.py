"""Normalisation of rows (RMSNorm, LayerNorm) that fit into the registers of one program, forward and backward.

    s = dropout(x) + residual        y = (s - mean) * rstd * (weight_offset + weight) + bias        mean is 0 for RMSNorm

Forward: one program owns BLOCK_M whole rows, read once, so the variance is that of the centred row. Backward: a fixed
number of programs walk over the rows; each adds its part of dweight and dbias in fp32 registers and writes one partial row
of each, so that the number of partials does not grow with M and their sum has a fixed order (bitwise repeatable, no
atomics). Rows that are wider are norm_wide.py's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import row_start


@triton.jit
def kept(seed_ptr, threshold, row, col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements dropout keeps, of rows row [BLOCK_M] and of the BLOCK_N columns from col (a multiple of 4) on.

    Philox counter (column // 4, row, 0, offset), word column % 4: four columns for each call. Rows are below 2^31, so the
    high half of their number, the third part of the counter, is 0.
    """
    seed = tl.load(seed_ptr)
    offset = tl.load(seed_ptr + 1)
    zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.int32)
    c0 = zero + (col // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    c1 = zero + row[:, None]
    c3 = zero + (offset & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, c3)
    bits = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last two axes count 0, 1, 2, 3
    return tl.reshape(bits, (BLOCK_M, BLOCK_N)).to(tl.uint32, bitcast=True) >= tl.cast(threshold, tl.uint32)


@triton.jit(do_not_specialize=["M", "threshold"])  # one compile, whatever the batch
def _norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, seed_ptr, y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
    inner_x, stride_xo, stride_xi, inner_r, stride_ro, stride_ri, M, N, eps, weight_offset, threshold, grown,
    CENTRED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    live = (row < M)[:, None] & (col < N)[None, :]
    out = row.to(tl.int64)[:, None] * N + col[None, :]
    x_row = x_ptr + row_start(row, inner_x, stride_xo, stride_xi)[:, None]
    x = tl.load(x_row + col[None, :], mask=live, other=0.0).to(tl.float32)
    if DROPOUT:
        x = tl.where(kept(seed_ptr, threshold, row, 0, BLOCK_M, BLOCK_N), x * grown, 0.0)
    if HAS_RESIDUAL:
        residual_row = residual_ptr + row_start(row, inner_r, stride_ro, stride_ri)[:, None]
        x += tl.load(residual_row + col[None, :], mask=live, other=0.0).to(tl.float32)
        stored = x.to(residual_out_ptr.dtype.element_ty)
        tl.store(residual_out_ptr + out, stored, mask=live)
        x = stored.to(tl.float32)  # normalise what the backward will read
    if CENTRED:
        mean = tl.sum(x, 1) / N
        tl.store(mean_ptr + row, mean, mask=row < M)
        x = tl.where(live, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / N + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < M)
    y = x * rstd[:, None]
    if ROUND_FIRST:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
    if HAS_WEIGHT:
        y *= (weight_offset + tl.load(weight_ptr + col, mask=col < N, other=0.0).to(tl.float32))[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["M", "threshold"])  # one compile, whatever the batch
def _norm_bwd_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    inner_dy, stride_dyo, stride_dyi, inner_ds, stride_dso, stride_dsi, inner_x, stride_xo, stride_xi,
    M, N, weight_offset, threshold, grown,
    CENTRED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    TWO_OUT: tl.constexpr, DROPOUT: tl.constexpr, NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    RELOAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        live = (row < M)[:, None] & (col < N)[None, :]
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)[:, None]
        x_at = x_ptr + row_start(row, inner_x, stride_xo, stride_xi)[:, None] + col[None, :]
        dy_at = dy_ptr + row_start(row, inner_dy, stride_dyo, stride_dyi)[:, None] + col[None, :]
        x = tl.load(x_at, mask=live, other=0.0, eviction_policy="evict_last" if RELOAD else "").to(tl.float32)
        dy = tl.load(dy_at, mask=live, other=0.0, eviction_policy="evict_last" if RELOAD else "").to(tl.float32)
        if DROPOUT:
            keep = kept(seed_ptr, threshold, row, 0, BLOCK_M, BLOCK_N)
            if not HAS_RESIDUAL:
                x = tl.where(keep, x * grown, 0.0)
        if CENTRED:
            mean = tl.load(mean_ptr + row, mask=row < M, other=0.0)[:, None]
            x -= mean
        xhat = x * rstd
        g = dy
        if HAS_WEIGHT:
            weight = weight_offset + tl.load(weight_ptr + col, mask=col < N, other=0.0).to(tl.float32)
            g = dy * weight[None, :]
        along = (tl.sum(g * xhat, 1) / N)[:, None]
        if CENTRED:
            centre = (tl.sum(g, 1) / N)[:, None]
        if RELOAD:  # the sums cost no registers, and the second reading finds the row in the cache
            x = tl.load(x_at, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
            dy = tl.load(dy_at, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if DROPOUT and not HAS_RESIDUAL:
                x = tl.where(keep, x * grown, 0.0)
            if CENTRED:
                x -= mean
            xhat = x * rstd
            g = dy
            if HAS_WEIGHT:
                again = tl.load(weight_ptr + col, mask=col < N, other=0.0, eviction_policy="evict_last")
                g = dy * (weight_offset + again.to(tl.float32))[None, :]
        if NEED_DWEIGHT:
            dweight += dy * xhat
        if NEED_DBIAS:
            dbias += dy
        if CENTRED:
            g -= centre
        ds = rstd * (g - xhat * along)
        if HAS_DSUM:
            dsum_at = dsum_ptr + row_start(row, inner_ds, stride_dso, stride_dsi)[:, None] + col[None, :]
            ds += tl.load(dsum_at, mask=live, other=0.0).to(tl.float32)
        out = row.to(tl.int64)[:, None] * N + col[None, :]
        if TWO_OUT:
            tl.store(dresidual_ptr + out, ds.to(dresidual_ptr.dtype.element_ty), mask=live)
        if DROPOUT:
            ds = tl.where(keep, ds * grown, 0.0)
        tl.store(dx_ptr + out, ds.to(dx_ptr.dtype.element_ty), mask=live)
    partial = tl.program_id(0).to(tl.int64) * N + col
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=col < N)
    if NEED_DBIAS:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=col < N)
