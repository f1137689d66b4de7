"""The tile product shared by kernels with an epilogue of their own: acc + A B over tiles of the inner dimension, fp32 sums.

A program owns one tile of the result. A is [M, K] with unit stride along K; B is [K, N] at any strides: a weight [F, D] is read
as its transpose where it lies. Rows and columns past the end are read as row or column 0 and never stored, so that the loads
of the loop need no mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_common import generation

GROUP = 8  # rows of tiles that programs running together share

# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages of 16-bit products, by generation and epilogue: "none" (a bias at most),
# "activation", and "gated", which holds two tiles of everything. The largest tiles that do not spill in the rows compiled ahead
# of time (benchmarks/ops/bench_mlp.py, bench_lora_linear.py), within the shared memory; no GPU has timed them.
_SETTINGS = {
    (80, "none"): (128, 128, 32, 8, 4),
    (80, "activation"): (128, 128, 32, 8, 4),
    (80, "gated"): (128, 64, 32, 8, 4),
    (90, "none"): (128, 256, 64, 8, 3),
    (90, "activation"): (128, 128, 64, 8, 4),
    (90, "gated"): (128, 64, 64, 8, 4),
    (100, "none"): (128, 256, 64, 8, 3),
    (100, "activation"): (128, 128, 64, 8, 4),
    (100, "gated"): (128, 64, 64, 8, 4),
}
# Where the inner width is not whole tiles (EVEN_K) or the columns are not multiples of 16 (WIDE): loads with masks, and addresses
# of single elements, take registers of their own, and the tiles above would spill by up to 3.7 KB.
_ODD = {80: (64, 64, 32, 8, 2), 90: (64, 64, 32, 8, 2), 100: (64, 64, 32, 8, 2)}
_FEW = {80: (64, 64, 32, 4, 4), 90: (64, 64, 64, 4, 4), 100: (64, 64, 64, 4, 4)}  # at most 64 rows: more programs
_FP32 = (64, 64, 16, 8, 4)  # products by plain arithmetic ("ieee") are bound by it
_FP32_ODD = (32, 32, 16, 4, 2)


def settings(M, N, K, dtype, device, epilogue):
    """Constants and launch options of a product [M, K] [K, N]: a dict for the kernel call."""
    found = generation(device)
    if found == 0:  # the interpreter, where a tile costs the same whatever its size
        block = 16 if max(M, N) <= 32 else 32
        tile = (block, block, block, 4, 1)
    else:
        fp32 = dtype == torch.float32
        tile = _FP32 if fp32 else _FEW[found] if M <= 64 else _SETTINGS[found, epilogue]
        if K % tile[2] or N % 16:
            tile = _FP32_ODD if fp32 else _ODD[found]
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return dict(zip(names, tile)) | {"GROUP": GROUP, "EVEN_K": K % tile[2] == 0, "WIDE": N % 16 == 0}


def dense(vector):
    """A bias with unit stride; None stays None."""
    return None if vector is None else vector.contiguous()


def grid(M, N, options):
    return (triton.cdiv(M, options["BLOCK_M"]) * triton.cdiv(N, options["BLOCK_N"]),)


@triton.jit
def tile_of_grid(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Rows [BLOCK_M] and columns [BLOCK_N] of this program's tile, int64. GROUP rows of tiles are walked column by column, so
    that programs running together find each other's rows of A and columns of B in L2."""
    columns = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP * columns) * GROUP
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    rest = pid - first * columns
    row = (first + rest % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (rest // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return row, col


@triton.jit
def readable(row, col, M, N, WIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows and columns, with 0 for those that do not exist. WIDE: N is a multiple of 16, so that a 16-byte access to
    neighbouring columns lies on one side of the end, and may be told to begin at its first column."""
    col = tl.where(col < N, col, 0)
    if WIDE:
        col = tl.max_contiguous(tl.multiple_of(col, BLOCK_N), BLOCK_N)
    return tl.where(row < M, row, 0), col


@triton.jit
def add_product(
    acc, a_ptr, b_ptr, row, col, stride_am, stride_bk, stride_bn, K,
    EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] + A[row] B[:, col]. EVEN_K: K is a multiple of BLOCK_K."""
    stride_bk = tl.cast(stride_bk, tl.int64)
    k = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + row[:, None] * stride_am + k[None, :]
    b_tile = b_ptr + k[:, None] * stride_bk + col[None, :] * stride_bn
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_tile)
            b = tl.load(b_tile)
        else:
            a = tl.load(a_tile, mask=k[None, :] < K - start, other=0.0)
            b = tl.load(b_tile, mask=k[:, None] < K - start, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_tile += BLOCK_K
        b_tile += BLOCK_K * stride_bk
    return acc


@triton.jit
def add_two_products(
    acc, acc2, a_ptr, b_ptr, b2_ptr, row, col, stride_am, stride_bk, stride_bn, stride_b2k, stride_b2n, K,
    EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`add_product` with two matrices B side by side: every tile of A is read once for both."""
    stride_bk = tl.cast(stride_bk, tl.int64)
    stride_b2k = tl.cast(stride_b2k, tl.int64)
    k = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + row[:, None] * stride_am + k[None, :]
    b_tile = b_ptr + k[:, None] * stride_bk + col[None, :] * stride_bn
    b2_tile = b2_ptr + k[:, None] * stride_b2k + col[None, :] * stride_b2n
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_tile)
            b = tl.load(b_tile)
            b2 = tl.load(b2_tile)
        else:
            a = tl.load(a_tile, mask=k[None, :] < K - start, other=0.0)
            b = tl.load(b_tile, mask=k[:, None] < K - start, other=0.0)
            b2 = tl.load(b2_tile, mask=k[:, None] < K - start, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        acc2 = tl.dot(a, b2, acc2, input_precision=PRECISION)
        a_tile += BLOCK_K
        b_tile += BLOCK_K * stride_bk
        b2_tile += BLOCK_K * stride_b2k
    return acc, acc2
