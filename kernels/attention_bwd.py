"""Attention backward without atomics: a preprocess, one kernel for dK and dV, one for dQ; bitwise repeatable.

With P the probabilities, dP = dO V^T and delta = rowsum(dO * O) - dlse, the gradient of the scores is dS = P * (dP - delta);
then dV = P^T dO, dK = dS^T Q * scale, dQ = dS K * scale. The dK dV kernel computes the scores as K Q^T, keys down the rows:
transposing an accumulator instead (`tl.dot(tl.trans(P), dO)`) is miscompiled on Hopper by Triton 3.4 to 3.7.0.
Dropout's mask D = keep / (1 - p) goes into dV = (P D)^T dO and dS = P * (D dP - delta); softcap's tanh gives its slope.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_bias_bwd import bias_bwd, distances_bwd
from .attention_call import Arguments, rule_of, settings_class
from .attention_common import (
    LOG2E,
    dot_precision,
    generation,
    heads_per_section,
    interpreted_block,
    live,
    padded,
    unit_rows,
)
from .attention_dkdv import _attention_dkdv_kernel
from .attention_dq import _attention_dq_kernel

# (BLOCK_M, BLOCK_N, num_warps, num_stages) of dK dV (BLOCK_N keys stay, BLOCK_M queries pass) and of dQ (the reverse), by
# generation and padded head width; see attention.py.
_WIDE = ((64, 128, 8, 3), (128, 64, 8, 3))
_HOT = {
    80: {16: _WIDE, 32: _WIDE, 64: _WIDE, 128: ((64, 64, 8, 2), (64, 64, 4, 2)), 256: ((32, 32, 8, 2), (32, 32, 4, 1))},
    90: {16: _WIDE, 32: _WIDE, 64: _WIDE, 128: _WIDE, 256: ((32, 64, 8, 2), (64, 32, 8, 2))},
    100: {
        16: _WIDE,
        32: _WIDE,
        64: _WIDE,
        128: ((64, 128, 8, 3), (128, 64, 8, 2)),
        256: ((32, 64, 8, 2), (64, 32, 8, 2)),
    },
}
_SMALL = ((32, 64, 8, 2), (64, 32, 8, 2))
_SQUARE = ((64, 64, 8, 2), (64, 64, 8, 2))
_TINY = ((32, 32, 8, 1), (32, 32, 8, 1))
_HEAVY = {
    80: {16: _SMALL, 32: _SMALL, 64: _SMALL, 128: _SMALL, 256: _TINY},
    90: {16: _SQUARE, 32: _SQUARE, 64: _SQUARE, 128: _SMALL, 256: _TINY},
    100: {16: _SQUARE, 32: _SQUARE, 64: _SQUARE, 128: _SMALL, 256: _TINY},
}
_BLOCKS = {80: _SQUARE, 90: ((32, 128, 8, 3), (128, 64, 8, 2)), 100: ((32, 64, 8, 2), (128, 64, 8, 2))}  # to width 128
_EDGE = 32  # queries per step where a mask cuts: what a mask costs in registers is saved in the tile
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


def _settings(a: Arguments, block: int):
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) of dK dV and of dQ for padded head width `block`."""
    machine = generation(a.q.device)
    if machine == 0:
        block = interpreted_block(a.q.shape[1], a.k.shape[1])
        return ((block, block, 4, 1),) * 2
    if a.q.dtype == torch.float32:  # twice the bytes, and products without tensor cores
        return ((16, 32, 8, 2), (32, 16, 8, 2)) if block <= 128 else ((16, 16, 8, 2), (16, 16, 8, 2))
    kind = settings_class(a)
    if kind == "heavy" or (kind == "blocks" and block > 128):
        return _HEAVY[machine][block]
    if kind == "blocks":
        return _BLOCKS[machine]
    dkdv, dq = _HOT[machine][block]
    if a.left >= 0:  # one more edge, and its registers
        dkdv = (32, *dkdv[1:])
    return dkdv, dq


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


