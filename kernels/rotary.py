"""Rotary position embedding of q and k in one launch; the backward is the same kernel with the angle negated.

A program owns BLOCK_T tokens and GROUP of the H + H_kv heads: it loads the angles of its tokens once and turns head after
head. Heads are read where they lie, at any strides but the last, so views of one fused product need no copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_GROUP = 4


@triton.jit
def _turn_heads(
    x_row, y_row, stride_xh, first, last, cos, sin, live,
    INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Heads first .. last-1 of one tensor. x_row, y_row: pointers [BLOCK_T, 1] to head 0 of each token."""
    stride_xh = tl.cast(stride_xh, tl.int64)
    for head in range(first, last):
        x = x_row + head * stride_xh
        y = y_row + head * WIDTH
        if INTERLEAVED:
            col = tl.arange(0, 2 * BLOCK_HALF)[None, :]
            mask = live if BLOCK_HALF == HALF else live & (col < 2 * HALF)
            pairs = tl.load(x + col, mask=mask, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(pairs, (pairs.shape[0], BLOCK_HALF, 2)))
            turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), pairs.shape)
            tl.store(y + col, turned.to(y_row.dtype.element_ty), mask=mask)
        else:
            col = tl.arange(0, BLOCK_HALF)[None, :]
            mask = live if BLOCK_HALF == HALF else live & (col < HALF)
            a = tl.load(x + col, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(x + HALF + col, mask=mask, other=0.0).to(tl.float32)
            tl.store(y + col, (a * cos - b * sin).to(y_row.dtype.element_ty), mask=mask)
            tl.store(y + HALF + col, (b * cos + a * sin).to(y_row.dtype.element_ty), mask=mask)
        if WIDTH > 2 * HALF:
            col = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
            mask = live & (col < WIDTH)
            tl.store(y + col, tl.load(x + col, mask=mask, other=0.0), mask=mask)


@triton.jit
def _sequence_of(token, cu_ptr, sequences, steps):
    """The last sequence that begins at or before each token: a bisection of sequences - 1 < 2 ** steps starts.

    Reads cu[0 .. sequences - 1] only, whatever the values: they are not checked on a GPU.
    """
    low = tl.zeros_like(token)
    high = low + (sequences - 1)
    for _ in range(steps):
        middle = (low + high + 1) // 2
        begun = tl.load(cu_ptr + middle) <= token
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    return low


_NEVER_ONE = [
    "H", "H_kv", "S", "S_max", "tokens", "offset", "sequences", "steps", "stride_pb", "stride_ps", "stride_start",
]  # fmt: skip


@triton.jit(do_not_specialize=_NEVER_ONE, do_not_specialize_on_alignment=["positions_ptr", "starts_ptr", "cu_ptr"])
def _rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, starts_ptr, cu_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_cos, stride_sin,
    stride_pb, stride_ps, stride_start,
    H, H_kv, S, S_max, tokens, offset, sequences, steps,
    HAS_POSITIONS: tl.constexpr, HAS_STARTS: tl.constexpr, PACKED: tl.constexpr, INVERSE: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    batch, place = (token // S).to(tl.int64), (token % S).to(tl.int64)
    position, sequence = place + offset, batch
    if PACKED:
        sequence = _sequence_of(token, cu_ptr, sequences, steps).to(tl.int64)
        position = position - tl.load(cu_ptr + sequence)
    if HAS_STARTS:
        position += tl.load(starts_ptr + sequence * stride_start, mask=token < tokens, other=0)
    if HAS_POSITIONS:
        position = tl.load(positions_ptr + batch * stride_pb + place * stride_ps, mask=token < tokens, other=0)
    position = tl.minimum(tl.maximum(position, 0), S_max - 1)
    live = (token < tokens)[:, None]
    batch, place, position, token64 = batch[:, None], place[:, None], position[:, None], token.to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK_HALF)[None, :]
    mask = live if BLOCK_HALF == HALF else live & (col < HALF)
    cos = tl.load(cos_ptr + position * stride_cos + col, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * stride_sin + col, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    # The heads of q and k are counted through; those of this group that lie in q come first.
    first = tl.program_id(1) * GROUP
    last = tl.minimum(first + GROUP, H + H_kv)
    _turn_heads(
        q_ptr + batch * stride_qb + place * stride_qs, q_out_ptr + token64 * H * WIDTH, stride_qh,
        tl.minimum(first, H), tl.minimum(last, H), cos, sin, live, INTERLEAVED, WIDTH, HALF, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    _turn_heads(
        k_ptr + batch * stride_kb + place * stride_ks, k_out_ptr + token64 * H_kv * WIDTH, stride_kh,
        tl.maximum(first, H) - H, tl.maximum(last, H) - H, cos, sin, live, INTERLEAVED, WIDTH, HALF, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip


def _unit_stride(x):
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rotate(q, k, cos, sin, positions, interleaved, offset, starts, cu_seqlens, inverse):
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    q, k, cos, sin = (_unit_stride(t) for t in (q, k, cos, sin))
    B, S, H, width = q.shape
    half = cos.shape[1]
    block_half = max(8, triton.next_power_of_2(half))
    block_rest = triton.next_power_of_2(max(width - 2 * half, 1))
    widest = max(2 * block_half, block_rest)
    block_t = max(1, min(64, 2048 // widest))
    if block_t > 8 * B * S:  # a few tokens, as in decoding; no size between, which would be one more compile
        block_t = 1
    position_strides = (0, 0) if positions is None else (0, *positions.stride())[-2:]
    start_stride = 0 if starts is None or starts.ndim == 0 else starts.stride(0)
    cu = None if cu_seqlens is None else _unit_stride(cu_seqlens)
    sequences = B if cu is None else cu.shape[0] - 1
    _rotary_kernel[(triton.cdiv(B * S, block_t), triton.cdiv(H + k.shape[2], _GROUP))](
        q, k, q_out, k_out, cos, sin, *(cos if t is None else t for t in (positions, starts, cu)),
        *q.stride()[:3], *k.stride()[:3], cos.stride(0), sin.stride(0), *position_strides, start_stride,
        H, k.shape[2], S, cos.shape[0], B * S, offset, sequences, (sequences - 1).bit_length(),
        HAS_POSITIONS=positions is not None, HAS_STARTS=starts is not None, PACKED=cu is not None, INVERSE=inverse,
        INTERLEAVED=interleaved, WIDTH=width, HALF=half, BLOCK_T=block_t, BLOCK_HALF=block_half, BLOCK_REST=block_rest,
        GROUP=_GROUP, num_warps=4 if block_t * widest >= 2048 else 1,
    )  # fmt: skip
    return q_out, k_out


def rotary_fwd(q, k, cos, sin, positions, interleaved, offset=0, starts=None, cu_seqlens=None):
    """-> q and k rotated, contiguous, in their own dtype. Packed tokens come as a batch of one."""
    return _rotate(q, k, cos, sin, positions, interleaved, offset, starts, cu_seqlens, False)


def rotary_bwd(dq, dk, cos, sin, positions, interleaved, offset=0, starts=None, cu_seqlens=None):
    """-> the gradients of q and k: dq and dk rotated by minus the angle."""
    return _rotate(dq, dk, cos, sin, positions, interleaved, offset, starts, cu_seqlens, True)
