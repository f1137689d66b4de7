"""Newton-Schulz iteration of Muon for a batch of matrices: X <- a X + (b A + c A A) X with A = X X^T, three launches a step.

A and b A + c A A are symmetric: of their tiles only those on and above the diagonal are computed, and each is stored twice,
which saves close to half of the arithmetic of two of the three products. The polynomial and a X are added in fp32 where the
products are summed. The working matrices are rounded up to whole tiles and filled with zeros, which stay zeros: no load
and no store but the last one needs a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_common import dot_precision, generation
from .products import GROUP, add_product, tile_of_grid

# BLOCK, BLOCK_K, num_warps, num_stages of the symmetric products and BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages of the last
# one, by generation: the largest tiles that do not spill (benchmarks/ops/bench_newton_schulz.py); no GPU has timed them.
_SYMMETRIC = {80: (128, 32, 8, 4), 90: (128, 64, 8, 4), 100: (128, 64, 8, 4)}
_UPDATE = {80: (128, 128, 32, 8, 4), 90: (128, 256, 64, 8, 3), 100: (128, 128, 64, 8, 4)}
_SMALL = (64, 32, 4, 4), (64, 64, 64, 4, 3)  # at most 64 rows or columns
_FP32 = (64, 16, 8, 4), (64, 64, 16, 8, 4)


@triton.jit
def _symmetric_kernel(
    x_ptr, z_ptr, y_ptr, stride_xb, stride_xm, size, K, alpha, beta,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = alpha x x^T + beta z for x [size, K]; z and y symmetric [size, size], z None for 0. A program: one tile and its mirror.

    The tiles on and above the diagonal are filled into rows of T = size / BLOCK: the r-th has the T - r tiles of row r of the
    matrix and, before them, the r tiles of row T - r.
    """
    tiles = size // BLOCK
    r = tl.program_id(0) // tiles
    c = tl.program_id(0) % tiles
    i = tl.where(c >= r, r, tiles - r)
    j = tl.where(c >= r, c, tiles - 1 - c)
    batch = tl.program_id(1).to(tl.int64)
    row = i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    col = j.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x_ptr += batch * stride_xb
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    acc = add_product(acc, x_ptr, x_ptr, row, col, stride_xm, 1, stride_xm, K, EVEN_K, BLOCK_K, PRECISION)
    acc *= alpha
    size = size.to(tl.int64)
    here = batch * size * size + row[:, None] * size + col[None, :]
    if z_ptr is not None:
        acc += beta * tl.load(z_ptr + here).to(tl.float32)
    value = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + here, value)
    if i != j:
        tl.store(y_ptr + batch * size * size + col[None, :] * size + row[:, None], value)


@triton.jit
def _update_kernel(
    x_ptr, b_ptr, y_ptr, stride_xb, stride_xm, stride_bb, stride_bm, stride_yb, stride_ym, stride_yn, M, N, K, a,
    WHOLE: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = a x + b x for b [M, K] and x [K, N]. WHOLE: y has whole tiles too."""
    row, col = tile_of_grid(M, N, BLOCK_M, BLOCK_N, GROUP)
    batch = tl.program_id(1).to(tl.int64)
    x_ptr += batch * stride_xb
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = add_product(
        acc, b_ptr + batch * stride_bb, x_ptr, row, col, stride_bm, stride_xm, 1, K, EVEN_K, BLOCK_K, PRECISION
    )
    acc += a * tl.load(x_ptr + row[:, None] * stride_xm + col[None, :]).to(tl.float32)
    y = y_ptr + batch * stride_yb + row[:, None] * stride_ym + col[None, :] * stride_yn
    if WHOLE:
        tl.store(y, acc.to(y_ptr.dtype.element_ty))
    else:
        tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(row < M)[:, None] & (col < N)[None, :])


def _settings(m, n, dtype, device):
    """(options of the symmetric products, options of the update) for matrices [m, n], m <= n."""
    found = generation(device)
    if found == 0:  # the interpreter, where a tile costs the same whatever its size
        symmetric, update = (16, 16, 4, 1), (16, 32, 16, 4, 1)
    elif dtype == torch.float32:
        symmetric, update = _FP32
    elif m <= 64:
        symmetric, update = _SMALL
    else:
        symmetric, update = _SYMMETRIC[found], _UPDATE[found]
        if n <= 128:
            update = (update[0], 128, *update[2:])
    shared = {"EVEN_K": True, "PRECISION": dot_precision(dtype)}
    return (
        dict(zip(("BLOCK", "BLOCK_K", "num_warps", "num_stages"), symmetric)) | shared,
        dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), update)) | shared | {"GROUP": GROUP},
    )


def _rounded_up(size, *blocks):
    return triton.cdiv(size, max(blocks)) * max(blocks)  # powers of two: a multiple of the largest is one of all


def newton_schulz_fwd(matrices, coefficients, eps, dtype):
    """matrices [..., M, N] -> the iteration's result, like them; coefficients a, b, c of one step behind the other."""
    out = torch.empty(matrices.shape, dtype=matrices.dtype, device=matrices.device)
    if out.numel() == 0:
        return out
    given, result = (t.view(-1, *t.shape[-2:]) for t in (matrices.contiguous(), out))
    if given.shape[1] > given.shape[2]:  # the smaller side is that of A
        given, result = given.mT, result.mT
    count, m, n = given.shape
    symmetric, update = _settings(m, n, dtype, given.device)
    M = _rounded_up(m, symmetric["BLOCK"], update["BLOCK_M"], update["BLOCK_K"])
    N = _rounded_up(n, symmetric["BLOCK_K"], update["BLOCK_N"])
    make = torch.empty if m == M and n == N else torch.zeros
    x = make((count, M, N), dtype=dtype, device=given.device)
    norm = torch.linalg.vector_norm(given, dim=(1, 2), keepdim=True, dtype=torch.float32)
    torch.div(given, norm.clamp_(min=eps), out=x[:, :m, :n])
    other = torch.empty((count, M, N), dtype=dtype, device=given.device)
    gram, square = (torch.empty((count, M, M), dtype=dtype, device=given.device) for _ in range(2))
    tiles = M // symmetric["BLOCK"]
    triangle = (tiles * (tiles + 1) // 2, count)
    steps = len(coefficients) // 3
    for step in range(steps):
        a, b, c = coefficients[3 * step : 3 * step + 3]
        _symmetric_kernel[triangle](x, None, gram, M * N, N, M, N, 1.0, 0.0, **symmetric)
        _symmetric_kernel[triangle](gram, gram, square, M * M, M, M, M, c, b, **symmetric)
        last = step == steps - 1
        y, height, width = (result, m, n) if last else (other, M, N)
        cells = triton.cdiv(height, update["BLOCK_M"]) * triton.cdiv(width, update["BLOCK_N"])
        _update_kernel[(cells, count)](
            x, square, y, M * N, N, M * M, M, *y.stride(), height, width, M, a,
            WHOLE=height % update["BLOCK_M"] == 0 and width % update["BLOCK_N"] == 0, **update,
        )  # fmt: skip
        x, other = other, x
    return out
