"""New keys and values written behind each row's tokens, in one launch: k is rotated on its way, v is copied.

A program owns BLOCK_R rows, a row being one head of one token. It looks the place of each up, in the page table if there is
one; what falls outside the cache is not written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_common import unit_rows


@triton.jit
def _put(at, x, mask, INPUT: tl.constexpr):
    """Stores fp32 x rounded as the input's dtype has it, then as the cache's."""
    tl.store(at, x.to(INPUT).to(tl.float32).to(at.dtype.element_ty), mask=mask)


@triton.jit
def _copy(to, stride_to, source, live, START: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns START .. WIDTH-1 of each row. to, source: pointers [BLOCK_R, 1] to column 0."""
    col = START + tl.arange(0, BLOCK)[None, :]
    mask = live if BLOCK == WIDTH - START else live & (col < WIDTH)
    x = tl.load(source + col, mask=mask, other=0.0).to(tl.float32)
    _put(to + col.to(tl.int64) * stride_to, x, mask, source.dtype.element_ty)


@triton.jit
def _rotate(
    to, stride_to, source, cos_row, sin_row, live,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """The first 2 HALF columns of each row, turned by the angles of its position."""
    col = tl.arange(0, BLOCK_HALF)[None, :]
    mask = live if BLOCK_HALF == HALF else live & (col < HALF)
    cos = tl.load(cos_row + col, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_row + col, mask=mask, other=0.0).to(tl.float32)
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        mask = live if BLOCK_HALF == HALF else live & (both < 2 * HALF)
        pairs = tl.load(source + both, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(pairs, (pairs.shape[0], BLOCK_HALF, 2)))
        turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), pairs.shape)
        _put(to + both.to(tl.int64) * stride_to, turned, mask, source.dtype.element_ty)
    else:
        a = tl.load(source + col, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(source + HALF + col, mask=mask, other=0.0).to(tl.float32)
        col = col.to(tl.int64)
        _put(to + col * stride_to, a * cos - b * sin, mask, source.dtype.element_ty)
        _put(to + (HALF + col) * stride_to, b * cos + a * sin, mask, source.dtype.element_ty)


@triton.jit(do_not_specialize=["S", "H_kv", "rows", "places", "pages", "positions", "stride_table"])
def _append_kv_kernel(
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, cos_ptr, sin_ptr,
    stride_kcp, stride_kcs, stride_kch, stride_kcd, stride_vcp, stride_vcs, stride_vch, stride_vcd,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_table, stride_cos, stride_sin,
    S, H_kv, rows, places, pages, positions,
    PAGE: tl.constexpr, INTERLEAVED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """PAGE: tokens of a page, 0 for a contiguous cache, whose rows are then its pages. HALF: 0 without rotation."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < rows
    h = (row % H_kv).to(tl.int64)
    token = row // H_kv
    b = (token // S).to(tl.int64)
    s = (token % S).to(tl.int64)
    place = tl.load(lengths_ptr + b, mask=live, other=0).to(tl.int64) + s
    live = live & (place >= 0) & (place < places)
    page = b
    slot = place
    if PAGE > 0:
        page = tl.load(table_ptr + b * stride_table + place // PAGE, mask=live, other=0).to(tl.int64)
        live = live & (page >= 0) & (page < pages)  # a page that is none: writing elsewhere would spoil another row's
        slot = place % PAGE
    k_to = (k_cache_ptr + (page * stride_kcp + slot * stride_kcs + h * stride_kch))[:, None]
    v_to = (v_cache_ptr + (page * stride_vcp + slot * stride_vcs + h * stride_vch))[:, None]
    k_from = (k_ptr + (b * stride_kb + s * stride_ks + h * stride_kh))[:, None]
    v_from = (v_ptr + (b * stride_vb + s * stride_vs + h * stride_vh))[:, None]
    live = live[:, None]
    if HALF > 0:
        position = tl.minimum(place, positions - 1)[:, None]
        cos_row = cos_ptr + position * stride_cos
        sin_row = sin_ptr + position * stride_sin
        _rotate(k_to, stride_kcd, k_from, cos_row, sin_row, live, INTERLEAVED, HALF, BLOCK_HALF)
    if D > 2 * HALF:
        _copy(k_to, stride_kcd, k_from, live, 2 * HALF, D, BLOCK_REST)
    _copy(v_to, stride_vcd, v_from, live, 0, DV, BLOCK_DV)


def append_kv(k_cache, v_cache, k, v, lengths, page_table, cos, sin, interleaved):
    """Writes k (rotated) and v into the caches in place; see ops.append_kv_."""
    B, S, H_kv, D = k.shape
    DV = v.shape[3]
    page = 0 if page_table is None else k_cache.shape[1]
    places = k_cache.shape[1] if page_table is None else page * page_table.shape[1]
    if k.numel() + v.numel() == 0 or k_cache.numel() + v_cache.numel() == 0 or places == 0:
        return
    k, v, lengths = unit_rows(k), unit_rows(v), lengths.contiguous()
    table = lengths if page_table is None else unit_rows(page_table)
    half = 0 if cos is None else cos.shape[1]
    cos, sin = (lengths, lengths) if cos is None else (unit_rows(cos), unit_rows(sin))
    block_half, block_rest, block_dv = (triton.next_power_of_2(max(8, n)) for n in (half, D - 2 * half, DV))
    widest = max(2 * block_half, block_rest, block_dv)
    block_r = max(1, min(64, 2048 // widest))
    rows = B * S * H_kv
    _append_kv_kernel[(triton.cdiv(rows, block_r),)](
        k_cache, v_cache, k, v, lengths, table, cos, sin,
        *k_cache.stride(), *v_cache.stride(), *k.stride()[:3], *v.stride()[:3],
        0 if page_table is None else table.stride(0), cos.stride(0), sin.stride(0),
        S, H_kv, rows, places, k_cache.shape[0], cos.shape[0],
        PAGE=page, INTERLEAVED=interleaved, D=D, DV=DV, HALF=half,
        BLOCK_R=block_r, BLOCK_HALF=block_half, BLOCK_REST=block_rest, BLOCK_DV=block_dv,
        num_warps=4 if block_r * widest >= 1024 else 1,
    )  # fmt: skip
