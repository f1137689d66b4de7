"""dK and dV of attention: one program per tile of keys, which every query that sees them passes by. See attention_bwd.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_common import (
    LOG2E,
    Place,
    live,
    live_keys,
    place_of,
    query_range,
    row_base,
    rows_of,
    stats_of,
    stats_row,
    tile_of,
)
from .attention_scores import capped, kept, line_of, visible, with_additions


@triton.jit
def _add_to_dkdv(
    dk, dv, k, v, q_ptrs, dout_ptrs, norm_ptr, delta_ptr, start, first_key, key, pattern_ptr, rule, place, H, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the queries from `start` on, of one head, to dk (unscaled) and dv."""
    m = tl.arange(0, BLOCK_M)
    query = start + m
    q = tl.load(q_ptrs, mask=live(query, place.S, D, BLOCK_M, BLOCK_D, True), other=0.0)
    dout = tl.load(dout_ptrs, mask=live(query, place.S, DV, BLOCK_M, BLOCK_DV, True), other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if rule.softcap is not None:
        tanh, slope = capped(scores, rule.softcap, scale, k.dtype == tl.float32)
        scores = tanh * (rule.softcap * LOG2E)
    else:
        scores = scores * (scale * LOG2E)
    scores = with_additions(scores, rule, place, query[None, :], key[:, None])
    norm, delta = stats_of(norm_ptr, delta_ptr, query, rule, place)
    logits = scores - norm[None, :]
    if MASKED:
        if rule.prefix_lengths is not None or rule.documents_q is not None:
            logits = tl.where(visible(rule, place, query[None, :], key[:, None]), logits, float("-inf"))
        else:
            # min with +-2^19 or more instead of a select: booleans of a whole tile cost 50 registers here. Keys outside
            # [start, limit) need no mask: their rows belong to nobody.
            column = (m.to(tl.float32) + 0.5) * 1048576.0
            if rule.right is not None:
                first = tl.maximum(tl.minimum(key - (place.offset + rule.right) - start, 65536), -65536)
                logits = tl.minimum(logits, column[None, :] - (first.to(tl.float32) * 1048576.0)[:, None])
            if rule.left is not None:
                end = tl.maximum(tl.minimum(key - (place.offset - rule.left) + 1 - start, 65536), -65536)
                logits = tl.minimum(logits, (end.to(tl.float32) * 1048576.0)[:, None] - column[None, :])
    if pattern_ptr is not None:
        at = (start % rule.block_q + m)[None, :] * rule.block_k
        at += (first_key % rule.block_k + tl.arange(0, BLOCK_N))[:, None]
        logits = tl.where(tl.load(pattern_ptr + at) != 0, logits, float("-inf"))
    probs = tl.exp2(logits)
    dprobs = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    if rule.seed is not None:
        keep = kept(rule, place, H, start, first_key, BLOCK_M, BLOCK_N, True)
        dprobs = tl.where(keep, dprobs * rule.grown, 0.0)
        dv = tl.dot(tl.where(keep, probs * rule.grown, 0.0).to(dout.dtype), dout, dv, input_precision=PRECISION)
    else:
        dv = tl.dot(probs.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dscores = probs * (dprobs - delta[None, :])
    if rule.softcap is not None:
        dscores = dscores * slope
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _head_of_group(place, head):
    """The place of another query head of the same key head."""
    p = place
    return Place(p.b, p.h + head, p.q_row, p.k_row, p.S, p.start, p.limit, p.offset, p.prefix)


@triton.jit
def _dkdv_of_queries(
    dk, dv, k, v, q_ptr, dout_ptr, norm_ptr, delta_ptr, stride_qs, stride_qh, stride_ds, stride_dh, lo, hi, first_key, key,
    rule, place, GROUP, H, S_padded, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds queries [lo, hi) of every head of the group.

    One loop over heads and tiles, so that loads run ahead from one head into the next; its order is fixed, so the sum is
    repeatable. Queries past hi are masked, or hi is lo plus whole tiles.
    """
    rows = tl.arange(0, BLOCK_M).to(tl.int64)[:, None]
    q_ptrs = q_ptr + rows * stride_qs + tl.arange(0, BLOCK_D)[None, :]
    dout_ptrs = dout_ptr + rows * stride_ds + tl.arange(0, BLOCK_DV)[None, :]
    head = tl.zeros((), tl.int64)
    start = lo
    for _ in range(0, GROUP * tl.cdiv(hi - lo, BLOCK_M)):
        start64 = start.to(tl.int64)
        stats = head * S_padded
        dk, dv = _add_to_dkdv(
            dk, dv, k, v, q_ptrs + (head * stride_qh + start64 * stride_qs), dout_ptrs + (head * stride_dh + start64 * stride_ds),
            norm_ptr + stats, delta_ptr + stats, start, first_key, key, None, rule, _head_of_group(place, head), H, scale,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASKED, PRECISION,
        )  # fmt: skip
        last = start + BLOCK_M >= hi
        start = tl.where(last, lo, start + BLOCK_M)
        head += last.to(tl.int64)
    return dk, dv


@triton.jit
def _dkdv_of_listed(
    dk, dv, k, v, q_ptr, dout_ptr, norm_ptr, delta_ptr, stride_qs, stride_ds, line, lo, hi, first_key, key,
    rule, place, H, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTIAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the query blocks of entries [lo, hi) of a line of the block lists, of the place's own head."""
    rows = tl.arange(0, BLOCK_M).to(tl.int64)[:, None]
    q_ptrs = q_ptr + rows * stride_qs + tl.arange(0, BLOCK_D)[None, :]
    dout_ptrs = dout_ptr + rows * stride_ds + tl.arange(0, BLOCK_DV)[None, :]
    pieces = rule.block_q // BLOCK_M
    for i in range(lo * pieces, hi * pieces):
        at = line * rule.blocks_width + i // pieces
        start = tl.load(rule.blocks_index + at) * rule.block_q + i % pieces * BLOCK_M
        pattern_ptr = None
        if PARTIAL:
            pattern = tl.load(rule.blocks_pattern + at).to(tl.int64)
            pattern_ptr = rule.patterns + pattern * (rule.block_q * rule.block_k)
        start64 = start.to(tl.int64)
        dk, dv = _add_to_dkdv(
            dk, dv, k, v, q_ptrs + start64 * stride_qs, dout_ptrs + start64 * stride_ds, norm_ptr, delta_ptr,
            start, first_key, key, pattern_ptr, rule, place, H, scale,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASKED, PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=["H", "GROUP", "S", "T", "heads", "section"])
def _attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, norm_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_ds, stride_dh,
    rule, H, GROUP, S, S_padded, T, heads, section, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr,
):  # fmt: skip
    # Under a causal mask the first keys are seen by the most queries: the longest tiles come first as they are.
    H_kv = H // GROUP
    b, h_kv, tile = tile_of(rule.cu_k, rule.segments, heads, H_kv, T, section, BLOCK_N, False)
    place = place_of(rule, b, h_kv * GROUP, S, T)  # the first head of the group
    first = tile * BLOCK_N
    length = T
    if rule.cu_k is not None:
        _, length = rows_of(rule.cu_k, b, T)
        if (first < 0) | (first >= length):
            return
    h_kv = h_kv.to(tl.int64)
    key = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    rows = key.to(tl.int64)[:, None]
    k_ptr += row_base(rule, place.b, place.k_row, h_kv, stride_kb, stride_kt, stride_kh)
    v_ptr += row_base(rule, place.b, place.k_row, h_kv, stride_vb, stride_vt, stride_vh)
    k = tl.load(k_ptr + rows * stride_kt + d[None, :], other=0.0,
                mask=live_keys(rule, place, key, D, BLOCK_N, BLOCK_D, True))  # fmt: skip
    v = tl.load(v_ptr + rows * stride_vt + e[None, :], other=0.0,
                mask=live_keys(rule, place, key, DV, BLOCK_N, BLOCK_DV, True))  # fmt: skip
    q_ptr += row_base(rule, place.b, place.q_row, place.h, stride_qb, stride_qs, stride_qh)
    dout_ptr += row_base(rule, place.b, place.q_row, place.h, stride_db, stride_ds, stride_dh)
    stats = stats_row(rule, place, H, S_padded)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    # Each loop stands in an `if` that rules out zero rounds: without it ptxas serialises the wgmma of the loop (C7515).
    if rule.blocks is not None:
        for head in range(0, GROUP):
            head64 = tl.cast(head, tl.int64)
            here = _head_of_group(place, head64)
            line, partial, count = line_of(rule, here, first, rule.block_k)
            q_here, dout_here = q_ptr + head64 * stride_qh, dout_ptr + head64 * stride_dh
            stats_here = stats + head64 * S_padded
            dk, dv = _dkdv_of_listed(
                dk, dv, k, v, q_here, dout_here, norm_ptr + stats_here, delta_ptr + stats_here, stride_qs, stride_ds,
                line, 0, partial, first, key, rule, here, H, scale,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_EDGE, BLOCK_N, True, True, PRECISION,
            )  # fmt: skip
            dk, dv = _dkdv_of_listed(
                dk, dv, k, v, q_here, dout_here, norm_ptr + stats_here, delta_ptr + stats_here, stride_qs, stride_ds,
                line, partial, count, first, key, rule, here, H, scale,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, False, MASKED, PRECISION,
            )  # fmt: skip
    else:
        lo, whole, part, hi = query_range(rule, place, first, first + BLOCK_N - 1, BLOCK_EDGE)
        if rule.left is not None:  # whole tiles only; the rest is masked
            part = whole + (part - whole) // BLOCK_M * BLOCK_M
        if rule.right is not None or rule.documents_q is not None or rule.prefix_lengths is not None:
            if lo < whole:
                dk, dv = _dkdv_of_queries(
                    dk, dv, k, v, q_ptr, dout_ptr, norm_ptr + stats, delta_ptr + stats, stride_qs, stride_qh, stride_ds,
                    stride_dh, lo, whole, first, key, rule, place, GROUP, H, S_padded, scale,
                    D, DV, BLOCK_D, BLOCK_DV, BLOCK_EDGE, BLOCK_N, True, PRECISION,
                )  # fmt: skip
        if whole < part:
            dk, dv = _dkdv_of_queries(
                dk, dv, k, v, q_ptr, dout_ptr, norm_ptr + stats, delta_ptr + stats, stride_qs, stride_qh, stride_ds,
                stride_dh, whole, part, first, key, rule, place, GROUP, H, S_padded, scale,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, False, PRECISION,
            )  # fmt: skip
        if rule.left is not None:
            if part < hi:
                dk, dv = _dkdv_of_queries(
                    dk, dv, k, v, q_ptr, dout_ptr, norm_ptr + stats, delta_ptr + stats, stride_qs, stride_qh, stride_ds,
                    stride_dh, part, hi, first, key, rule, place, GROUP, H, S_padded, scale,
                    D, DV, BLOCK_D, BLOCK_DV, BLOCK_EDGE, BLOCK_N, True, PRECISION,
                )  # fmt: skip

    # Rows outside [start, limit) were computed from zeros instead of keys and belong to nobody. Positions within the tile are
    # made anew here, in 32 bits: nothing to keep in registers through the loops.
    n = tl.arange(0, BLOCK_N)
    seen = (n < place.limit - first)[:, None]
    if rule.key_starts is not None:
        seen = seen & (n >= place.start - first)[:, None]
    base = (place.k_row + first) * H_kv + h_kv
    tl.store(dk_ptr + base * D + (n[:, None] * (H_kv * D) + d[None, :]),
             tl.where(seen, dk * scale, 0.0).to(dk_ptr.dtype.element_ty),
             mask=live(n, length - first, D, BLOCK_N, BLOCK_D, True))  # fmt: skip
    tl.store(dv_ptr + base * DV + (n[:, None] * (H_kv * DV) + e[None, :]),
             tl.where(seen, dv, 0.0).to(dv_ptr.dtype.element_ty),
             mask=live(n, length - first, DV, BLOCK_N, BLOCK_DV, True))  # fmt: skip
