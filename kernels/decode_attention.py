"""Attention of a few new tokens over a cache, contiguous or paged, split over the keys (flash-decoding: Dao et al. 2023).

A program owns one key head of one sequence and one share of its keys. The rows of its tile are the query heads that read that
key head, times the new tokens, so that every key and value is loaded once for all of them. Each share leaves its output,
maximum and sum, in fp32, and a second kernel brings the shares together in a fixed order; a single share is written at once.
The shares are cut from the keys a sequence really has, so that a long cache that is nearly empty costs nothing.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from .attention_common import LN2, LOG2E, Place, Rule, dot_precision, generation, key_range, padded, place_of, unit_rows
from .attention_scores import capped, visible, with_additions
from .common import num_sms

# Keys of a tile by padded head width: 32 KiB of keys and values.
_BLOCK_N = {16: 128, 32: 128, 64: 128, 128: 64, 256: 32}
_MOST_SPLITS = 256
_COMBINED = 16  # shares brought together at a time


@triton.jit
def _page_of(table_row, start, end, pages, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of keys start .. start + BLOCK_N - 1: a number where it is one for all, else [BLOCK_N]. Keys past end: any."""
    # Unsigned: dividing by a power of two is then a shift.
    if PAGE == 0:
        page = tl.zeros((), tl.int32)
    elif PAGE % BLOCK_N == 0:
        page = tl.load(table_row + tl.cast(start, tl.uint32) // PAGE, mask=start < end, other=0)
    else:
        key = start + tl.arange(0, BLOCK_N)
        page = tl.load(table_row + key.to(tl.uint32) // PAGE, mask=key < end, other=0)
    return tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)


@triton.jit
def _offsets(page, start, stride_page, stride_slot, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where keys start .. start + BLOCK_N - 1 of the cache begin, [BLOCK_N]."""
    n = tl.arange(0, BLOCK_N)
    if PAGE == 0:
        return tl.cast(start, tl.int64) * stride_slot + n.to(tl.int64) * stride_slot
    elif PAGE % BLOCK_N == 0:
        return (
            page * stride_page
            + (tl.cast(start, tl.uint32) % PAGE).to(tl.int64) * stride_slot
            + n.to(tl.int64) * stride_slot
        )
    else:
        return page * stride_page + ((start + n).to(tl.uint32) % PAGE).to(tl.int64) * stride_slot


@triton.jit
def _attend(
    acc, total, top, q, k_base, v_base, stride_kp, stride_ks, stride_kd, stride_vp, stride_vs, stride_vd,
    table_row, pages, lo, gap_at, gap, hi, query, rule, place, scale, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Folds key tiles into the running output, sum and maximum of each row: those of [lo, hi) but for the [gap_at, gap_at + gap).

    lo, gap_at and gap are multiples of BLOCK_N.
    """
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    page = _page_of(table_row, lo + tl.where(lo >= gap_at, gap, 0), hi, pages, PAGE, BLOCK_N)
    for at in range(lo, hi - gap, BLOCK_N):
        # Pages are looked up one tile ahead: the loads of keys and values then wait for nothing within their own round. No
        # other number is carried from round to round: a carried `start` keeps Triton from loading ahead.
        start = at + tl.where(at >= gap_at, gap, 0)
        next_start = at + BLOCK_N + tl.where(at + BLOCK_N >= gap_at, gap, 0)
        next_page = _page_of(table_row, next_start, hi, pages, PAGE, BLOCK_N)
        key = start + tl.arange(0, BLOCK_N)
        k_mask = tl.full((BLOCK_N, BLOCK_D), True, tl.int1)
        v_mask = tl.full((BLOCK_N, BLOCK_DV), True, tl.int1)
        if D != BLOCK_D:
            k_mask = k_mask & (d < D)[None, :]
        if DV != BLOCK_DV:
            v_mask = v_mask & (dv < DV)[None, :]
        if MASKED:  # what nobody sees may be anything, NaN included, and its page any
            live = (key >= place.start) & (key < hi)
            k_mask = k_mask & live[:, None]
            v_mask = v_mask & live[:, None]
        row = _offsets(page, start, stride_kp, stride_ks, PAGE, BLOCK_N)
        k = tl.load(k_base + row[:, None] + (d * stride_kd)[None, :], mask=k_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if rule.softcap is not None:
            tanh, _ = capped(scores, rule.softcap, scale, k.dtype == tl.float32)
            scores = tanh * (rule.softcap * LOG2E)
        else:
            scores = scores * (scale * LOG2E)
        scores = with_additions(scores, rule, place, query[:, None], key[None, :])
        if MASKED:
            scores = tl.where(visible(rule, place, query[:, None], key[None, :]), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet: no inf - inf
        probs = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(probs, 1)
        row = _offsets(page, start, stride_vp, stride_vs, PAGE, BLOCK_N)
        v = tl.load(v_base + row[:, None] + (dv * stride_vd)[None, :], mask=v_mask, other=0.0)
        acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
        page = next_page
    return acc, total, top


@triton.jit
def _starting(place, start):
    """The place with another first key."""
    return Place(place.b, place.h, place.q_row, place.k_row, place.S, start, place.limit, place.offset, place.prefix)


@triton.jit
def _finished(total, top, rule, head):
    """(what to multiply the output with, lse) of rows with this sum and maximum; 0 and -inf if they saw nothing."""
    dead = total == 0.0
    shrink = tl.where(dead, 0.0, 1.0)
    if rule.sinks is not None:  # one more logit in the sum, with no value
        sink = tl.load(rule.sinks + head).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)
        new_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # a sink of -inf under a row that saw nothing
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.exp2(sink - new_top)
        top = new_top
    sum_ = tl.where(dead, 1.0, total)
    return tl.where(dead, 0.0, shrink / sum_), tl.where(dead, float("-inf"), (top + tl.log2(sum_)) * LN2)


@triton.jit(do_not_specialize=["H", "GROUP", "S", "places", "pages", "stride_table", "rows", "splits", "shortest"])
def _decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, o_ptr, lse_ptr, partial_ptr, stats_ptr,
    stride_qb, stride_qs, stride_qh, stride_kp, stride_ks, stride_kh, stride_kd, stride_vp, stride_vs, stride_vh, stride_vd,
    stride_table, rule, H, GROUP, S, places, pages, rows, splits, shortest, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PAGE: tokens of a page, 0 for a contiguous cache. shortest: key tiles below which a share is not cut."""
    tiles = tl.cdiv(S * GROUP, BLOCK_M)
    tile = tl.program_id(0) % tiles
    h_kv = tl.program_id(0) // tiles % (H // GROUP)
    b = tl.program_id(0) // tiles // (H // GROUP)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < S * GROUP
    row = tl.minimum(row, S * GROUP - 1)  # rows past the last one repeat it
    query = row // GROUP
    head = h_kv * GROUP + row % GROUP
    place = place_of(rule, b, head[:, None], S, places)
    if rule.left is not None:  # keys before every window are not even loaded
        place = _starting(place, tl.maximum(place.start, place.offset - rule.left))
    first = tile * BLOCK_M // GROUP
    last = (tl.minimum(tile * BLOCK_M + BLOCK_M, S * GROUP) - 1) // GROUP
    lo, whole, part, hi = key_range(rule, place, first, last, BLOCK_N)

    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if SPLIT:
        share = tl.maximum(tl.cdiv(tl.cdiv(hi - lo, BLOCK_N), splits), shortest) * BLOCK_N
        lo += tl.program_id(1) * share
        hi = tl.minimum(hi, lo + share)
    if lo < hi:
        b64 = b.to(tl.int64)
        q = tl.load(q_ptr + (b64 * stride_qb + query.to(tl.int64) * stride_qs + head.to(tl.int64) * stride_qh)[:, None]
                    + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
        k_base = k_ptr + h_kv.to(tl.int64) * stride_kh
        v_base = v_ptr + h_kv.to(tl.int64) * stride_vh
        if PAGE == 0:
            k_base += b64 * stride_kp
            v_base += b64 * stride_vp
        table_row = table_ptr + b64 * stride_table
        # Tiles that every row sees whole, without a mask; then those at both ends of them, with one.
        start = tl.minimum(tl.maximum(lo, whole), hi)
        end = tl.maximum(tl.minimum(hi, part), start)
        if start < end:
            acc, total, top = _attend(
                acc, total, top, q, k_base, v_base, stride_kp, stride_ks, stride_kd, stride_vp, stride_vs, stride_vd,
                table_row, pages, start, start, 0, end, query, rule, place, scale, D, DV, BLOCK_D, BLOCK_DV, PAGE, BLOCK_N, False,
                PRECISION,
            )  # fmt: skip
        if (lo < start) | (end < hi):
            acc, total, top = _attend(
                acc, total, top, q, k_base, v_base, stride_kp, stride_ks, stride_kd, stride_vp, stride_vs, stride_vd,
                table_row, pages, lo, start, end - start, hi, query, rule, place, scale, D, DV, BLOCK_D, BLOCK_DV, PAGE, BLOCK_N,
                True, PRECISION,
            )  # fmt: skip

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < S * GROUP
    query = row // GROUP
    head = h_kv * GROUP + row % GROUP
    to = (b.to(tl.int64) * S + query) * H + head  # the row of o, [B, S, H]
    mask = live[:, None] & (dv < DV)[None, :]
    if SPLIT:
        to += tl.program_id(1).to(tl.int64) * rows
        tl.store(stats_ptr + to, top, mask=live)
        tl.store(stats_ptr + tl.cast(splits, tl.int64) * rows + to, total, mask=live)
        tl.store(partial_ptr + to[:, None] * DV + dv[None, :], acc, mask=mask & (total > 0.0)[:, None])
    else:
        factor, lse = _finished(total, top, rule, tl.minimum(head, H - 1))
        tl.store(o_ptr + to[:, None] * DV + dv[None, :], (acc * factor[:, None]).to(o_ptr.dtype.element_ty), mask=mask)
        tl.store(lse_ptr + (b.to(tl.int64) * H + head) * S + query, lse, mask=live)


@triton.jit(do_not_specialize=["H", "S", "rows", "splits"])
def _combine_kernel(
    partial_ptr, stats_ptr, o_ptr, lse_ptr, rule, H, S, rows, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """One row of o [B, S, H, Dv] from its shares."""
    row = tl.program_id(0).to(tl.int64)
    h = row % H
    dv = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    total = tl.zeros((), tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        at = split.to(tl.int64) * rows + row
        tops = tl.load(stats_ptr + at, mask=split < splits, other=float("-inf"))
        totals = tl.load(stats_ptr + tl.cast(splits, tl.int64) * rows + at, mask=split < splits, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(tops - base)
        shrink = tl.exp2(top - base)
        o = tl.load(
            partial_ptr + at[:, None] * DV + dv[None, :], mask=(totals > 0.0)[:, None] & (dv < DV)[None, :], other=0.0
        )
        acc = acc * shrink + tl.sum(o * weights[:, None], 0)
        total = total * shrink + tl.sum(totals * weights, 0)
        top = new_top
    factor, lse = _finished(total, top, rule, h)
    tl.store(o_ptr + row * DV + dv, (acc * factor).to(o_ptr.dtype.element_ty), mask=dv < DV)
    tl.store(lse_ptr + (row // (H * S) * H + h) * S + row // H % S, lse)


@cache
def _choose_splits(programs: int, most: int, sms: int) -> int:
    """The smallest number of shares, at most `most`, at which two programs to an SM leave few SMs idle at the end."""
    slots = 2 * sms
    filled = [programs * n / (-(-programs * n // slots) * slots) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(filled, 1) if share >= 0.9 * max(filled))


def _settings(q, block: int, rows: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_stages) for padded head width `block` and this many rows per key head."""
    block_m = max(16, min(64 if block < 256 else 32, triton.next_power_of_2(rows)))
    gpu = generation(q.device)
    if gpu == 0:
        return block_m, 16, 1
    block_n = _BLOCK_N[block] if q.element_size() == 2 else max(16, _BLOCK_N[block] // 4)
    # Two programs to an SM, each with two tiles on their way where there is room for it, else one.
    return block_m, block_n, 4 if gpu >= 90 and block_m <= 32 else 3


def decode_attention(
    q, k_cache, v_cache, lengths, page_table, key_starts, alibi, distances, sinks, left, scale, softcap, splits
):
    """-> o [B, S, H, Dv] in q's dtype, lse [B, H, S] fp32, natural logarithm. splits: how many shares, 0 to choose."""
    B, S, H, D = q.shape
    H_kv, DV = v_cache.shape[2:]
    o = torch.empty((B, S, H, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, S), dtype=torch.float32, device=q.device)
    page = 0 if page_table is None else k_cache.shape[1]
    places = k_cache.shape[1] if page_table is None else page * page_table.shape[1]
    if lse.numel() == 0 or places == 0 or k_cache.shape[0] == 0:
        return o.zero_(), lse.fill_(float("-inf"))
    q, lengths = unit_rows(q), lengths.contiguous()
    table = lengths if page_table is None else unit_rows(page_table)
    starts, slopes, by_distance, logits = (
        None if x is None else x.contiguous() for x in (key_starts, alibi, distances, sinks)
    )
    rule = Rule(
        align_seen=1, left=left if left >= 0 else None, right=0, key_lengths=lengths, key_starts=starts,
        softcap=softcap or None, alibi=slopes, distances=by_distance,
        reach=None if by_distance is None else by_distance.shape[1] // 2, sinks=logits,
    )  # fmt: skip
    group, block_d, block_dv = H // H_kv, padded(D), padded(DV)
    block_m, block_n, num_stages = _settings(q, max(block_d, block_dv), S * group)
    programs, shortest = B * H_kv * triton.cdiv(S * group, block_m), 1
    if splits == 0:
        # A share of fewer keys than these would spend its time on writing and reading what it has found.
        least = max(256, 16 * block_m)
        keys = min(places, left + S) if left >= 0 else places
        splits = _choose_splits(programs, max(1, min(_MOST_SPLITS, keys // least)), num_sms(q.device))
        shortest = least // block_n
    rows = B * S * H
    partial, stats = o, lse
    if splits > 1:
        partial = torch.empty((splits, rows, DV), dtype=torch.float32, device=q.device)
        stats = torch.empty((2, splits, rows), dtype=torch.float32, device=q.device)
    _decode_attention_kernel[(programs, splits)](
        q, k_cache, v_cache, table, o, lse, partial, stats, *q.stride()[:3], *k_cache.stride(), *v_cache.stride(),
        0 if page_table is None else table.stride(0), rule, H, group, S, places, k_cache.shape[0], rows, splits, shortest, scale,
        D=D, DV=DV, BLOCK_D=block_d, BLOCK_DV=block_dv, PAGE=page, BLOCK_M=block_m, BLOCK_N=block_n, SPLIT=splits > 1,
        PRECISION=dot_precision(q.dtype), num_warps=4, num_stages=num_stages,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(rows,)](
            partial, stats, o, lse, Rule(sinks=logits), H, S, rows, splits,
            DV=DV, BLOCK_DV=block_dv, BLOCK_SPLITS=_COMBINED, num_warps=4,
        )  # fmt: skip
    return o, lse
