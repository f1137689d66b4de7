"""Attention forward: online softmax over key tiles (Dao 2023, arXiv:2307.08691), one program per tile of queries.

Key tiles that every query of the tile sees whole come first, without a mask; then those at the diagonal and at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_common import (
    LARGE_MEMORY,
    LN2,
    LOG2E,
    dot_precision,
    head_and_tile,
    heads_per_section,
    key_limits,
    live,
    padded,
    shared_memory,
    unit_rows,
    visible,
)

# (BLOCK_M, BLOCK_N, num_warps, num_stages) by padded head width: with 227 KiB of shared memory (Hopper, data-centre
# Blackwell) and with 99 KiB (everything else). Nothing spills in 16 bits: `python -m benchmarks aot --op attention`.
_LARGE = {16: (128, 128, 8, 3), 32: (128, 128, 8, 3), 64: (128, 64, 8, 3), 128: (128, 128, 8, 3), 256: (128, 64, 8, 2)}
_SMALL = {16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (32, 32, 4, 3)}


@triton.jit
def _attend(
    acc, total, top, q, k_ptrs, v_ptrs, stride_kt, stride_vt, lo, hi, query, limit, offset, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    CORNER: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Folds the key tiles [lo, hi) into the running output, sum and maximum of each query."""
    for start in range(lo, hi, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptrs + tl.cast(start, tl.int64) * stride_kt, other=0.0,
                    mask=live(key, limit, D, BLOCK_N, BLOCK_D, MASKED))  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            scores = tl.where(visible(query[:, None], key[None, :], limit, offset, CORNER), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        base = new_top
        if MASKED:  # a query that has seen nothing yet: keep inf - inf out
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        probs = tl.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(probs, 1)
        v = tl.load(v_ptrs + tl.cast(start, tl.int64) * stride_vt, other=0.0,
                    mask=live(key, limit, DV, BLOCK_N, BLOCK_DV, MASKED))  # fmt: skip
        acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["H", "GROUP", "S", "T", "heads", "section"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, lengths_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    H, GROUP, S, T, heads, section, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CORNER: tl.constexpr, HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, tile = head_and_tile(tl.cdiv(S, BLOCK_M), heads, section, CORNER != 0)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    h_kv = h // GROUP
    first = tile * BLOCK_M
    query = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    limit, offset = key_limits(lengths_ptr, b, S, T, CORNER, HAS_LENGTHS)

    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + query.to(tl.int64)[:, None] * stride_qs + d[None, :]
    q = tl.load(q_ptrs, mask=live(query, S, D, BLOCK_M, BLOCK_D, True), other=0.0)
    k_ptrs = k_ptr + b * stride_kb + h_kv * stride_kh + n[:, None] * stride_kt + d[None, :]
    v_ptrs = v_ptr + b * stride_vb + h_kv * stride_vh + n[:, None] * stride_vt + dv[None, :]

    hi = limit  # keys that some query of the tile sees
    whole = limit  # keys that all of them see
    if CORNER != 0:
        hi = tl.minimum(limit, tl.maximum(tl.minimum(first + BLOCK_M, S) + offset, 0))
        whole = tl.minimum(limit, tl.maximum(first + offset + 1, 0))
    whole = whole // BLOCK_N * BLOCK_N

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # Each loop stands in an `if` that rules out zero rounds: without it ptxas serialises the wgmma of the loop (C7515).
    if whole > 0:
        acc, total, top = _attend(
            acc, total, top, q, k_ptrs, v_ptrs, stride_kt, stride_vt, 0, whole, query, limit, offset, scale_log2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CORNER, False, PRECISION,
        )  # fmt: skip
    if whole < hi:
        acc, total, top = _attend(
            acc, total, top, q, k_ptrs, v_ptrs, stride_kt, stride_vt, whole, hi, query, limit, offset, scale_log2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CORNER, True, PRECISION,
        )  # fmt: skip

    dead = total == 0.0
    o = acc * tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, total))[:, None]
    lse = tl.where(dead, float("-inf"), (top + tl.log2(tl.where(dead, 1.0, total))) * LN2)
    # Positions within the tile are made anew here, in 32 bits: nothing to keep in registers through the loops.
    m = tl.arange(0, BLOCK_M)
    tl.store(o_ptr + ((b * S + first) * H + h) * DV + (m[:, None] * (H * DV) + dv[None, :]),
             o.to(o_ptr.dtype.element_ty), mask=live(m, S - first, DV, BLOCK_M, BLOCK_DV, True))  # fmt: skip
    tl.store(lse_ptr + head.to(tl.int64) * S + first + m, lse, mask=m < S - first)


def _settings(q, block):
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) for padded head width `block`."""
    memory = shared_memory(q.device)
    if memory == 0:
        return 16, 16, 4, 1
    if q.dtype == torch.float32:  # twice the bytes, and products without tensor cores
        return (64, 32, 8, 2) if block <= 64 else (32, 32, 8, 2) if block <= 128 else (16, 32, 8, 2)
    block_m, block_n, num_warps, num_stages = (_LARGE if memory >= LARGE_MEMORY else _SMALL)[block]
    if q.shape[1] <= 16:  # decoding: few queries, long keys
        block_m, block_n, num_warps = 16, min(64, block_n), 4
    return block_m, block_n, num_warps, num_stages


def attention_fwd(q, k, v, key_lengths, corner, scale):
    """-> o [B, S, H, Dv] in q's dtype, lse [B, H, S] fp32, natural logarithm."""
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    B, S, H, D = q.shape
    T, H_kv, DV = v.shape[1:]
    o = torch.empty((B, S, H, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, S), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return o, lse
    block_d, block_dv = padded(D), padded(DV)
    block_m, block_n, num_warps, num_stages = _settings(q, max(block_d, block_dv))
    section = heads_per_section(B * H_kv, T, (D + DV) * k.element_size()) * (H // H_kv)
    _attention_fwd_kernel[(triton.cdiv(S, block_m) * B * H,)](
        q, k, v, o, lse, lse if key_lengths is None else key_lengths.contiguous(),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        H, H // H_kv, S, T, B * H, section, scale * LOG2E.value,
        D=D, DV=DV, BLOCK_D=block_d, BLOCK_DV=block_dv, CORNER=corner, HAS_LENGTHS=key_lengths is not None,
        PRECISION=dot_precision(q.dtype), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return o, lse
