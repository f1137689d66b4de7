"""softmax(scale * x + mask) over rows, and its backward from y.

Rows that fit are read once and kept in registers, several short ones by one program. Wider ones are walked over in blocks
of columns: forward first for the running maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867), then again, from
the cache, to write. A mask is read where it lies, at the strides that broadcasting gives it. A row that its mask hides
entirely gives 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import at_two_strides, row_groups
from .norm_rows import row_start

_LOG2E = tl.constexpr(1.4426950408889634)
_NEVER = tl.constexpr(float("-inf"))
_WIDEST_FWD, _WIDEST_BWD = 32768, 16384  # columns that one program keeps in registers; more would spill
_BLOCK = 4096  # columns of a block of the looped kernels


@triton.jit
def _mask_start(row, middle, inner, stride_outer, stride_middle, stride_inner):
    """Where the mask's rows begin, which lie at up to three strides."""
    rest = row // inner
    at = (rest // middle).to(tl.int64) * stride_outer + (rest % middle).to(tl.int64) * stride_middle
    return at + (row % inner).to(tl.int64) * stride_inner


@triton.jit
def _scores(x_at, mask_at, live, scale, MASK: tl.constexpr):
    """scale * x + mask, -inf where there is no element. MASK: 0 none, 1 boolean, 2 additive."""
    s = tl.load(x_at, mask=live, other=0.0).to(tl.float32) * scale
    if MASK == 1:
        live = live & (tl.load(mask_at, mask=live, other=0) != 0)
    if MASK == 2:
        s += tl.load(mask_at, mask=live, other=0.0).to(tl.float32)
    return tl.where(live, s, _NEVER)


@triton.jit
def _exp(difference):
    return tl.exp2(difference * _LOG2E)  # scaled after the subtraction: large scores keep their digits


@triton.jit
def _shift(top, MASK: tl.constexpr):
    """What is subtracted before exp: the maximum, but 0 for a row that its mask hides entirely."""
    if MASK == 0:
        return top
    return tl.where(top == _NEVER, 0.0, top)


@triton.jit
def _share(total, MASK: tl.constexpr):
    if MASK == 0:
        return 1.0 / total
    return 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit(do_not_specialize=["M"])  # one compile, whatever the batch
def _softmax_fwd_kernel(
    x_ptr, mask_ptr, y_ptr, inner_x, stride_xo, stride_xi,
    middle, inner, stride_mo, stride_mm, stride_mi, stride_mn, M, N, scale,
    MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)[None, :]
    live = (row < M)[:, None] & (col < N)
    x_at = x_ptr + row_start(row, inner_x, stride_xo, stride_xi)[:, None] + col
    mask_row = mask_ptr + _mask_start(row, middle, inner, stride_mo, stride_mm, stride_mi)[:, None]
    s = _scores(x_at, mask_row + col.to(tl.int64) * stride_mn, live, scale, MASK)
    if MASK == 0:
        s = tl.where((row < M)[:, None], s, 0.0)  # rows that are not there: no NaN
    e = _exp(s - _shift(tl.max(s, 1), MASK)[:, None])
    y = e * _share(tl.sum(e, 1), MASK)[:, None]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * N + col, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _softmax_wide_fwd_kernel(
    x_ptr, mask_ptr, y_ptr, inner_x, stride_xo, stride_xi,
    middle, inner, stride_mo, stride_mm, stride_mi, stride_mn, N, scale,
    MASK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.arange(0, 1)
    x_row = x_ptr + row_start(row, inner_x, stride_xo, stride_xi)[:, None]
    mask_row = mask_ptr + _mask_start(row, middle, inner, stride_mo, stride_mm, stride_mi)[:, None]
    top = tl.full((1,), _NEVER, tl.float32)
    total = tl.zeros((1,), tl.float32)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        s = _scores(x_row + col, mask_row + col.to(tl.int64) * stride_mn, col < N, scale, MASK)
        higher = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(higher == _NEVER, 0.0, higher)  # nothing seen yet
        total = total * _exp(top - shift) + tl.sum(_exp(s - shift[:, None]), 1)
        top = higher
    share, shift = _share(total, MASK), _shift(top, MASK)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        s = _scores(x_row + col, mask_row + col.to(tl.int64) * stride_mn, col < N, scale, MASK)
        y = _exp(s - shift[:, None]) * share[:, None]
        tl.store(y_ptr + row.to(tl.int64)[:, None] * N + col, y.to(y_ptr.dtype.element_ty), mask=col < N)


@triton.jit(do_not_specialize=["M"])  # one compile, whatever the batch
def _softmax_bwd_kernel(
    dy_ptr, y_ptr, dx_ptr, inner_dy, stride_dyo, stride_dyi, inner_y, stride_yo, stride_yi, M, N, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx = scale * y * (dy - sum(dy * y))."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)[None, :]
    live = (row < M)[:, None] & (col < N)
    dy_at = dy_ptr + row_start(row, inner_dy, stride_dyo, stride_dyi)[:, None] + col
    y_at = y_ptr + row_start(row, inner_y, stride_yo, stride_yi)[:, None] + col
    dy = tl.load(dy_at, mask=live, other=0.0).to(tl.float32)
    y = tl.load(y_at, mask=live, other=0.0).to(tl.float32)
    dx = scale * y * (dy - tl.sum(dy * y, 1)[:, None])
    tl.store(dx_ptr + row.to(tl.int64)[:, None] * N + col, dx.to(dx_ptr.dtype.element_ty), mask=live)


@triton.jit
def _softmax_wide_bwd_kernel(
    dy_ptr, y_ptr, dx_ptr, inner_dy, stride_dyo, stride_dyi, inner_y, stride_yo, stride_yi, N, scale,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.arange(0, 1)
    dy_row = dy_ptr + row_start(row, inner_dy, stride_dyo, stride_dyi)[:, None]
    y_row = y_ptr + row_start(row, inner_y, stride_yo, stride_yi)[:, None]
    dots = tl.zeros((1, BLOCK_N), tl.float32)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        dy = tl.load(dy_row + col, mask=col < N, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dots += dy * tl.load(y_row + col, mask=col < N, other=0.0, eviction_policy="evict_last").to(tl.float32)
    dot = tl.sum(dots, 1)[:, None]
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        dy = tl.load(dy_row + col, mask=col < N, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = tl.load(y_row + col, mask=col < N, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dx = scale * y * (dy - dot)
        tl.store(dx_ptr + row.to(tl.int64)[:, None] * N + col, dx.to(dx_ptr.dtype.element_ty), mask=col < N)


def _tile(n: int) -> dict:
    """Several short rows in a tile of about 2048 elements, 16 a thread; one long row by up to 32 warps."""
    block_n = triton.next_power_of_2(max(n, 16))
    block_m = max(1, 2048 // block_n)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": max(4, min(32, block_m * block_n // 512))}


def _mask_rows(mask, x):
    """The mask as the kernels take it: (tensor, middle, inner, three row strides, column stride)."""
    if mask is None:
        return x, 1, 1, 0, 0, 0, 1
    mask = (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).expand(x.shape)
    groups = row_groups(mask)
    if len(groups) > 3:  # five dimensions that take turns: only then does it grow to x's size
        mask = mask.contiguous()
        groups = row_groups(mask)
    (_, outer), (middle, stride_middle), (inner, stride_inner) = [(1, 0)] * (3 - len(groups)) + groups
    return mask, middle, inner, outer, stride_middle, stride_inner, mask.stride(-1)


def softmax_fwd(x, mask, scale):
    """-> softmax(scale * x + mask) over the last dimension, contiguous, in x's dtype. mask broadcasts to x."""
    N = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    M, kind = x.numel() // N, 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    mask, *mask_rows = _mask_rows(mask, x)
    x, *x_rows = at_two_strides(x)
    if _WIDEST_FWD < N:
        _softmax_wide_fwd_kernel[(M,)](
            x, mask, y, *x_rows, *mask_rows, N, scale, MASK=kind, BLOCK_N=_BLOCK, num_warps=8
        )
    else:
        tile = _tile(N)
        _softmax_fwd_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](
            x, mask, y, *x_rows, *mask_rows, M, N, scale, MASK=kind, **tile
        )
    return y


def softmax_bwd(dy, y, scale):
    """-> dx, contiguous, in y's dtype."""
    N = y.shape[-1]
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if y.numel() == 0:
        return dx
    M = y.numel() // N
    (dy, *dy_rows), (y, *y_rows) = at_two_strides(dy), at_two_strides(y)
    if _WIDEST_BWD < N:
        _softmax_wide_bwd_kernel[(M,)](dy, y, dx, *dy_rows, *y_rows, N, scale, BLOCK_N=_BLOCK, num_warps=8)
    else:
        tile = _tile(N)
        _softmax_bwd_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](dy, y, dx, *dy_rows, *y_rows, M, N, scale, **tile)
    return dx
