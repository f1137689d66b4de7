"""dQ of attention: one program per tile of queries, and the gradient of a tile of scores. See attention_bwd.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_common import LOG2E, key_range, live, live_keys, place_of, row_base, stats_of, stats_row, tile_of
from .attention_scores import capped, kept, line_of, visible, with_additions


@triton.jit
def dscores_of(
    q, dout, norm, delta, k_ptrs, v_ptrs, start, first, query, pattern_ptr, rule, place, H, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(dS, what softcap's slope multiplies it by or 1, K): gradients of the logits of a tile, queries down the rows."""
    key = start + tl.arange(0, BLOCK_N)
    k = tl.load(k_ptrs, mask=live_keys(rule, place, key, D, BLOCK_N, BLOCK_D, MASKED), other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    slope = 1.0
    if rule.softcap is not None:
        tanh, slope = capped(scores, rule.softcap, scale, k.dtype == tl.float32)
        scores = tanh * (rule.softcap * LOG2E)
    else:
        scores = scores * (scale * LOG2E)
    scores = with_additions(scores, rule, place, query[:, None], key[None, :])
    probs = tl.exp2(scores - norm[:, None])
    if MASKED:
        probs = tl.where(visible(rule, place, query[:, None], key[None, :]), probs, 0.0)
    if pattern_ptr is not None:
        at = (first % rule.block_q + tl.arange(0, BLOCK_M))[:, None] * rule.block_k
        at += (start % rule.block_k + tl.arange(0, BLOCK_N))[None, :]
        probs = tl.where(tl.load(pattern_ptr + at) != 0, probs, 0.0)
    v = tl.load(v_ptrs, mask=live_keys(rule, place, key, DV, BLOCK_N, BLOCK_DV, MASKED), other=0.0)
    dprobs = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if rule.seed is not None:
        dprobs = tl.where(kept(rule, place, H, first, start, BLOCK_M, BLOCK_N, False), dprobs * rule.grown, 0.0)
    return probs * (dprobs - delta[:, None]), slope, k


@triton.jit
def _add_to_dq(
    dq, q, dout, norm, delta, k_ptrs, v_ptrs, stride_kt, stride_vt, lo, hi, first, query, line, rule, place, H, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LISTED: tl.constexpr, PARTIAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dq (unscaled) the key tiles of [lo, hi), or (LISTED) of these entries of a line of the block lists."""
    begin = lo
    end = hi
    pieces = 1
    if LISTED:
        pieces = rule.block_k // BLOCK_N
        begin = lo * pieces
        end = hi * pieces
    for i in range(begin, end, 1 if LISTED else BLOCK_N):
        start = i
        pattern_ptr = None
        if LISTED:
            at = line * rule.blocks_width + i // pieces
            start = tl.load(rule.blocks_index + at) * rule.block_k + i % pieces * BLOCK_N
            if PARTIAL:
                pattern_ptr = rule.patterns + tl.load(rule.blocks_pattern + at).to(tl.int64) * (
                    rule.block_q * rule.block_k
                )
        start64 = tl.cast(start, tl.int64)
        dscores, slope, k = dscores_of(
            q, dout, norm, delta, k_ptrs + start64 * stride_kt, v_ptrs + start64 * stride_vt, start, first, query, pattern_ptr,
            rule, place, H, scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASKED, PRECISION,
        )  # fmt: skip
        dq = tl.dot((dscores * slope).to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["H", "GROUP", "S", "T", "heads", "section"])
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, norm_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_ds, stride_dh,
    rule, H, GROUP, S, S_padded, T, heads, section, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LAST_FIRST: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h, tile = tile_of(rule.cu_q, rule.segments, heads, H, S, section, BLOCK_M, LAST_FIRST)
    place = place_of(rule, b, h, S, T)
    first = tile * BLOCK_M
    if rule.cu_q is not None:
        if (first < 0) | (first >= place.S):
            return
    h_kv = place.h // GROUP
    query = first + tl.arange(0, BLOCK_M)
    rows = query.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    q_ptr += row_base(rule, place.b, place.q_row, place.h, stride_qb, stride_qs, stride_qh)
    dout_ptr += row_base(rule, place.b, place.q_row, place.h, stride_db, stride_ds, stride_dh)
    q = tl.load(q_ptr + rows[:, None] * stride_qs + d[None, :],
                mask=live(query, place.S, D, BLOCK_M, BLOCK_D, True), other=0.0)  # fmt: skip
    dout = tl.load(dout_ptr + rows[:, None] * stride_ds + e[None, :],
                   mask=live(query, place.S, DV, BLOCK_M, BLOCK_DV, True), other=0.0)  # fmt: skip
    stats = stats_row(rule, place, H, S_padded)
    norm, delta = stats_of(norm_ptr + stats, delta_ptr + stats, query, rule, place)
    k_ptrs = k_ptr + row_base(rule, place.b, place.k_row, h_kv, stride_kb, stride_kt, stride_kh)
    k_ptrs += n[:, None] * stride_kt + d[None, :]
    v_ptrs = v_ptr + row_base(rule, place.b, place.k_row, h_kv, stride_vb, stride_vt, stride_vh)
    v_ptrs += n[:, None] * stride_vt + e[None, :]

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Each loop stands in an `if` that rules out zero rounds: without it ptxas serialises the wgmma of the loop (C7515).
    if rule.blocks is not None:
        line, partial, count = line_of(rule, place, first, rule.block_q)
        if partial > 0:
            dq = _add_to_dq(
                dq, q, dout, norm, delta, k_ptrs, v_ptrs, stride_kt, stride_vt, 0, partial, first, query, line, rule, place, H,
                scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, True, True, True, PRECISION,
            )  # fmt: skip
        if partial < count:
            dq = _add_to_dq(
                dq, q, dout, norm, delta, k_ptrs, v_ptrs, stride_kt, stride_vt, partial, count, first, query, line, rule, place,
                H, scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, True, False, MASKED, PRECISION,
            )  # fmt: skip
    else:
        lo, whole, part, hi = key_range(rule, place, first, tl.minimum(first + BLOCK_M, place.S) - 1, BLOCK_N)
        if rule.left is not None or rule.key_starts is not None:
            if lo < whole:
                dq = _add_to_dq(
                    dq, q, dout, norm, delta, k_ptrs, v_ptrs, stride_kt, stride_vt, lo, whole, first, query, 0, rule, place, H,
                    scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, False, False, True, PRECISION,
                )  # fmt: skip
        if whole < part:
            dq = _add_to_dq(
                dq, q, dout, norm, delta, k_ptrs, v_ptrs, stride_kt, stride_vt, whole, part, first, query, 0, rule, place, H,
                scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, False, False, False, PRECISION,
            )  # fmt: skip
        if part < hi:
            dq = _add_to_dq(
                dq, q, dout, norm, delta, k_ptrs, v_ptrs, stride_kt, stride_vt, part, hi, first, query, 0, rule, place, H,
                scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, False, False, True, PRECISION,
            )  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    tl.store(dq_ptr + ((place.q_row + first) * H + place.h) * D + (m[:, None] * (H * D) + d[None, :]),
             (dq * scale).to(dq_ptr.dtype.element_ty),
             mask=live(m, place.S - first, D, BLOCK_M, BLOCK_D, True))  # fmt: skip
