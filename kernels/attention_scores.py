"""Who sees whom and what becomes of the scores, tile by tile: what forward, backward and decoding share of attention's features.

query and key are positions within the sequence, as tiles that broadcast against each other in either orientation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_common import LOG2E
from .common import tanh_and_slope

HIDDEN = tl.constexpr(-2e38)  # a bias below hides the key: torch.finfo(torch.float32).min as well as -inf


@triton.jit
def visible(rule, place, query, key):
    """Boolean tile: who sees whom. query and key are positions, broadcast against each other in either orientation."""
    seen = key < place.limit
    if rule.right is not None and rule.left is not None:
        band = (key <= query + (place.offset + rule.right)) & (key >= query + (place.offset - rule.left))
        if rule.prefix_lengths is not None:
            band = band | (key < place.prefix)
        seen = seen & band
    elif rule.right is not None:
        band = key <= query + (place.offset + rule.right)
        if rule.prefix_lengths is not None:
            band = band | (key < place.prefix)
        seen = seen & band
    elif rule.left is not None:
        band = key >= query + (place.offset - rule.left)
        if rule.prefix_lengths is not None:
            band = band | (key < place.prefix)
        seen = seen & band
    if rule.key_starts is not None:
        seen = seen & (key >= place.start)
    if rule.documents_q is not None:
        # Positions may be negative where tiles are laid from the diagonal.
        theirs = tl.load(rule.documents_q + place.q_row + query, mask=(query >= 0) & (query < place.S), other=-1)
        ours = tl.load(rule.documents_k + place.k_row + key, mask=(key >= 0) & (key < place.limit), other=-2)
        seen = seen & (theirs == ours)
    return seen


@triton.jit
def capped(scores, softcap, scale, EXACT: tl.constexpr = False):
    """tanh(scores * scale / softcap) and its slope. EXACT: fp32 inputs, as 16-bit ones have fewer digits than tanh near 0."""
    return tanh_and_slope(scores * (scale / softcap), scores * (2.0 * LOG2E * scale / softcap), EXACT)


@triton.jit
def with_additions(logits, rule, place, query, key):
    """Base-2 logits plus ALiBi, relative bias and bias. query and key as in `visible`."""
    if rule.alibi is not None:
        slope = tl.load(rule.alibi + place.h) * LOG2E
        logits -= slope * tl.abs(query + place.offset - key).to(tl.float32)
    if rule.distances is not None:
        distance = tl.minimum(tl.maximum(key - query - place.offset, -rule.reach), rule.reach) + rule.reach
        at = rule.distances + place.h * (2 * rule.reach + 1)
        added = tl.load(at + distance).to(tl.float32)
        logits += tl.where(added < HIDDEN, float("-inf"), added * LOG2E)
    if rule.bias is not None:
        at = rule.bias + (place.b * rule.bias_b + place.h * rule.bias_h)
        inside = (query >= 0) & (query < tl.minimum(place.S, rule.bias_rows))
        inside = inside & (key >= 0) & (key < tl.minimum(place.limit, rule.bias_columns))
        added = tl.load(at + query.to(tl.int64) * rule.bias_q + key.to(tl.int64) * rule.bias_k, mask=inside, other=0.0)
        added = added.to(tl.float32)
        logits += tl.where(added < HIDDEN, float("-inf"), added * LOG2E)  # lower ones overflow in base 2
    return logits


@triton.jit
def kept(rule, place, H, query, key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_DOWN: tl.constexpr):
    """Which weights of the tile from (query, key) on dropout keeps: [BLOCK_M, BLOCK_N], or its transpose.

    Philox counter (key // 4, query, sequence * H + head, offset), word key % 4: four keys for each call. key % 4 must be 0.
    """
    seed = tl.load(rule.seed)
    offset = tl.load(rule.seed + 1)
    queries = query + tl.arange(0, BLOCK_M)
    keys = key // 4 + tl.arange(0, BLOCK_N // 4)
    if KEYS_DOWN:
        zero = tl.zeros((BLOCK_N // 4, BLOCK_M), tl.int32)
        c0 = zero + keys[:, None]
        c1 = zero + queries[None, :]
    else:
        zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.int32)
        c0 = zero + keys[None, :]
        c1 = zero + queries[:, None]
    c2 = zero + (place.b * H + place.h).to(tl.int32)
    c3 = zero + (offset & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    bits = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last two axes count 0, 1, 2, 3
    if KEYS_DOWN:
        words = tl.reshape(tl.permute(bits, (0, 2, 3, 1)), (BLOCK_N, BLOCK_M))
    else:
        words = tl.reshape(bits, (BLOCK_M, BLOCK_N))
    return words.to(tl.uint32, bitcast=True) >= tl.cast(rule.threshold, tl.uint32)


@triton.jit
def line_of(rule, place, position, BLOCK):
    """(line, partial entries, entries) of the block lists for a tile of queries (or keys) that begins at this position."""
    row = position // BLOCK
    line = place.b * rule.blocks_b + place.h * rule.blocks_h + row
    inside = row < rule.blocks_lines
    partial = tl.load(rule.blocks_partial + line, mask=inside, other=0)
    return line, partial, tl.load(rule.blocks + line, mask=inside, other=0)


@triton.jit
def block_seen(rule, place, first, start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Boolean tile: what the block lists (of rows) show of the tile of queries from `first` and keys from `start` on."""
    line = place.b * rule.blocks_b + place.h * rule.blocks_h + tl.maximum(first, 0) // rule.block_q
    query = first + tl.arange(0, BLOCK_M)
    key = start + tl.arange(0, BLOCK_N)
    seen = tl.zeros((BLOCK_M, BLOCK_N), tl.int1)
    for below in range(0, BLOCK_M // rule.block_q + 2):  # the rows of blocks that it may lie across
        row = tl.maximum(first, 0) // rule.block_q + below
        inside = row < rule.blocks_lines
        count = tl.load(rule.blocks + line + below, mask=inside, other=0)
        partial = tl.load(rule.blocks_partial + line + below, mask=inside, other=0)
        mine = (query >= 0) & (query // rule.block_q == row)
        for i in range(0, count):
            at = (line + below) * rule.blocks_width + i
            here = mine[:, None] & ((key >= 0) & (key // rule.block_k == tl.load(rule.blocks_index + at)))[None, :]
            pattern_ptr = rule.patterns + tl.load(rule.blocks_pattern + at).to(tl.int64) * (rule.block_q * rule.block_k)
            cell = (query % rule.block_q)[:, None] * rule.block_k + (key % rule.block_k)[None, :]
            seen = seen | (here & (tl.load(pattern_ptr + cell, mask=here & (i < partial), other=1) != 0))
    return seen
