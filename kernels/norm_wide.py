"""Normalisation of rows too wide for one program's registers: each program walks over blocks of columns.

Forward: one program per row reads it twice, first for its statistics (the mean and the squares about it are merged block by
block, Chan, Golub and LeVeque 1983), then, from the cache, to write y. Backward in two kernels: the first finds the two sums
over each row; the second owns columns, walks over rows and writes dx, with dweight and dbias in registers as it goes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import row_start
from .norm_rows import kept


@triton.jit(do_not_specialize=["threshold"])
def _norm_wide_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, seed_ptr, y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
    inner_x, stride_xo, stride_xi, inner_r, stride_ro, stride_ri, N, eps, weight_offset, threshold, grown,
    CENTRED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.arange(0, 1)
    x_row = x_ptr + row_start(row, inner_x, stride_xo, stride_xi)[:, None]
    residual_row = residual_ptr + row_start(row, inner_r, stride_ro, stride_ri)[:, None]
    out = row.to(tl.int64)[:, None] * N
    mean = tl.zeros((1,), tl.float32)
    squares = tl.zeros((1,), tl.float32)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        live = col < N
        x = tl.load(x_row + col, mask=live, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if DROPOUT:
            x = tl.where(kept(seed_ptr, threshold, row, start, 1, BLOCK_N), x * grown, 0.0)
        if HAS_RESIDUAL:
            x += tl.load(residual_row + col, mask=live, other=0.0).to(tl.float32)
            stored = x.to(residual_out_ptr.dtype.element_ty)
            tl.store(residual_out_ptr + out + col, stored, mask=live)
            x = stored.to(tl.float32)  # normalise what the backward will read
        if CENTRED:
            count = tl.minimum(N - start, BLOCK_N).to(tl.float32)
            here = tl.sum(x, 1) / count
            x = tl.where(live, x - here[:, None], 0.0)
            squares += (here - mean) * (here - mean) * (count * start / (start + count))
            mean += (here - mean) * (count / (start + count))
        squares += tl.sum(x * x, 1)
    rstd = tl.rsqrt(squares / N + eps)
    tl.store(rstd_ptr + row, rstd)
    if CENTRED:
        tl.store(mean_ptr + row, mean)
    if HAS_RESIDUAL:
        tl.debug_barrier()  # a thread may read what another has stored
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        live = col < N
        if HAS_RESIDUAL:
            x = tl.load(residual_out_ptr + out + col, mask=live, other=0.0).to(tl.float32)
        else:
            x = tl.load(x_row + col, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if DROPOUT:
                x = tl.where(kept(seed_ptr, threshold, row, start, 1, BLOCK_N), x * grown, 0.0)
        y = (x - mean[:, None]) * rstd[:, None]
        if ROUND_FIRST:
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        if HAS_WEIGHT:
            y *= weight_offset + tl.load(weight_ptr + col, mask=live, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + col, mask=live, other=0.0).to(tl.float32)
        tl.store(y_ptr + out + col, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["threshold"])
def _norm_wide_sums_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, centre_ptr, along_ptr,
    inner_dy, stride_dyo, stride_dyi, inner_x, stride_xo, stride_xi, N, weight_offset, threshold, grown,
    CENTRED: tl.constexpr, HAS_WEIGHT: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The means over a row of g = dy * (weight_offset + weight) and of g * xhat. DROPOUT: of x, which is not a sum."""
    row = tl.program_id(0) + tl.arange(0, 1)
    x_row = x_ptr + row_start(row, inner_x, stride_xo, stride_xi)[:, None]
    dy_row = dy_ptr + row_start(row, inner_dy, stride_dyo, stride_dyi)[:, None]
    rstd = tl.load(rstd_ptr + row)[:, None]
    mean = tl.load(mean_ptr + row)[:, None] if CENTRED else tl.zeros((1, 1), tl.float32)
    centre = tl.zeros((1, BLOCK_N), tl.float32)
    along = tl.zeros((1, BLOCK_N), tl.float32)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        live = col < N
        x = tl.load(x_row + col, mask=live, other=0.0).to(tl.float32)
        g = tl.load(dy_row + col, mask=live, other=0.0).to(tl.float32)
        if DROPOUT:
            x = tl.where(kept(seed_ptr, threshold, row, start, 1, BLOCK_N), x * grown, 0.0)
        if HAS_WEIGHT:
            g *= weight_offset + tl.load(weight_ptr + col, mask=live, other=0.0).to(tl.float32)
        if CENTRED:
            centre += g
        along += g * ((x - mean) * rstd)
    tl.store(along_ptr + row, tl.sum(along, 1) / N)
    if CENTRED:
        tl.store(centre_ptr + row, tl.sum(centre, 1) / N)


@triton.jit(do_not_specialize=["M", "threshold"])
def _norm_wide_bwd_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, centre_ptr, along_ptr, seed_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    inner_dy, stride_dyo, stride_dyi, inner_ds, stride_dso, stride_dsi, inner_x, stride_xo, stride_xi,
    M, N, weight_offset, threshold, grown,
    CENTRED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    TWO_OUT: tl.constexpr, DROPOUT: tl.constexpr, NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK_N
    col = start + tl.arange(0, BLOCK_N)[None, :]
    inside = col < N
    weight = tl.full((1, BLOCK_N), 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = weight_offset + tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(M, BLOCK_M), tl.num_programs(1)):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        live = (row < M)[:, None] & inside
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)[:, None]
        along = tl.load(along_ptr + row, mask=row < M, other=0.0)[:, None]
        x_row = x_ptr + row_start(row, inner_x, stride_xo, stride_xi)[:, None]
        dy_row = dy_ptr + row_start(row, inner_dy, stride_dyo, stride_dyi)[:, None]
        x = tl.load(x_row + col, mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_row + col, mask=live, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = kept(seed_ptr, threshold, row, start, BLOCK_M, BLOCK_N)
            if not HAS_RESIDUAL:
                x = tl.where(keep, x * grown, 0.0)
        g = dy * weight
        if CENTRED:
            x -= tl.load(mean_ptr + row, mask=row < M, other=0.0)[:, None]
            g -= tl.load(centre_ptr + row, mask=row < M, other=0.0)[:, None]
        xhat = x * rstd
        if NEED_DWEIGHT:
            dweight += dy * xhat
        if NEED_DBIAS:
            dbias += dy
        ds = rstd * (g - xhat * along)
        if HAS_DSUM:
            dsum_row = dsum_ptr + row_start(row, inner_ds, stride_dso, stride_dsi)[:, None]
            ds += tl.load(dsum_row + col, mask=live, other=0.0).to(tl.float32)
        out = row.to(tl.int64)[:, None] * N + col
        if TWO_OUT:
            tl.store(dresidual_ptr + out, ds.to(dresidual_ptr.dtype.element_ty), mask=live)
        if DROPOUT:
            ds = tl.where(keep, ds * grown, 0.0)
        tl.store(dx_ptr + out, ds.to(dx_ptr.dtype.element_ty), mask=live)
    partial = tl.program_id(1).to(tl.int64) * N + start + tl.arange(0, BLOCK_N)
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=start + tl.arange(0, BLOCK_N) < N)
    if NEED_DBIAS:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=start + tl.arange(0, BLOCK_N) < N)