def attention_bwd(dout, dlse, o, lse, wanted, *args):
    """-> dq [B, S, H, Dh], dk [B, T, H_kv, Dh], dv [B, T, H_kv, Dv] in q's dtype; dbias, ddistances, dsinks, [0] if not wanted.

    args: ops.attention_reference.Call. wanted: whether the last three are.
    """
    a = Arguments.of(*args)
    dout, o = unit_rows(dout), o.contiguous()
    B, S, H, D = a.q.shape
    T, H_kv, DV = a.v.shape[1:]
    dq = torch.empty((B, S, H, D), dtype=a.q.dtype, device=a.q.device)
    dk = torch.empty((B, T, H_kv, D), dtype=a.q.dtype, device=a.q.device)
    dv = torch.empty((B, T, H_kv, DV), dtype=a.q.dtype, device=a.q.device)
    if dq.numel() == 0 or T == 0 or a.sequences == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), *(_nothing(x, a.q) if not w else torch.empty_like(x).zero_()
                                                     for x, w in zip((a.bias, a.distances, a.sinks), wanted))  # fmt: skip
    if a.packed:  # rows of no sequence, see attention.py
        dq.zero_(), dk.zero_(), dv.zero_()
    norm, delta = _stats(dout, dlse, o, lse)
    block_d, block_dv = padded(D), padded(DV)
    tensors = (a.q, a.k, a.v, dout, norm, delta)
    strides = (*a.strides(), *dout.stride()[:3])
    options = {
        "D": D, "DV": DV, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "MASKED": a.masked_blocks,
        "PRECISION": dot_precision(a.q.dtype),
    }  # fmt: skip
    row_bytes = (D + DV) * a.q.element_size()
    (m1, n1, warps1, stages1), (m2, n2, warps2, stages2) = _settings(a, max(block_d, block_dv))
    rule = rule_of(a, "columns")
    if rule.blocks is not None:
        m1, n1, m2, n2 = (min(n, most) for n, most in zip((m1, n1, m2, n2), (rule.block_q, rule.block_k) * 2))
    section = heads_per_section(B * H_kv, S, row_bytes * (H // H_kv))
    _attention_dkdv_kernel[((triton.cdiv(T, n1) + a.extra_tiles) * B * H_kv,)](
        *tensors, dk, dv, *strides, rule, H, H // H_kv, S, norm.shape[2], T, B * H_kv, section, a.scale,
        **options, BLOCK_M=m1, BLOCK_N=n1, BLOCK_EDGE=min(m1, _EDGE), num_warps=warps1, num_stages=stages1,
    )  # fmt: skip
    rule = rule_of(a, "rows")
    section = heads_per_section(B * H_kv, T, row_bytes) * (H // H_kv)
    _attention_dq_kernel[((triton.cdiv(S, m2) + a.extra_tiles) * B * H,)](
        *tensors, dq, *strides, rule, H, H // H_kv, S, norm.shape[2], T, B * H, section, a.scale,
        **options, LAST_FIRST=a.right == 0, BLOCK_M=m2, BLOCK_N=n2, num_warps=warps2, num_stages=stages2,
    )  # fmt: skip
    dbias = bias_bwd(a, rule, tensors, strides, options) if wanted[0] else _nothing(a.bias, a.q)
    ddistances = distances_bwd(a, rule, tensors, strides, options) if wanted[1] else _nothing(a.distances, a.q)
    dsinks = _nothing(a.sinks, a.q)
    if wanted[2]:  # the sink's own weight, times the gradient of its logit
        weight = torch.exp2(a.sinks.float()[:, None] * LOG2E.value - norm)
        dsinks = -(weight * delta).sum((0, 2)).to(a.sinks.dtype)
    return dq, dk, dv, dbias, ddistances, dsinks


def _nothing(x, q):
    return torch.empty(0, dtype=(q if x is None else x).dtype, device=q.device)
