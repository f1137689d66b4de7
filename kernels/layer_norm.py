"""LayerNorm with an optional fused residual add.

Forward: one program owns BLOCK_M whole rows, read once and kept in registers, so the variance is that of the centred row.
Backward: a fixed number of programs walk over the rows; each adds its part of dweight and dbias in fp32 registers and
writes one partial row of each, so that the number of partials does not grow with M and their sum has a fixed order
(bitwise repeatable, no atomics).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import num_sms, row_tile, rows


@triton.jit(do_not_specialize=["M"])  # one compile, whatever the batch
def _layer_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_rm, M, N, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    live = (row < M)[:, None]
    if not EVEN_N:
        live = live & (col < N)[None, :]
    row64 = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row64 * stride_xm + col[None, :], mask=live, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row64 * stride_rm + col[None, :], mask=live, other=0.0).to(tl.float32)
        stored = x.to(residual_out_ptr.dtype.element_ty)
        tl.store(residual_out_ptr + row64 * N + col[None, :], stored, mask=live)
        x = stored.to(tl.float32)  # normalise what the backward will read
    mean = tl.sum(x, 1) / N
    centred = tl.where(live, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
    tl.store(mean_ptr + row, mean, mask=row < M)
    tl.store(rstd_ptr + row, rstd, mask=row < M)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row64 * N + col[None, :], y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["M"])  # one compile, whatever the batch
def _layer_norm_bwd_kernel(
    dy_ptr, dresidual_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    stride_dym, stride_drm, stride_xm, M, N,
    HAS_WEIGHT: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_N)
    weight = tl.full((BLOCK_N,), 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + col, mask=col < N, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        live = (row < M)[:, None]
        if not EVEN_N:
            live = live & (col < N)[None, :]
        row64 = row.to(tl.int64)[:, None]
        mean = tl.load(mean_ptr + row, mask=row < M, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)[:, None]
        x = tl.load(x_ptr + row64 * stride_xm + col[None, :], mask=live, other=0.0).to(tl.float32)
        xhat = (x - mean) * rstd
        dy = tl.load(dy_ptr + row64 * stride_dym + col[None, :], mask=live, other=0.0).to(tl.float32)
        if NEED_DWEIGHT:
            dweight += dy * xhat
        if NEED_DBIAS:
            dbias += dy
        g = dy * weight[None, :]  # 0 in the columns beyond N, whatever xhat is there
        dx = rstd * (g - (tl.sum(g, 1) / N)[:, None] - xhat * (tl.sum(g * xhat, 1) / N)[:, None])
        if HAS_DRESIDUAL:
            dx += tl.load(dresidual_ptr + row64 * stride_drm + col[None, :], mask=live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row64 * N + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=live)
    partial = tl.program_id(0).to(tl.int64) * N
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + partial + col, tl.sum(dweight, 0), mask=col < N)
    if NEED_DBIAS:
        tl.store(dbias_ptr + partial + col, tl.sum(dbias, 0), mask=col < N)


def layer_norm_fwd(x, weight, bias, residual, eps):
    """-> y [..., N] in x's dtype, residual_out [..., N] in residual's dtype (empty without one), mean, rstd [...] fp32."""
    x2 = rows(x)
    M, N = x2.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = torch.empty(x.shape if residual is not None else 0, dtype=(x if residual is None else residual).dtype,
                               device=x.device)  # fmt: skip
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, residual_out, mean, rstd
    block_m, block_n, num_warps = row_tile(N)
    r2 = x2 if residual is None else rows(residual)
    _layer_norm_fwd_kernel[(triton.cdiv(M, block_m),)](
        x2, x2 if weight is None else weight.contiguous(), x2 if bias is None else bias.contiguous(), r2,
        y, y if residual is None else residual_out, mean, rstd, x2.stride(0), r2.stride(0), M, N, eps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        EVEN_N=block_n == N, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
    )  # fmt: skip
    return y, residual_out, mean, rstd


def layer_norm_bwd(dy, dresidual_out, x, weight, bias, mean, rstd, need_dweight, need_dbias, eps):
    """-> dx [..., N] in x's dtype, dweight [N], dbias [N] in their own dtypes (empty where not needed). eps is in rstd."""
    x2, dy2 = rows(x), rows(dy)
    M, N = x2.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight_dtype, bias_dtype = (x.dtype if t is None else t.dtype for t in (weight, bias))
    if x.numel() == 0:
        return (dx, torch.zeros(N if need_dweight else 0, dtype=weight_dtype, device=x.device),
                torch.zeros(N if need_dbias else 0, dtype=bias_dtype, device=x.device))  # fmt: skip
    block_m, block_n, num_warps = row_tile(N)
    dr2 = dy2 if dresidual_out is None else rows(dresidual_out)
    programs = min(triton.cdiv(M, block_m), 2 * num_sms(x.device))
    dweight = torch.empty((programs if need_dweight else 0, N), dtype=torch.float32, device=x.device)
    dbias = torch.empty((programs if need_dbias else 0, N), dtype=torch.float32, device=x.device)
    _layer_norm_bwd_kernel[(programs,)](
        dy2, dr2, x2, x2 if weight is None else weight.contiguous(), mean, rstd, dx, dweight, dbias,
        dy2.stride(0), dr2.stride(0), x2.stride(0), M, N,
        HAS_WEIGHT=weight is not None, HAS_DRESIDUAL=dresidual_out is not None, NEED_DWEIGHT=need_dweight,
        NEED_DBIAS=need_dbias, EVEN_N=block_n == N, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
    )  # fmt: skip
    nothing = torch.empty(0, dtype=weight_dtype, device=x.device), torch.empty(0, dtype=bias_dtype, device=x.device)
    return (dx, dweight.sum(0).to(weight_dtype) if need_dweight else nothing[0],
            dbias.sum(0).to(bias_dtype) if need_dbias else nothing[1])  # fmt: skip
