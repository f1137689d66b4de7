"""y = x W^T + bias with int8 or int4 codes for W, and dx = dy W.

    W[n, k] = scale[n, g] * (code[n, k] - zero[n, g]),  g = k // GROUP  (GROUP = 0: one scale a row)

- One row of x: `_row_kernel`, sums by plain fp32 arithmetic. A program owns BLOCK_N rows of W and a share of its columns, of
  which it reads BLOCK_K at a time, 16 bytes a thread; every element of the tile has a sum of its own until the end.
- More rows: `_rows_kernel`. The codes less their zero go to tensor cores as they are: 16 bits hold integers up to 256 exactly.
  A group's product is summed in fp32 and then scaled, so W itself is never rounded.
- dx: `_grad_kernel`. A program owns a tile of dx within one group of columns; the sum runs over rows of W, whose scales differ,
  so the tile of W is scaled and rounded to dy's dtype.

4-bit codes: byte j of a group's G / 2 holds columns j (low half) and j + G / 2 (high half), so that a tile of bytes is two tiles
of neighbouring columns (fastlm/ops/quantize.py). Where there are too few programs for the GPU, the columns are divided among
several (`splits`); their sums are added in one order by `_combine_kernel`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_common import dot_precision, generation
from .common import num_sms, rows

_MOST_SPLITS = 16
_COMBINED = 1024  # elements of y that a program of the second pass adds up


@triton.jit
def _centre(zero_ptr, at, BITS: tl.constexpr):
    """The zero points at `at`, or what stands for 0 without them."""
    if zero_ptr is not None:
        return tl.load(zero_ptr + at).to(tl.float32)
    else:
        return tl.zeros_like(at).to(tl.float32) + (8.0 if BITS == 4 else 0.0)


@triton.jit(do_not_specialize=["splits"])
def _row_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, stride_cn, N, K, groups, splits,
    BITS: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [N] of one row x [K], or with SPLIT the sum over a share of the columns, y fp32 [splits, N]."""
    WIDTH: tl.constexpr = GROUP if GROUP else BLOCK_K
    COUNT: tl.constexpr = BLOCK_K // WIDTH  # groups of a tile
    BYTES: tl.constexpr = WIDTH // 2 if BITS == 4 else WIDTH
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.where(n < N, n, 0)
    g = tl.arange(0, COUNT)
    j = tl.arange(0, BYTES)
    at = g[:, None] * WIDTH + j[None, :]  # columns of the tile; of 4-bit codes those in low halves
    tile = codes_ptr + row[:, None, None] * stride_cn + (g[:, None] * BYTES + j[None, :])[None, :, :]
    STEP: tl.constexpr = COUNT * BYTES
    blocks = tl.cdiv(K, BLOCK_K)
    first = 0
    last = blocks
    if SPLIT:
        share = tl.cdiv(blocks, splits)
        first = tl.program_id(1) * share
        last = tl.minimum(first + share, blocks)
    acc = tl.zeros((BLOCK_N, COUNT, BYTES), tl.float32)
    for block in range(first, last):
        k = block * BLOCK_K + at
        there = tile + tl.cast(block, tl.int64) * STEP
        group = block * COUNT + g
        if EVEN_K:
            codes = tl.load(there)
            x = tl.load(x_ptr + k).to(tl.float32)
        else:  # 4-bit codes fill their last group; those behind it are not there
            live = k < K if BITS == 8 else (group < groups)[:, None] & (j < BYTES)[None, :]
            codes = tl.load(there, mask=live[None, :, :], other=0)
            x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            group = tl.minimum(group, groups - 1)
        if GROUP:
            where = row[:, None] * groups + group[None, :]
            scale = tl.load(scale_ptr + where).to(tl.float32)[:, :, None]
            centre = _centre(zero_ptr, where, BITS)[:, :, None] * scale
        else:
            scale = 1.0
            centre = _centre(zero_ptr, row, BITS)[:, None, None]
        if BITS == 4:
            if EVEN_K:
                x2 = tl.load(x_ptr + k + BYTES).to(tl.float32)
            else:
                x2 = tl.load(x_ptr + k + BYTES, mask=k + BYTES < K, other=0.0).to(tl.float32)
            acc += ((codes & 15).to(tl.float32) * scale - centre) * x[None, :, :]
            acc += ((codes >> 4).to(tl.float32) * scale - centre) * x2[None, :, :]
        else:
            acc += (codes.to(tl.float32) * scale - centre) * x[None, :, :]
    y = tl.sum(tl.sum(acc, 2), 1)
    if not GROUP:
        y *= tl.load(scale_ptr + row).to(tl.float32)
    if SPLIT:
        tl.store(y_ptr + tl.program_id(1).to(tl.int64) * N + n, y, mask=n < N)
    else:
        if bias_ptr is not None:
            y += tl.load(bias_ptr + row).to(tl.float32)
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _codes_tile(codes_ptr, row, k, K, stride_cn, EVEN_K: tl.constexpr):
    """int8 codes as [BLOCK_K, BLOCK_N], columns past the end as 0."""
    at = codes_ptr + row[None, :] * stride_cn + k[:, None]
    if EVEN_K:
        return tl.load(at)
    else:
        return tl.load(at, mask=k[:, None] < K, other=0)


