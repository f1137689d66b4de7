"""Attention forward: online softmax over key tiles (Dao 2023, arXiv:2307.08691), one program per tile of queries.

Key tiles that every query of the tile sees whole are walked without a mask, those at the edges with one. Whatever else a call
has (see attention_common.Rule) joins in at compile time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_call import Arguments, rule_of, settings_class
from .attention_common import (
    LN2,
    LOG2E,
    dot_precision,
    generation,
    heads_per_section,
    interpreted_block,
    key_range,
    live,
    live_keys,
    padded,
    place_of,
    row_base,
    tile_of,
)
from .attention_scores import capped, kept, line_of, visible, with_additions

# (BLOCK_M, BLOCK_N, num_warps, num_stages) by generation and padded head width. Nothing spills in 16 bits but where
# benchmarks/results/aot.json says so: `python -m benchmarks aot --op attention`.
_HOT = {
    80: {16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (32, 32, 4, 3)},
    90: {16: (128, 128, 8, 3), 32: (128, 128, 8, 3), 64: (128, 64, 8, 3), 128: (128, 128, 8, 3), 256: (128, 64, 8, 2)},
    100: {16: (128, 128, 8, 3), 32: (128, 128, 8, 3), 64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
}
# The second class: bias, distances, ALiBi, dropout, documents.
_HEAVY = {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)}
_PARTIAL = 32  # keys per step in partial blocks of a block mask, whose patterns cost registers


@triton.jit
def _attend_tile(
    acc, total, top, q, k_ptrs, v_ptrs, start, first, query, pattern_ptr, rule, place, H, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Folds the key tile that begins at `start` into the running output, sum and maximum of each query."""
    key = start + tl.arange(0, BLOCK_N)
    k = tl.load(k_ptrs, mask=live_keys(rule, place, key, D, BLOCK_N, BLOCK_D, MASKED), other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    factor = scale * LOG2E
    # With nothing added, the factor is left to the exponent's multiply-add.
    if rule.softcap is not None or rule.alibi is not None or rule.distances is not None or rule.bias is not None:
        if rule.softcap is not None:
            tanh, _ = capped(scores, rule.softcap, scale, k.dtype == tl.float32)
            scores = tanh * (rule.softcap * LOG2E)
        else:
            scores = scores * factor
        scores = with_additions(scores, rule, place, query[:, None], key[None, :])
        factor = 1.0
    if MASKED:
        scores = tl.where(visible(rule, place, query[:, None], key[None, :]), scores, float("-inf"))
    if pattern_ptr is not None:
        m = first % rule.block_q + tl.arange(0, BLOCK_M)
        n = start % rule.block_k + tl.arange(0, BLOCK_N)
        seen = tl.load(pattern_ptr + (m[:, None] * rule.block_k + n[None, :]))
        scores = tl.where(seen != 0, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    base = new_top
    if (
        MASKED or pattern_ptr is not None or rule.bias is not None or rule.distances is not None
    ):  # a query that has seen nothing yet: no inf - inf
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    probs = tl.exp2(scores * factor - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(probs, 1)
    if rule.seed is not None:
        keep = kept(rule, place, H, first, start, BLOCK_M, BLOCK_N, False)
        probs = tl.where(keep, probs * rule.grown, 0.0)
    v = tl.load(v_ptrs, mask=live_keys(rule, place, key, DV, BLOCK_N, BLOCK_DV, MASKED), other=0.0)
    acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def _attend(
    acc, total, top, q, k_ptr, v_ptr, stride_kt, stride_vt, lo, hi, first, query, rule, place, H, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The key tiles of [lo, hi)."""
    k_ptrs = k_ptr + tl.arange(0, BLOCK_N).to(tl.int64)[:, None] * stride_kt + tl.arange(0, BLOCK_D)[None, :]
    v_ptrs = v_ptr + tl.arange(0, BLOCK_N).to(tl.int64)[:, None] * stride_vt + tl.arange(0, BLOCK_DV)[None, :]
    for start in range(lo, hi, BLOCK_N):
        start64 = tl.cast(start, tl.int64)
        acc, total, top = _attend_tile(
            acc, total, top, q, k_ptrs + start64 * stride_kt, v_ptrs + start64 * stride_vt, start, first, query, None,
            rule, place, H, scale,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASKED, PRECISION,
        )  # fmt: skip
    return acc, total, top


@triton.jit
def _attend_listed(
    acc, total, top, q, k_ptr, v_ptr, stride_kt, stride_vt, line, lo, hi, first, query, rule, place, H, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTIAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The key tiles of entries [lo, hi) of a line of the block lists."""
    k_ptrs = k_ptr + tl.arange(0, BLOCK_N).to(tl.int64)[:, None] * stride_kt + tl.arange(0, BLOCK_D)[None, :]
    v_ptrs = v_ptr + tl.arange(0, BLOCK_N).to(tl.int64)[:, None] * stride_vt + tl.arange(0, BLOCK_DV)[None, :]
    pieces = rule.block_k // BLOCK_N
    for i in range(lo * pieces, hi * pieces):
        at = line * rule.blocks_width + i // pieces
        start = tl.load(rule.blocks_index + at) * rule.block_k + i % pieces * BLOCK_N
        pattern_ptr = None
        if PARTIAL:
            pattern = tl.load(rule.blocks_pattern + at).to(tl.int64)
            pattern_ptr = rule.patterns + pattern * (rule.block_q * rule.block_k)
        start64 = start.to(tl.int64)
        acc, total, top = _attend_tile(
            acc, total, top, q, k_ptrs + start64 * stride_kt, v_ptrs + start64 * stride_vt, start, first, query, pattern_ptr,
            rule, place, H, scale,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASKED, PRECISION,
        )  # fmt: skip
    return acc, total, top


@triton.jit(do_not_specialize=["H", "GROUP", "S", "T", "heads", "section"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    rule, H, GROUP, S, T, heads, section, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LAST_FIRST: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_PART: tl.constexpr,
):  # fmt: skip
    """MASKED: which tiles of block lists need the other masks of the rule."""
    b, h, tile = tile_of(rule.cu_q, rule.segments, heads, H, S, section, BLOCK_M, LAST_FIRST)
    place = place_of(rule, b, h, S, T)
    first = tile * BLOCK_M
    if rule.cu_q is not None:
        if (first < 0) | (first >= place.S):
            return
    h_kv = place.h // GROUP
    q_ptr += row_base(rule, place.b, place.q_row, place.h, stride_qb, stride_qs, stride_qh)
    k_ptr += row_base(rule, place.b, place.k_row, h_kv, stride_kb, stride_kt, stride_kh)
    v_ptr += row_base(rule, place.b, place.k_row, h_kv, stride_vb, stride_vt, stride_vh)
    query = first + tl.arange(0, BLOCK_M)
    q = tl.load(q_ptr + query.to(tl.int64)[:, None] * stride_qs + tl.arange(0, BLOCK_D)[None, :],
                mask=live(query, place.S, D, BLOCK_M, BLOCK_D, True), other=0.0)  # fmt: skip

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # Each loop stands in an `if` that rules out zero rounds: without it ptxas serialises the wgmma of the loop (C7515).
    if rule.blocks is not None:
        line, partial, count = line_of(rule, place, first, rule.block_q)
        if partial > 0:
            acc, total, top = _attend_listed(
                acc, total, top, q, k_ptr, v_ptr, stride_kt, stride_vt, line, 0, partial, first, query, rule, place, H, scale,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_PART, True, True, PRECISION,
            )  # fmt: skip
        if partial < count:
            acc, total, top = _attend_listed(
                acc, total, top, q, k_ptr, v_ptr, stride_kt, stride_vt, line, partial, count, first, query, rule, place, H,
                scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, False, MASKED, PRECISION,
            )  # fmt: skip
    else:
        lo, whole, part, hi = key_range(rule, place, first, tl.minimum(first + BLOCK_M, place.S) - 1, BLOCK_N)
        if rule.left is not None or rule.key_starts is not None:
            if lo < whole:
                acc, total, top = _attend(
                    acc, total, top, q, k_ptr, v_ptr, stride_kt, stride_vt, lo, whole, first, query, rule, place, H, scale,
                    D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, True, PRECISION,
                )  # fmt: skip
        if whole < part:
            acc, total, top = _attend(
                acc, total, top, q, k_ptr, v_ptr, stride_kt, stride_vt, whole, part, first, query, rule, place, H, scale,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, False, PRECISION,
            )  # fmt: skip
        if part < hi:
            acc, total, top = _attend(
                acc, total, top, q, k_ptr, v_ptr, stride_kt, stride_vt, part, hi, first, query, rule, place, H, scale,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, True, PRECISION,
            )  # fmt: skip

    dead = total == 0.0
    if rule.sinks is not None:  # one more logit in the sum, with no value
        sink = tl.load(rule.sinks + place.h).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)
        new_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # a sink of -inf under a query that sees nothing
        shrink = tl.exp2(top - new_top)
        total = tl.where(dead, 0.0, total * shrink + tl.exp2(sink - new_top))
        acc = acc * shrink[:, None]
        top = new_top
    o = acc * tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, total))[:, None]
    lse = tl.where(dead, float("-inf"), (top + tl.log2(tl.where(dead, 1.0, total))) * LN2)
    # Positions within the tile are made anew here, in 32 bits: nothing to keep in registers through the loops.
    m = tl.arange(0, BLOCK_M)
    dv = tl.arange(0, BLOCK_DV)
    rest = place.S - first
    lse_base = (place.b * H + place.h) * S
    if rule.cu_q is not None:
        lse_base = place.h * S + place.q_row
    tl.store(o_ptr + ((place.q_row + first) * H + place.h) * DV + (m[:, None] * (H * DV) + dv[None, :]),
             o.to(o_ptr.dtype.element_ty), mask=live(m, rest, DV, BLOCK_M, BLOCK_DV, True))  # fmt: skip
    tl.store(lse_ptr + lse_base + first + m, lse, mask=m < rest)


def _settings(a: Arguments, block: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) for padded head width `block`."""
    machine = generation(a.q.device)
    if machine == 0:
        block = interpreted_block(a.q.shape[1], a.k.shape[1])
        return block, block, 4, 1
    if a.q.dtype == torch.float32:  # twice the bytes, and products without tensor cores
        return (64, 32, 8, 2) if block <= 64 else (32, 32, 8, 2) if block <= 128 else (16, 32, 8, 2)
    kind = settings_class(a)
    if kind == "heavy" or (kind == "blocks" and block > 128):
        return _HEAVY[block]
    if kind == "blocks" and machine == 80:
        return 128, 64, 8, 3
    block_m, block_n, num_warps, num_stages = _HOT[machine][block]
    if a.q.shape[1] <= 16:  # decoding: few queries, long keys
        block_m, block_n, num_warps = 16, min(64, block_n), 4
    return block_m, block_n, num_warps, num_stages


def attention_fwd(*args):
    """Takes ops.attention_reference.Call -> o [B, S, H, Dv] in q's dtype, lse [B, H, S] fp32, natural logarithm."""
    a = Arguments.of(*args)
    B, S, H, D = a.q.shape
    T, H_kv, DV = a.v.shape[1:]
    o = torch.empty((B, S, H, DV), dtype=a.q.dtype, device=a.q.device)
    lse = torch.empty((B, H, S), dtype=torch.float32, device=a.q.device)
    if lse.numel() == 0 or a.sequences == 0:
        return o.zero_(), lse.fill_(float("-inf"))
    block_d, block_dv = padded(D), padded(DV)
    block_m, block_n, num_warps, num_stages = _settings(a, max(block_d, block_dv))
    if a.packed:  # rows of no sequence, which cu_seqlens unchecked on a GPU may leave
        o.zero_()
        lse.fill_(float("-inf"))
    rule = rule_of(a, "rows")
    if rule.blocks is not None:
        block_m, block_n = min(block_m, rule.block_q), min(block_n, rule.block_k)
    section = heads_per_section(B * H_kv, T, (D + DV) * a.k.element_size()) * (H // H_kv)
    _attention_fwd_kernel[((triton.cdiv(S, block_m) + a.extra_tiles) * B * H,)](
        a.q, a.k, a.v, o, lse, *a.strides(), rule, H, H // H_kv, S, T, B * H, section, a.scale,
        D=D, DV=DV, BLOCK_D=block_d, BLOCK_DV=block_dv, LAST_FIRST=a.right == 0, MASKED=a.masked_blocks,
        PRECISION=dot_precision(a.q.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_PART=min(_PARTIAL, block_n),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return o, lse
