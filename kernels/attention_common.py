"""What the attention kernels share: what a call asks for, which tiles there are, row views, launch settings.

Every kernel walks a one-dimensional grid of (head, tile) pairs; see `head_and_tile`. Scores live in base 2: with
`scale_log2 = scale * log2(e)` the softmax is exp2(score * scale_log2 - max), one fused multiply-add and one exp2.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LARGE_MEMORY = 227 << 10  # shared memory of a program on Hopper and data-centre Blackwell, bytes
LN2 = tl.constexpr(0.6931471805599453)


class Rule(NamedTuple):
    """What a call has besides q, k and v, as kernels see it: pointers and numbers. None: not in this call, and no code for it.

    Flat, since Triton 3.6 cannot test a tuple inside a tuple for None; no booleans, which its interpreter refuses in tuples.
    """

    align_seen: Any = None  # 1: the diagonal ends at the last key that can be seen
    align_end: Any = None  # 1: at the last key there is; neither: it begins at the first
    left: Any = None  # keys seen before and after the diagonal
    right: Any = None
    key_lengths: Any = None  # [B]
    key_starts: Any = None
    prefix_lengths: Any = None
    documents_q: Any = None  # [B, S], [B, T], contiguous
    documents_k: Any = None
    cu_q: Any = None  # [segments + 1]
    cu_k: Any = None
    segments: Any = None
    softcap: Any = None
    alibi: Any = None  # fp32 [H]
    distances: Any = None  # [H, 2 reach + 1]
    reach: Any = None
    bias: Any = None  # element (b, h, query, key) by the strides that follow; 0 where it is broadcast
    bias_b: Any = None
    bias_h: Any = None
    bias_q: Any = None
    bias_k: Any = None
    bias_rows: Any = None  # sizes, to stay inside where packed sequences turn out longer
    bias_columns: Any = None
    sinks: Any = None  # [H]
    seed: Any = None  # int64 [2]: seed, offset
    threshold: Any = None  # a weight is dropped if its random word is below
    grown: Any = None  # 1 / (1 - dropout)
    blocks: Any = None  # block lists, of rows or of columns: live blocks per line
    blocks_partial: Any = None
    blocks_index: Any = None
    blocks_pattern: Any = None
    blocks_b: Any = None  # strides in lines; 0 where broadcast
    blocks_h: Any = None
    blocks_width: Any = None  # entries per line
    blocks_lines: Any = None  # lines per head: packed sequences may turn out longer
    patterns: Any = None  # uint8 [., block_q, block_k]
    block_q: Any = None
    block_k: Any = None


class Place(NamedTuple):
    """One head of one sequence, as a program sees it."""

    b: Any  # sequence
    h: Any  # query head
    q_row: Any  # where its queries and keys begin in tensors that have all sequences' rows one behind the other
    k_row: Any
    S: Any
    start: Any  # keys [start, limit) can be seen
    limit: Any
    offset: Any  # the diagonal: key = query + offset
    prefix: Any


@triton.jit
def head_and_tile(tiles, heads, section, LAST_FIRST: tl.constexpr):
    """The (head, tile) of this program, 0 <= head < heads, 0 <= tile < tiles.

    Heads come in sections whose keys and values fit in the L2 cache together. Within a section the heads alternate and the
    longest tiles of a causal mask come first, so that the short ones fill the gaps at the end.
    """
    pid = tl.program_id(0)
    first = pid // (section * tiles) * section
    width = tl.minimum(heads - first, section)
    rest = pid - first * tiles
    tile = rest // width
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return first + rest % width, tile


@triton.jit
def segment_of(tile, cu_ptr, segments, rows, BLOCK: tl.constexpr):
    """The packed sequence that a tile belongs to: sequence b owns the tiles from cu[b] // BLOCK + b up to the next one's."""
    low = 0
    high = segments
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.minimum(tl.maximum(tl.load(cu_ptr + middle), 0), rows)
        below = first // BLOCK + middle <= tile
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def rows_of(cu_ptr, b, total):
    """(first row, rows) of packed sequence b. Clamped: nobody has checked cu_seqlens on a GPU."""
    first = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), total).to(tl.int32)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1), first), total).to(tl.int32)
    return first, end - first


