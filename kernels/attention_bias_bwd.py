"""Gradients of what attention adds to its scores: the bias, and the relative bias by distance. No atomics; see attention_bwd.py.

Each program owns a piece of the result and sums over whatever was broadcast to it, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_common import generation, place_of, row_base, stats_row
from .attention_dq import dscores_of
from .attention_scores import block_seen


@triton.jit
def _dscores_at(
    q_ptr, k_ptr, v_ptr, dout_ptr, norm_ptr, delta_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_ds, stride_dh, rule, place, H, GROUP, S_padded, scale, first, start,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS [BLOCK_M, BLOCK_N] of the tile of queries from `first` and keys from `start` on; 0 outside (either may be negative)."""
    query = first + tl.arange(0, BLOCK_M)
    mine = (query >= 0) & (query < place.S)
    rows = query.to(tl.int64)[:, None]
    keys = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    e = tl.arange(0, BLOCK_DV)[None, :]
    h_kv = place.h // GROUP
    q_ptr += row_base(rule, place.b, place.q_row, place.h, stride_qb, stride_qs, stride_qh)
    dout_ptr += row_base(rule, place.b, place.q_row, place.h, stride_db, stride_ds, stride_dh)
    k_ptr += row_base(rule, place.b, place.k_row, h_kv, stride_kb, stride_kt, stride_kh)
    v_ptr += row_base(rule, place.b, place.k_row, h_kv, stride_vb, stride_vt, stride_vh)
    q = tl.load(q_ptr + rows * stride_qs + d, mask=mine[:, None] & (d < D), other=0.0)
    dout = tl.load(dout_ptr + rows * stride_ds + e, mask=mine[:, None] & (e < DV), other=0.0)
    stats = stats_row(rule, place, H, S_padded)
    norm = tl.load(norm_ptr + stats + query, mask=mine, other=float("inf"))
    delta = tl.load(delta_ptr + stats + query, mask=mine, other=0.0)
    dscores, _, _ = dscores_of(
        q, dout, norm, delta, k_ptr + keys * stride_kt + d, v_ptr + keys * stride_vt + e, start, first, query, None,
        rule, place, H, scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    if rule.blocks is not None:
        dscores = tl.where(block_seen(rule, place, first, start, BLOCK_M, BLOCK_N), dscores, 0.0)
    return dscores


@triton.jit(do_not_specialize=["H", "GROUP", "S", "S_padded", "T", "sequences"])
def _attention_dbias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, norm_ptr, delta_ptr, dbias_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_ds, stride_dh, rule, H, GROUP, S, S_padded, T, sequences, scale, Bb, Hb, rows, columns,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ALL_B: tl.constexpr, ALL_H: tl.constexpr, ALL_Q: tl.constexpr, ALL_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of a bias [Bb, Hb, rows, columns]; ALL_x: that axis is broadcast, and summed over."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    tile_m = pid // tiles_n % tiles_m
    own_h = pid // (tiles_n * tiles_m) % Hb
    own_b = pid // (tiles_n * tiles_m * Hb)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, (sequences if ALL_B else 1) * (H if ALL_H else 1)):
        h = own_h
        b = own_b
        if ALL_H:
            h = i % H
        if ALL_B:
            b = i // (H if ALL_H else 1)
        place = place_of(rule, b + tl.zeros((), tl.int32), h + tl.zeros((), tl.int32), S, T)
        for first in range(0 if ALL_Q else tile_m * BLOCK_M, place.S if ALL_Q else (tile_m + 1) * BLOCK_M, BLOCK_M):
            for start in range(
                0 if ALL_K else tile_n * BLOCK_N, place.limit if ALL_K else (tile_n + 1) * BLOCK_N, BLOCK_N
            ):
                acc += _dscores_at(
                    q_ptr, k_ptr, v_ptr, dout_ptr, norm_ptr, delta_ptr, stride_qb, stride_qs, stride_qh,
                    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_db, stride_ds, stride_dh,
                    rule, place, H, GROUP, S_padded, scale, first, start, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
                )  # fmt: skip
    base = (own_b.to(tl.int64) * Hb + own_h) * rows
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    kind = dbias_ptr.dtype.element_ty
    if ALL_Q and ALL_K:
        tl.store(dbias_ptr + base * columns, tl.sum(tl.sum(acc, 1), 0).to(kind))
    elif ALL_Q:
        tl.store(dbias_ptr + base * columns + n, tl.sum(acc, 0).to(kind), mask=n < columns)
    elif ALL_K:
        tl.store(dbias_ptr + base + m, tl.sum(acc, 1).to(kind), mask=m < rows)
    else:
        at = dbias_ptr + (base + m.to(tl.int64))[:, None] * columns + n[None, :]
        tl.store(at, acc.to(kind), mask=(m < rows)[:, None] & (n < columns)[None, :])


@triton.jit(do_not_specialize=["H", "GROUP", "S", "S_padded", "T", "sequences"])
def _attention_ddistances_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, norm_ptr, delta_ptr, sums_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_ds, stride_dh, rule, H, GROUP, S, S_padded, T, sequences, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SLOTS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of dS by distance, over the queries of one tile of every sequence.

    Tiles of keys are laid from the diagonal, so that every tile of slot i holds distances
    (i - SLOTS // 2) * BLOCK + (-BLOCK, BLOCK): sums[h, tile, i, 0] those from the slot's own distance on, sums[h, tile, i, 1]
    the BLOCK before. All that lies before (after) the other slots' is in the first (last) slot, in no order.
    """
    tiles = tl.num_programs(0) // H
    h = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    m = tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK)
    wrapped = m[:, None] + n[None, :]  # column n of the sheared tile holds distance n, then n - BLOCK
    out = tl.program_id(0).to(tl.int64)
    for slot in range(0, SLOTS):
        far = (slot == 0) | (slot == SLOTS - 1)
        upper = tl.zeros((BLOCK,), tl.float32)
        lower = tl.zeros((BLOCK,), tl.float32)
        for b in range(0, sequences):
            place = place_of(rule, b + tl.zeros((), tl.int32), h + tl.zeros((), tl.int32), S, T)
            shift = place.offset & 3  # so that tiles of keys begin at a multiple of 4, as dropout's words do
            first = tile * BLOCK - shift
            lo = first + place.offset + (slot - SLOTS // 2) * BLOCK
            hi = lo + 1
            hi = tl.where(slot == 0, lo + BLOCK, tl.where(slot == SLOTS - 1, place.limit, hi))
            lo = tl.where(slot == 0, lo - tl.cdiv(tl.maximum(hi, 0), BLOCK) * BLOCK, lo)
            hi = tl.where(first < place.S, hi, lo)
            for start in range(lo, hi, BLOCK):
                dscores = _dscores_at(
                    q_ptr, k_ptr, v_ptr, dout_ptr, norm_ptr, delta_ptr, stride_qb, stride_qs, stride_qh,
                    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_db, stride_ds, stride_dh,
                    rule, place, H, GROUP, S_padded, scale, first, start, D, DV, BLOCK_D, BLOCK_DV, BLOCK, BLOCK, PRECISION,
                )  # fmt: skip
                if far:
                    upper += tl.sum(dscores, 0)
                else:
                    sheared = tl.gather(dscores, wrapped % BLOCK, 1)
                    upper += tl.sum(tl.where(wrapped < BLOCK, sheared, 0.0), 0)
                    lower += tl.sum(tl.where(wrapped < BLOCK, 0.0, sheared), 0)
        at = sums_ptr + (out * SLOTS + slot) * (2 * BLOCK)
        tl.store(at + n, upper)
        tl.store(at + BLOCK + n, lower)


def bias_bwd(a, rule, tensors, strides, options):
    """The gradient of a.bias, in its shape and dtype."""
    B, H, rows, columns = a.bias.shape
    S, T, heads = a.q.shape[1], a.k.shape[1], a.q.shape[2]
    dbias = torch.empty(a.bias.shape, dtype=a.bias.dtype, device=a.bias.device)
    small = generation(a.q.device) == 0
    block_m, block_n = (16, 16) if small else (32, 32) if a.q.dtype == torch.float32 else (64, 32)
    options = {key: value for key, value in options.items() if key != "MASKED"}
    _attention_dbias_kernel[(B * H * triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),)](
        *tensors, dbias, *strides, rule, heads, heads // a.k.shape[2], S, tensors[4].shape[2], T, a.sequences, a.scale,
        B, H, rows, columns, **options, ALL_B=B == 1, ALL_H=H == 1, ALL_Q=rows == 1, ALL_K=columns == 1,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, num_stages=1,
    )  # fmt: skip
    return dbias


def distances_bwd(a, rule, tensors, strides, options):
    """The gradient of a.distances [H, 2 R + 1]."""
    S, T, H = a.q.shape[1], a.k.shape[1], a.q.shape[2]
    reach = a.distances.shape[1] // 2
    block = {0: 16, 80: 32}.get(generation(a.q.device), 64)
    half = triton.cdiv(reach, block)
    slots = 2 * half + 3
    tiles = triton.cdiv(S + 3, block)
    parts = torch.empty((H, tiles, slots, 2, block), dtype=torch.float32, device=a.q.device)
    if rule.key_starts is None:  # keys before the first must not be read
        rule = rule._replace(key_starts=torch.zeros(a.sequences, dtype=torch.int32, device=a.q.device))
    options = {key: value for key, value in options.items() if key != "MASKED"}
    _attention_ddistances_kernel[(H * tiles,)](
        *tensors, parts, *strides, rule, H, H // a.k.shape[2], S, tensors[4].shape[2], T, a.sequences, a.scale,
        **options, SLOTS=slots, BLOCK=block, num_warps=4, num_stages=1,
    )  # fmt: skip
    parts = parts.sum(1)
    near, far = parts[:, 1:-1], parts[:, :: slots - 1, 0].sum(-1)
    # sums[:, i]: distance i - (half + 1) * block
    sums = torch.zeros((H, (slots - 1) * block), dtype=torch.float32, device=a.q.device)
    sums[:, block:] += near[:, :, 0].flatten(1)
    sums[:, :-block] += near[:, :, 1].flatten(1)
    zero = (half + 1) * block
    grads = sums[:, zero - reach : zero + reach + 1].clone()
    grads[:, 0] += sums[:, : zero - reach].sum(1) + far[:, 0]
    grads[:, -1] += sums[:, zero + reach + 1 :].sum(1) + far[:, 1]
    return grads.to(a.distances.dtype)