@triton.jit
def _x_tile(x_ptr, row, k, K, stride_xm, EVEN_K: tl.constexpr):
    at = x_ptr + row[:, None] * stride_xm + k[None, :]
    if EVEN_K:
        return tl.load(at)
    else:
        return tl.load(at, mask=k[None, :] < K, other=0.0)


@triton.jit(do_not_specialize=["M", "splits"])
def _rows_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, stride_xm, stride_cn, M, N, K, groups, splits,
    BITS: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [M, N], or with SPLIT fp32 [splits, M, N]. BLOCK_K divides GROUP where there are groups; of 4-bit codes a tile is
    BLOCK_K / 2 columns of either half of a group. Rows and columns of y past the end are computed from row 0 and never stored."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    # Programs that share codes run side by side.
    m = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = tl.where(m < M, m, 0)
    row = tl.where(n < N, n, 0)
    blocks = groups * (GROUP // BLOCK_K) if BITS == 4 else tl.cdiv(K, BLOCK_K)
    first = 0
    last = blocks
    if SPLIT:
        share = tl.cdiv(blocks, splits)
        first = tl.program_id(1) * share
        last = tl.minimum(first + share, blocks)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if not GROUP:
        centre = _centre(zero_ptr, row, BITS)
    for block in range(first, last):
        if GROUP:
            group = block // (GROUP // BLOCK_K)
            where = row * groups + group
            scale = tl.load(scale_ptr + where).to(tl.float32)
            centre = _centre(zero_ptr, where, BITS)
            part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        else:
            part = acc
        if BITS == 4:
            HALF: tl.constexpr = GROUP // 2
            byte = tl.cast(block, tl.int64) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
            k = tl.cast(group, tl.int64) * HALF + byte
            x = _x_tile(x_ptr, x_row, k, K, stride_xm, EVEN_K)
            x2 = _x_tile(x_ptr, x_row, k + HALF, K, stride_xm, EVEN_K)
            codes = tl.load(codes_ptr + row[None, :] * stride_cn + byte[:, None])
            low = (codes & 15).to(tl.float32) - centre[None, :]
            high = (codes >> 4).to(tl.float32) - centre[None, :]
            part = tl.dot(x, low.to(x.dtype), part, input_precision=PRECISION)
            part = tl.dot(x2, high.to(x.dtype), part, input_precision=PRECISION)
        else:
            k = tl.cast(block, tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
            x = _x_tile(x_ptr, x_row, k, K, stride_xm, EVEN_K)
            w = _codes_tile(codes_ptr, row, k, K, stride_cn, EVEN_K).to(tl.float32)
            if zero_ptr is not None:
                w -= centre[None, :]
            part = tl.dot(x, w.to(x.dtype), part, input_precision=PRECISION)
        if GROUP:
            acc += part * scale[None, :]
        else:
            acc = part
    if not GROUP:
        acc *= tl.load(scale_ptr + row).to(tl.float32)[None, :]
    live = (m < M)[:, None] & (n < N)[None, :]
    at = m[:, None] * N + n[None, :]
    if SPLIT:
        at += tl.program_id(1).to(tl.int64) * M * N
    elif bias_ptr is not None:
        acc += tl.load(bias_ptr + row).to(tl.float32)[None, :]
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["size", "splits"])
def _combine_kernel(part_ptr, bias_ptr, y_ptr, size, N, splits, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """y [M, N], M N = size, from fp32 [splits, M, N], added from first to last. EVEN: size is a multiple of BLOCK."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        if EVEN:
            acc += tl.load(
                part_ptr + tl.multiple_of(tl.cast(split, tl.int64) * size + first, BLOCK) + tl.arange(0, BLOCK)
            )
        else:
            acc += tl.load(part_ptr + tl.cast(split, tl.int64) * size + i, mask=i < size, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + i % N, mask=i < size, other=0.0).to(tl.float32)
    if EVEN:
        tl.store(y_ptr + i, acc.to(y_ptr.dtype.element_ty))
    else:
        tl.store(y_ptr + i, acc.to(y_ptr.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["M"])
def _grad_kernel(
    dy_ptr, codes_ptr, scale_ptr, zero_ptr, dx_ptr, stride_ym, stride_cn, M, N, K, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx [M, K] = dy [M, N] W. A tile of BLOCK_K columns lies within one group; of 4-bit codes it is BLOCK_K / 2 columns of
    either half of the group."""
    WIDTH: tl.constexpr = BLOCK_K // 2 if BITS == 4 else BLOCK_K
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = (tl.program_id(0) // tiles_m).to(tl.int64)
    y_row = tl.where(m < M, m, 0)
    j = tile * WIDTH + tl.arange(0, WIDTH)  # of 4-bit codes the byte
    if BITS == 4:
        HALF: tl.constexpr = GROUP // 2
        group = tile * WIDTH // HALF
        k = group * GROUP + j - group * HALF
    else:
        group = tile * WIDTH // GROUP if GROUP else 0
        k = j
    # 4-bit codes fill their last group. Of int8 ones the columns past the end are computed from column 0 and never stored.
    read = j if EVEN_K or BITS == 4 else tl.where(j < K, j, 0)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    acc2 = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
        row = n if EVEN_N else tl.where(n < N, n, 0)
        if EVEN_N:
            dy = tl.load(dy_ptr + y_row[:, None] * stride_ym + n[None, :])
        else:
            dy = tl.load(dy_ptr + y_row[:, None] * stride_ym + n[None, :], mask=n[None, :] < N, other=0.0)
        where = row * groups + group
        scale = tl.load(scale_ptr + where).to(tl.float32)[:, None]
        centre = _centre(zero_ptr, where, BITS)[:, None]
        codes = tl.load(codes_ptr + row[:, None] * stride_cn + read[None, :])
        if BITS == 4:
            low = ((codes & 15).to(tl.float32) - centre) * scale
            high = ((codes >> 4).to(tl.float32) - centre) * scale
            acc = tl.dot(dy, low.to(dy.dtype), acc, input_precision=PRECISION)
            acc2 = tl.dot(dy, high.to(dy.dtype), acc2, input_precision=PRECISION)
        else:
            w = (codes.to(tl.float32) - centre) * scale
            acc = tl.dot(dy, w.to(dy.dtype), acc, input_precision=PRECISION)
    at = dx_ptr + m[:, None] * K + k[None, :]
    tl.store(at, acc.to(dx_ptr.dtype.element_ty), mask=(m < M)[:, None] & (k < K)[None, :])
    if BITS == 4:
        k2 = k + GROUP // 2
        at2 = dx_ptr + m[:, None] * K + k2[None, :]
        tl.store(at2, acc2.to(dx_ptr.dtype.element_ty), mask=(m < M)[:, None] & (k2 < K)[None, :])


def _splits(programs, blocks, device):
    """Into how many shares the columns are divided: enough for eight programs to an SM, none of fewer than two tiles."""
    wanted = -(-8 * num_sms(device) // programs)
    return max(1, min(_MOST_SPLITS, wanted, blocks // 2))


def _unit_rows(t):
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _dense(t):
    return None if t is None else t.contiguous()


def quantized_linear_fwd(x, codes, scale, zero, bias, bits, group_size):
    """-> y [..., N] in x's dtype. group_size: 0 for none."""
    lead, K, N = x.shape[:-1], x.shape[-1], codes.shape[0]
    y = torch.empty((*lead, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0 or K == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand(y.shape))
    x, codes, scale, zero, bias = rows(x), _unit_rows(codes), scale.contiguous(), _dense(zero), _dense(bias)
    M, groups = x.shape[0], scale.shape[1] if group_size else 1
    gpu = generation(x.device)
    few = M <= 16
    if M == 1:
        block_n, block_k = (8, 128) if gpu == 0 else (16, 512)
        programs = triton.cdiv(N, block_n)
    else:
        block_m, block_n, block_k, warps, stages = _tile(gpu, few, bits, group_size, x.dtype)
        programs = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    blocks = triton.cdiv(K, block_k)  # or up to three more, in a short last group
    splits = _splits(programs, blocks, x.device) if few else 1
    to = y if splits == 1 else torch.empty((splits, M, N), dtype=torch.float32, device=x.device)
    constants = {
        "BITS": bits, "GROUP": group_size, "EVEN_K": K % max(block_k, group_size) == 0, "SPLIT": splits > 1, "BLOCK_N": block_n,
        "BLOCK_K": block_k,
    }  # fmt: skip
    if M == 1:
        _row_kernel[(programs, splits)](
            x,
            codes,
            scale,
            zero,
            bias,
            to,
            codes.stride(0),
            N,
            K,
            groups,
            splits,
            **constants,
            num_warps=4,
            num_stages=3,
        )
    else:
        _rows_kernel[(programs, splits)](
            x, codes, scale, zero, bias, to, x.stride(0), codes.stride(0), M, N, K, groups, splits, **constants,
            PRECISION=dot_precision(x.dtype), BLOCK_M=block_m, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if splits > 1:
        grid = (triton.cdiv(M * N, _COMBINED),)
        _combine_kernel[grid](to, bias, y, M * N, N, splits, EVEN=M * N % _COMBINED == 0, BLOCK=_COMBINED, num_warps=4)
    return y


def _tile(gpu, few, bits, group_size, dtype):
    """BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages of a product with more than one row."""
    if gpu == 0:
        return 16, 16, min(group_size, 64) or 32, 4, 1
    if dtype == torch.float32:  # by plain arithmetic, which is unrolled: deeper tiles spill
        return (16, 32, min(group_size, 64) or 64, 4, 2) if few else (32, 32, 32, 4, 2)
    if few:  # tiles of at least 16 bytes of codes a thread
        block_n = 128 if 0 < group_size * bits < 512 else 64
        return 16, block_n, group_size or 128, 2 if group_size * bits == 128 else 4, 4
    return 128, 64, group_size or 64, 8, 3


def quantized_linear_bwd(dy, codes, scale, zero, bits, group_size, columns):
    """-> dx [..., columns] in dy's dtype."""
    N, K = codes.shape[0], columns
    dx = torch.empty((*dy.shape[:-1], K), dtype=dy.dtype, device=dy.device)
    if dx.numel() == 0 or N == 0:
        return dx.zero_()
    dy, codes, scale, zero = rows(dy), _unit_rows(codes), scale.contiguous(), _dense(zero)
    M, groups = dy.shape[0], scale.shape[1] if group_size else 1
    gpu = generation(dy.device)
    if gpu == 0:
        block_m, block_n, warps, stages = 16, 32, 4, 1
    elif dy.dtype == torch.float32:
        block_m, block_n, warps, stages = 32, 32, 4, 2
    else:
        block_m, block_n, warps, stages = (16 if M <= 16 else 128), 64, (4 if M <= 16 else 8), 3
    block_k = min(group_size or 64, 64)
    columns_of_tiles = groups * group_size if bits == 4 else K
    grid = (triton.cdiv(M, block_m) * triton.cdiv(columns_of_tiles, block_k),)
    _grad_kernel[grid](
        dy, codes, scale, zero, dx, dy.stride(0), codes.stride(0), M, N, K, groups,
        BITS=bits, GROUP=group_size, EVEN_N=N % block_n == 0, EVEN_K=K % block_k == 0, PRECISION=dot_precision(dy.dtype),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dx