@triton.jit
def tile_of(cu_ptr, segments, heads, H, rows, section, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(sequence, head, tile within the sequence) of this program; heads counts those of all sequences (packed: H).

    A packed grid has cdiv(rows, BLOCK) + segments tiles per head, so that no length need be known on the host; the few that
    are too many begin past the end of their sequence, or (cu_seqlens that do not rise) before its first row.
    """
    if cu_ptr is None:
        head, tile = head_and_tile(tl.cdiv(rows, BLOCK), heads, section, LAST_FIRST)
        return head // H, head % H, tile
    else:
        h, at = head_and_tile(tl.cdiv(rows, BLOCK) + segments, heads, section, LAST_FIRST)
        b = segment_of(at, cu_ptr, segments, rows, BLOCK)
        first = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), rows).to(tl.int32)
        return b, h, at - (first // BLOCK + b)


@triton.jit
def place_of(rule, b, h, S, T):
    """The Place of head h of sequence b; S and T are the lengths, or the totals where sequences are packed."""
    b64 = b.to(tl.int64)
    q_row = b64 * S
    k_row = b64 * T
    length = S
    limit = T
    if rule.cu_q is not None:
        first_q, length = rows_of(rule.cu_q, b, S)
        first_k, limit = rows_of(rule.cu_k, b, T)
        q_row = first_q.to(tl.int64)
        k_row = first_k.to(tl.int64)
    last = limit
    if rule.key_lengths is not None:
        limit = tl.minimum(tl.maximum(tl.load(rule.key_lengths + b), 0), limit).to(tl.int32)
    start = 0
    if rule.key_starts is not None:
        start = tl.minimum(tl.maximum(tl.load(rule.key_starts + b), 0), limit).to(tl.int32)
    offset = 0
    if rule.align_seen is not None:
        offset = limit - length
    if rule.align_end is not None:
        offset = last - length
    prefix = 0
    if rule.prefix_lengths is not None:
        prefix = tl.minimum(tl.maximum(tl.load(rule.prefix_lengths + b), 0), limit).to(tl.int32)
    return Place(b64, h.to(tl.int64), q_row, k_row, length, start, limit, offset, prefix)


@triton.jit
def row_base(rule, b, row, h, stride_b, stride_row, stride_h):
    """Offset of the first row of a head of a sequence; row is where packed ones have it."""
    base = b * stride_b + h * stride_h
    if rule.cu_q is not None:
        base = row * stride_row + h * stride_h
    return base


@triton.jit
def stats_row(rule, place, H, S_padded):
    """Where the stats of this head's queries begin (attention_bwd), padded at the end of each head."""
    row = (place.b * H + place.h) * S_padded
    if rule.cu_q is not None:
        row = place.h * S_padded + place.q_row
    return row


@triton.jit
def stats_of(norm_ptr, delta_ptr, query, rule, place):
    """(norm, delta) of queries; pointers to those of query 0. Rows past the end have norm inf: padding, or (packed) a mask."""
    if rule.cu_q is None:
        return tl.load(norm_ptr + query), tl.load(delta_ptr + query)
    else:
        mine = query < place.S
        norm = tl.load(norm_ptr + query, mask=mine, other=float("inf"))
        return norm, tl.load(delta_ptr + query, mask=mine, other=0.0)


@triton.jit
def key_range(rule, place, first, last, BLOCK: tl.constexpr):
    """(lo, whole, part, hi): queries first..last see keys of [lo, hi) only, and each of them all of [whole, part).

    lo <= whole <= part; lo, whole and part are multiples of BLOCK. Without left and key_starts lo = whole = 0.
    """
    lo = place.start
    hi = place.limit
    whole = place.start
    part = place.limit
    if rule.right is not None:
        hi = tl.minimum(hi, tl.maximum(last + place.offset + rule.right + 1, 0))
        part = tl.minimum(part, tl.maximum(first + place.offset + rule.right + 1, 0))
    if rule.left is not None:
        lo = tl.maximum(lo, first + place.offset - rule.left)
        whole = tl.maximum(whole, last + place.offset - rule.left)
    if rule.prefix_lengths is not None:
        hi = tl.maximum(hi, place.prefix)
        part = tl.maximum(part, place.prefix)
        if rule.left is not None:  # the prefix, a gap, the window
            lo = tl.where(place.prefix > place.start, place.start, lo)
            part = tl.where(place.prefix > place.start, 0, part)
    if rule.documents_q is not None:
        part = 0
    lo = lo // BLOCK * BLOCK
    whole = tl.minimum(tl.cdiv(whole, BLOCK) * BLOCK, tl.cdiv(hi, BLOCK) * BLOCK)
    whole = tl.maximum(whole, lo)
    part = tl.maximum(part // BLOCK * BLOCK, whole)
    return lo, whole, part, hi


@triton.jit
def query_range(rule, place, first, last, BLOCK: tl.constexpr):
    """(lo, whole, part, hi): keys first..last are seen by queries of [lo, hi) only, and each of them by all of [whole, part).

    lo and whole are multiples of BLOCK, or whole is hi. Without left, part = hi = S.
    """
    lo = tl.zeros((), tl.int32)
    hi = place.S
    whole = lo
    part = hi
    if rule.right is not None:
        lo = tl.maximum(first - place.offset - rule.right, 0)
        whole = tl.maximum(last - place.offset - rule.right, 0)
    if rule.left is not None:
        hi = tl.minimum(hi, tl.maximum(last - place.offset + rule.left + 1, 0))
        part = tl.minimum(part, tl.maximum(first - place.offset + rule.left + 1, 0))
    if rule.prefix_lengths is not None:
        lo = tl.where(first < place.prefix, 0, lo)
        hi = tl.where(first < place.prefix, place.S, hi)
        whole = tl.where(last < place.prefix, 0, whole)
        if rule.left is not None:
            whole = tl.where(first < place.prefix, hi, whole)
        else:
            part = hi
    if rule.documents_q is not None:
        whole = hi
    lo = lo // BLOCK * BLOCK
    whole = tl.minimum(tl.cdiv(whole, BLOCK) * BLOCK, hi)
    nobody = (first >= place.limit) | (last < place.start)
    lo = tl.where(nobody, hi, lo)
    whole = tl.where(nobody, hi, whole)
    return lo, whole, tl.maximum(part, whole), hi


@triton.jit
def live(position, limit, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Load mask of a tile [ROWS, BLOCK]: rows below limit (if MASK_ROWS), columns below WIDTH. Folds away if all true."""
    mask = tl.full((ROWS, BLOCK), True, tl.int1)
    if MASK_ROWS:
        mask = mask & (position < limit)[:, None]
    if WIDTH != BLOCK:
        mask = mask & (tl.arange(0, BLOCK) < WIDTH)[None, :]
    return mask


@triton.jit
def live_keys(rule, place, key, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Load mask of a tile of keys or values: what lies outside [start, limit) may be anything, NaN included."""
    mask = live(key, place.limit, WIDTH, ROWS, BLOCK, MASK_ROWS)
    if MASK_ROWS and rule.key_starts is not None:
        mask = mask & (key >= place.start)[:, None]
    return mask


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] with unit stride along D; itself wherever its strides allow."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def padded(width: int) -> int:
    """The power of two (at least 16, what tl.dot takes) in which a head of this width is computed."""
    return max(16, triton.next_power_of_2(width))


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products follow torch's own setting; 16-bit ones have a single precision."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def heads_per_section(heads: int, length: int, row_bytes: int) -> int:
    """How many heads to work on at once so that the rows they all read (length * row_bytes each) stay in L2."""
    return max(1, min(heads, (24 << 20) // max(1, length * row_bytes)))


def interpreted_block(S: int, T: int) -> int:
    """Tile for the interpreter, where a tile costs the same whatever its size: small enough for several of them."""
    return 16 if max(S, T) <= 32 else 32


@cache
def _generation(index: int) -> int:
    found = torch.cuda.get_device_properties(index)
    if found.shared_memory_per_block_optin < LARGE_MEMORY:
        return 80
    return 90 if found.major == 9 else 100


def generation(device: torch.device) -> int:
    """Which launch settings to take: 90 on Hopper, 100 on data-centre Blackwell, 80 on all GPUs with less shared memory than
    these (227 KiB a program; 99 KiB are reckoned with), 0 on the CPU (the interpreter, which wants small tiles)."""
    if device.type == "cuda":
        return _generation(device.index)
    if device.type == "cpu":
        return 0
    # Meta tensors: kernels are being compiled ahead of time for the driver's target.
    return {90: 90, 100: 100, 103: 100}.get(triton.runtime.driver.active.get_current_target().arch, 80)
