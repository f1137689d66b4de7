"""Attention backward without atomics: a preprocess, one kernel for dK and dV, one for dQ; bitwise repeatable.

With P the probabilities, dP = dO V^T and delta = rowsum(dO * O) - dlse, the gradient of the scores is dS = P * (dP - delta);
then dV = P^T dO, dK = dS^T Q * scale, dQ = dS K * scale. The dK dV kernel computes the scores as K Q^T, keys down the rows:
transposing an accumulator instead (`tl.dot(tl.trans(P), dO)`) is miscompiled on Hopper by Triton 3.4 to 3.7.0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_common import (
    LARGE_MEMORY,
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

# (BLOCK_M, BLOCK_N, num_warps, num_stages) of dK dV (BLOCK_N keys stay, BLOCK_M queries pass) and of dQ (the reverse), by
# padded head width; shared memory as in attention.py.
_LARGE = {
    16: ((64, 128, 8, 3), (128, 64, 8, 3)),
    32: ((64, 128, 8, 3), (128, 64, 8, 3)),
    64: ((64, 128, 8, 3), (128, 64, 8, 3)),
    128: ((64, 128, 8, 3), (128, 64, 8, 3)),
    256: ((32, 64, 8, 2), (64, 32, 8, 2)),
}
_SMALL = {
    16: ((64, 128, 8, 3), (128, 64, 8, 3)),
    32: ((64, 128, 8, 3), (128, 64, 8, 3)),
    64: ((64, 128, 8, 3), (128, 64, 8, 3)),
    128: ((64, 64, 8, 2), (64, 64, 4, 2)),
    256: ((32, 32, 8, 2), (32, 32, 4, 1)),
}
_EDGE = 32  # queries per step where the causal mask cuts: what a mask costs in registers is saved in the tile
_MAX_BLOCK_M = 128


@triton.jit(do_not_specialize=["stride_lb", "stride_lh", "stride_ls", "H", "S", "S_padded"])
def _attention_stats_kernel(
    dout_ptr, o_ptr, dlse_ptr, lse_ptr, norm_ptr, delta_ptr,
    stride_db, stride_ds, stride_dh, stride_lb, stride_lh, stride_ls, H, S, S_padded,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """norm: lse in base 2, or +inf for queries that see nothing or do not exist: their probabilities come out as 0."""
    tiles = S_padded // BLOCK_M
    head = tl.program_id(0) // tiles
    query = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    rows = query.to(tl.int64)
    e = tl.arange(0, BLOCK_DV)
    mask = live(query, S, DV, BLOCK_M, BLOCK_DV, True)
    dout = tl.load(
        dout_ptr + b * stride_db + h * stride_dh + rows[:, None] * stride_ds + e[None, :], mask=mask, other=0.0
    )
    o = tl.load(o_ptr + ((b * S + rows)[:, None] * H + h) * DV + e[None, :], mask=mask, other=0.0)
    lse = tl.load(lse_ptr + head.to(tl.int64) * S + query, mask=query < S, other=float("-inf"))
    dead = lse == float("-inf")
    delta = tl.sum(dout.to(tl.float32) * o.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + b * stride_lb + h * stride_lh + rows * stride_ls, mask=query < S, other=0.0)
    at = head.to(tl.int64) * S_padded + query
    tl.store(norm_ptr + at, tl.where(dead, float("inf"), lse * LOG2E))
    # What comes back through an lse of -inf may be anything.
    tl.store(delta_ptr + at, tl.where(dead, 0.0, delta))


@triton.jit
def _add_to_dkdv(
    dk, dv, k, v, q_ptr, dout_ptr, norm_ptr, delta_ptr, stride_qs, stride_qh, stride_ds, stride_dh, lo, hi, first_query,
    GROUP, S, S_padded, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds queries [lo, hi) of every head of the group to dk (unscaled) and dv. Key n is seen from first_query[n] on.

    One loop over heads and tiles, so that loads run ahead from one head into the next; its order is fixed, so the sum is
    repeatable. hi is S or lo plus whole tiles.
    """
    m = tl.arange(0, BLOCK_M)
    rows = m.to(tl.int64)[:, None]
    q_ptrs = q_ptr + rows * stride_qs + tl.arange(0, BLOCK_D)[None, :]
    dout_ptrs = dout_ptr + rows * stride_ds + tl.arange(0, BLOCK_DV)[None, :]
    column = (m.to(tl.float32) + 0.5) * 1048576.0
    head = tl.zeros((), tl.int64)
    start = lo
    for _ in range(0, GROUP * tl.cdiv(hi - lo, BLOCK_M)):
        query = start + m
        start64 = start.to(tl.int64)
        q = tl.load(q_ptrs + (head * stride_qh + start64 * stride_qs), other=0.0,
                    mask=live(query, S, D, BLOCK_M, BLOCK_D, True))  # fmt: skip
        dout = tl.load(dout_ptrs + (head * stride_dh + start64 * stride_ds), other=0.0,
                       mask=live(query, S, DV, BLOCK_M, BLOCK_DV, True))  # fmt: skip
        stats = head * S_padded + start64 + m
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        logits = scores * scale_log2 - tl.load(norm_ptr + stats)[None, :]
        if MASKED:
            # min with +-2^19 or more instead of a select: booleans of a whole tile cost 50 registers here.
            behind = tl.maximum(tl.minimum(first_query - start, 65536), -65536).to(tl.float32) * 1048576.0
            logits = tl.minimum(logits, column[None, :] - behind[:, None])
        probs = tl.exp2(logits)
        dv = tl.dot(probs.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dprobs = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dscores = probs * (dprobs - tl.load(delta_ptr + stats)[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
        last = start + BLOCK_M >= hi
        start = tl.where(last, lo, start + BLOCK_M)
        head += last.to(tl.int64)
    return dk, dv


@triton.jit(do_not_specialize=["H", "GROUP", "S", "T", "heads", "section"])
def _attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, norm_ptr, delta_ptr, dk_ptr, dv_ptr, lengths_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_ds, stride_dh,
    H, GROUP, S, S_padded, T, heads, section, scale, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CORNER: tl.constexpr, HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr,
):  # fmt: skip
    # Under a causal mask the first keys are seen by the most queries: the longest tiles come first as they are.
    head, tile = head_and_tile(tl.cdiv(T, BLOCK_N), heads, section, False)
    H_kv = H // GROUP
    b = (head // H_kv).to(tl.int64)
    h_kv = (head % H_kv).to(tl.int64)
    first = tile * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    limit, offset = key_limits(lengths_ptr, b, S, T, CORNER, HAS_LENGTHS)
    rows = key.to(tl.int64)[:, None]
    k = tl.load(k_ptr + b * stride_kb + h_kv * stride_kh + rows * stride_kt + d[None, :], other=0.0,
                mask=live(key, limit, D, BLOCK_N, BLOCK_D, True))  # fmt: skip
    v = tl.load(v_ptr + b * stride_vb + h_kv * stride_vh + rows * stride_vt + e[None, :], other=0.0,
                mask=live(key, limit, DV, BLOCK_N, BLOCK_DV, True))  # fmt: skip

    # Queries [lo, whole) see a part of this tile, those from whole on all of it (or, past the limit, nobody anything).
    lo = tl.zeros((), tl.int32)
    whole = tl.zeros((), tl.int32)
    if CORNER != 0:
        lo = tl.maximum(first - offset, 0) // BLOCK_EDGE * BLOCK_EDGE
        whole = tl.cdiv(tl.maximum(first + BLOCK_N - 1 - offset, 0), BLOCK_EDGE) * BLOCK_EDGE
        whole = tl.minimum(whole, S)
    if HAS_LENGTHS:
        lo = tl.where(first < limit, lo, S)
        whole = tl.where(first < limit, whole, S)

    first_head = h_kv * GROUP
    q_ptr += b * stride_qb + first_head * stride_qh
    dout_ptr += b * stride_db + first_head * stride_dh
    stats = (b * H + first_head) * S_padded
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    # Each loop stands in an `if` that rules out zero rounds: without it ptxas serialises the wgmma of the loop (C7515).
    if CORNER != 0:  # noqa: SIM102 - the outer test is made at compile time
        if lo < whole:
            dk, dv = _add_to_dkdv(
                dk, dv, k, v, q_ptr, dout_ptr, norm_ptr + stats, delta_ptr + stats,
                stride_qs, stride_qh, stride_ds, stride_dh, lo, whole, key - offset, GROUP, S, S_padded, scale_log2,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_EDGE, True, PRECISION,
            )  # fmt: skip
    if whole < S:
        dk, dv = _add_to_dkdv(
            dk, dv, k, v, q_ptr, dout_ptr, norm_ptr + stats, delta_ptr + stats,
            stride_qs, stride_qh, stride_ds, stride_dh, whole, S, key - offset, GROUP, S, S_padded, scale_log2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, False, PRECISION,
        )  # fmt: skip

    # Rows past the limit were computed from zeros instead of keys and belong to nobody. Positions within the tile are made
    # anew here, in 32 bits: nothing to keep in registers through the loops.
    n = tl.arange(0, BLOCK_N)
    seen = (n < limit - first)[:, None]
    base = (b * T + first) * H_kv + h_kv
    tl.store(dk_ptr + base * D + (n[:, None] * (H_kv * D) + d[None, :]),
             tl.where(seen, dk * scale, 0.0).to(dk_ptr.dtype.element_ty),
             mask=live(n, T - first, D, BLOCK_N, BLOCK_D, True))  # fmt: skip
    tl.store(dv_ptr + base * DV + (n[:, None] * (H_kv * DV) + e[None, :]),
             tl.where(seen, dv, 0.0).to(dv_ptr.dtype.element_ty),
             mask=live(n, T - first, DV, BLOCK_N, BLOCK_DV, True))  # fmt: skip


@triton.jit
def _add_to_dq(
    dq, q, dout, norm, delta, k_ptrs, v_ptrs, stride_kt, stride_vt, lo, hi, query, limit, offset, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    CORNER: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the key tiles [lo, hi) to dq (unscaled)."""
    for start in range(lo, hi, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptrs + tl.cast(start, tl.int64) * stride_kt, other=0.0,
                    mask=live(key, limit, D, BLOCK_N, BLOCK_D, MASKED))  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        probs = tl.exp2(scores * scale_log2 - norm[:, None])
        if MASKED:
            probs = tl.where(visible(query[:, None], key[None, :], limit, offset, CORNER), probs, 0.0)
        v = tl.load(v_ptrs + tl.cast(start, tl.int64) * stride_vt, other=0.0,
                    mask=live(key, limit, DV, BLOCK_N, BLOCK_DV, MASKED))  # fmt: skip
        dprobs = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dscores = probs * (dprobs - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["H", "GROUP", "S", "T", "heads", "section"])
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, norm_ptr, delta_ptr, dq_ptr, lengths_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_ds, stride_dh,
    H, GROUP, S, S_padded, T, heads, section, scale, scale_log2,
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
    rows = query.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    limit, offset = key_limits(lengths_ptr, b, S, T, CORNER, HAS_LENGTHS)
    stats = head.to(tl.int64) * S_padded
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + rows[:, None] * stride_qs + d[None, :],
                mask=live(query, S, D, BLOCK_M, BLOCK_D, True), other=0.0)  # fmt: skip
    dout = tl.load(dout_ptr + b * stride_db + h * stride_dh + rows[:, None] * stride_ds + e[None, :],
                   mask=live(query, S, DV, BLOCK_M, BLOCK_DV, True), other=0.0)  # fmt: skip
    norm = tl.load(norm_ptr + stats + query)
    delta = tl.load(delta_ptr + stats + query)
    k_ptrs = k_ptr + b * stride_kb + h_kv * stride_kh + n[:, None] * stride_kt + d[None, :]
    v_ptrs = v_ptr + b * stride_vb + h_kv * stride_vh + n[:, None] * stride_vt + e[None, :]

    hi = limit  # keys that some query of the tile sees
    whole = limit  # keys that all of them see
    if CORNER != 0:
        hi = tl.minimum(limit, tl.maximum(tl.minimum(first + BLOCK_M, S) + offset, 0))
        whole = tl.minimum(limit, tl.maximum(first + offset + 1, 0))
    whole = whole // BLOCK_N * BLOCK_N

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if whole > 0:
        dq = _add_to_dq(
            dq, q, dout, norm, delta, k_ptrs, v_ptrs, stride_kt, stride_vt, 0, whole, query, limit, offset, scale_log2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CORNER, False, PRECISION,
        )  # fmt: skip
    if whole < hi:
        dq = _add_to_dq(
            dq, q, dout, norm, delta, k_ptrs, v_ptrs, stride_kt, stride_vt, whole, hi, query, limit, offset, scale_log2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CORNER, True, PRECISION,
        )  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    tl.store(dq_ptr + ((b * S + first) * H + h) * D + (m[:, None] * (H * D) + d[None, :]),
             (dq * scale).to(dq_ptr.dtype.element_ty),
             mask=live(m, S - first, D, BLOCK_M, BLOCK_D, True))  # fmt: skip


def _settings(q, block):
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) of dK dV and of dQ for padded head width `block`."""
    memory = shared_memory(q.device)
    if memory == 0:
        return (16, 16, 4, 1), (16, 16, 4, 1)
    if q.dtype == torch.float32:  # twice the bytes, and products without tensor cores
        return ((16, 32, 8, 2), (32, 16, 8, 2)) if block <= 128 else ((16, 16, 8, 2), (16, 16, 8, 2))
    return (_LARGE if memory >= LARGE_MEMORY else _SMALL)[block]


def _stats(dout, dlse, o, lse):
    """norm and delta = rowsum(dO * O) - dlse of every query, each [B, H, S_padded] fp32: whole tiles need no mask."""
    B, S, H, DV = o.shape
    S_padded = triton.cdiv(S + _MAX_BLOCK_M, _MAX_BLOCK_M) * _MAX_BLOCK_M
    stats = torch.empty((2, B, H, S_padded), dtype=torch.float32, device=o.device)
    block_m = 64 if triton.next_power_of_2(DV) <= 128 else 32
    dlse_or_any = lse if dlse is None else dlse
    _attention_stats_kernel[(S_padded // block_m * B * H,)](
        dout, o, dlse_or_any, lse, stats[0], stats[1],
        *dout.stride()[:3], *dlse_or_any.stride(), H, S, S_padded,
        DV=DV, BLOCK_DV=triton.next_power_of_2(DV), HAS_DLSE=dlse is not None, BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip
    return stats[0], stats[1]


def attention_bwd(dout, dlse, q, k, v, o, lse, key_lengths, corner, scale):
    """-> dq [B, S, H, Dh], dk [B, T, H_kv, Dh], dv [B, T, H_kv, Dv] in q's dtype."""
    q, k, v, dout, o = unit_rows(q), unit_rows(k), unit_rows(v), unit_rows(dout), o.contiguous()
    B, S, H, D = q.shape
    T, H_kv, DV = v.shape[1:]
    dq = torch.empty((B, S, H, D), dtype=q.dtype, device=q.device)
    dk = torch.empty((B, T, H_kv, D), dtype=k.dtype, device=k.device)
    dv = torch.empty((B, T, H_kv, DV), dtype=v.dtype, device=v.device)
    if dq.numel() == 0 or T == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    norm, delta = _stats(dout, dlse, o, lse)
    lengths = lse if key_lengths is None else key_lengths.contiguous()
    block_d, block_dv = padded(D), padded(DV)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    options = {
        "D": D, "DV": DV, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "CORNER": corner,
        "HAS_LENGTHS": key_lengths is not None, "PRECISION": dot_precision(q.dtype),
    }  # fmt: skip
    row_bytes = (D + DV) * q.element_size()
    (m1, n1, warps1, stages1), (m2, n2, warps2, stages2) = _settings(q, max(block_d, block_dv))
    section = heads_per_section(B * H_kv, S, row_bytes * (H // H_kv))
    _attention_dkdv_kernel[(triton.cdiv(T, n1) * B * H_kv,)](
        q, k, v, dout, norm, delta, dk, dv, lengths, *strides,
        H, H // H_kv, S, norm.shape[2], T, B * H_kv, section, scale, scale * LOG2E.value,
        **options, BLOCK_M=m1, BLOCK_N=n1, BLOCK_EDGE=min(m1, _EDGE), num_warps=warps1, num_stages=stages1,
    )  # fmt: skip
    section = heads_per_section(B * H_kv, T, row_bytes) * (H // H_kv)
    _attention_dq_kernel[(triton.cdiv(S, m2) * B * H,)](
        q, k, v, dout, norm, delta, dq, lengths, *strides,
        H, H // H_kv, S, norm.shape[2], T, B * H, section, scale, scale * LOG2E.value,
        **options, BLOCK_M=m2, BLOCK_N=n2, num_warps=warps2, num_stages=stages2,
    )  # fmt: skip
    return dq, dk, dv
