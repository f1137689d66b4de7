"""Draws a token from each row of logits: the largest of (logit - top) / temperature + Gumbel noise above the thresholds.

A row is read twice: for its largest logit, then for the draw and, if its log-probability is asked for, the sum of exp. Noise
comes from Philox, of whose calls all four words are used, for those tiles alone in which a filter leaves something. One program
owns a row, in one launch. Where rows are few and wide, programs share one, in three launches: the largest logits of the parts,
their draws, the best of these. Nothing depends on the order of programs: of equal scores the first token wins, and sums are
added in the order of the parts.

A pass keeps (value, place) for each lane, of which `_first` is the best at its end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import num_sms

_NEVER = tl.constexpr(float("-inf"))
_STREAM = tl.constexpr(0x73616D70)  # third word of the counter, as in fastlm/ops/sample.py
_LARGEST = tl.constexpr(3.4028234663852886e38)
_BLOCK = 2048  # columns of a tile at most; with 4096 in 16 warps sm_80 spills


class Settings(NamedTuple):
    """Of every row, or pointers to those of each; a pointer that is None is not compiled."""

    threshold_ptr: torch.Tensor | None  # smaller logits are out
    temperature_ptr: torch.Tensor | None
    min_p_ptr: torch.Tensor | None
    seed_ptr: torch.Tensor  # seed, offset
    temperature: float
    min_p: float


@triton.jit
def gumbel(words):
    """-log(-log(1 - u)), u = (word + 0.5) / 2^32 and at most 1 - 2^-24. It is large where u is small, which 1 - u would round
    away: with w = 1 - u as rounded, log(1 - u) is log(w) u / (1 - w) to the last digits (Kahan)."""
    u = tl.minimum(
        (words.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552
    )
    w = 1.0 - u
    gap = tl.where(w == 1.0, u, 1.0 - w)
    return -tl.log(tl.where(w == 1.0, u, -tl.log(w) * (u / gap)))


@triton.jit
def noise_of(seed_ptr, row, start, BLOCK: tl.constexpr):
    """Gumbel noise of the BLOCK tokens from start (a multiple of 4) on: word token % 4 of Philox at (token // 4, row, _STREAM,
    offset)."""
    zero = tl.zeros((BLOCK // 4,), tl.int32)
    c0 = start // 4 + tl.arange(0, BLOCK // 4)
    c3 = zero + (tl.load(seed_ptr + 1) & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), c0, zero + row, zero + _STREAM, c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last two axes count 0, 1, 2, 3
    return gumbel(tl.reshape(words, (BLOCK,)))


@triton.jit
def _first(values, places, N):
    """The largest of the values, NaN if one is, and the smallest of its places; N: none."""
    nan = tl.max((values != values).to(tl.int32), 0) > 0
    top = tl.max(tl.where(values == values, values, _NEVER), 0)
    return tl.where(nan, float("nan"), top), tl.min(tl.where(values == top, places, N), 0)


@triton.jit
def _logits(x_row, col, end, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(x_row + col, mask=col < end, other=_NEVER).to(tl.float32)
    else:
        x = tl.load(x_row + col).to(tl.float32)
    return x


@triton.jit
def _top_tile(x_row, start, end, tops, places, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    col = start + tl.arange(0, BLOCK)
    x = _logits(x_row, col, end, MASKED)
    places = tl.where(x > tops, col, places)
    return tl.maximum(tops, x, propagate_nan=tl.PropagateNan.ALL), places


@triton.jit
def _top_of(x_row, begin, end, N, BLOCK: tl.constexpr):
    """The largest logit from begin (a multiple of BLOCK) to end and its first place."""
    tops = tl.full((BLOCK,), _NEVER, tl.float32)
    places = tl.zeros((BLOCK,), tl.int32) + N
    full = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK
    for start in range(begin, full, BLOCK):
        tops, places = _top_tile(x_row, start, end, tops, places, False, BLOCK)
    if full < end:
        tops, places = _top_tile(x_row, full, end, tops, places, True, BLOCK)
    return _first(tops, places, N)


@triton.jit
def _below(x, top):
    return tl.where(x == top, 0.0, x - top)  # also of an infinite top


@triton.jit
def _rule(of, row):
    """-> what a row's draw needs to know: 1 / temperature, the threshold of logits, that of tempered ones."""
    temperature, min_p, threshold = of.temperature, of.min_p, _NEVER
    if of.temperature_ptr is not None:
        temperature = tl.load(of.temperature_ptr + row)
    if of.min_p_ptr is not None:
        min_p = tl.load(of.min_p_ptr + row)
    if of.threshold_ptr is not None:
        threshold = tl.load(of.threshold_ptr + row)
    draws = temperature > 0
    # Not 0, times which -inf would be NaN, where the temperature is infinite.
    factor = tl.div_rn(1.0, tl.where(draws, temperature, 1.0))
    smallest = tl.full((), 1, tl.int32).to(tl.float32, bitcast=True)  # written as a number it would be fp64
    factor = tl.minimum(tl.maximum(factor, smallest), _LARGEST)
    floor = tl.where(min_p > 0, tl.minimum(tl.log(tl.where(min_p > 0, min_p, 1.0)), 0.0), _NEVER)
    return factor, threshold, tl.where(draws, floor, float("inf"))  # a greedy row draws none


@triton.jit
def _draw_tile(x_row, start, end, row, top, rule, seed_ptr, state, MASKED: tl.constexpr, LOGPROBS: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    best, tokens, sums = state
    factor, threshold, floor = rule
    col = start + tl.arange(0, BLOCK)
    x = _logits(x_row, col, end, MASKED)
    below = _below(x, top)
    if LOGPROBS:
        sums += tl.exp(below)
    s = below * factor
    s = tl.where((x >= threshold) & (s >= floor), s, _NEVER)
    if tl.max(s, 0) > _NEVER:
        score = s + noise_of(seed_ptr, row, start, BLOCK)
        tokens = tl.where(score > best, col, tokens)
        best = tl.maximum(best, score)
    return best, tokens, sums


@triton.jit
def _draw_of(x_row, begin, end, N, row, top, of, LOGPROBS: tl.constexpr, BLOCK: tl.constexpr):
    """The best score from begin to end, its token, and the sum of exp(x - top)."""
    rule = _rule(of, row)
    if not LOGPROBS:
        end = tl.where(rule[2] < float("inf"), end, begin)  # nothing to read for a greedy row
    state = (tl.full((BLOCK,), _NEVER, tl.float32), tl.zeros((BLOCK,), tl.int32) + N, tl.zeros((BLOCK,), tl.float32))
    full = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK
    for start in range(begin, full, BLOCK):
        state = _draw_tile(x_row, start, end, row, top, rule, of.seed_ptr, state, False, LOGPROBS, BLOCK)
    if full < end:
        state = _draw_tile(x_row, full, end, row, top, rule, of.seed_ptr, state, True, LOGPROBS, BLOCK)
    best, tokens, sums = state
    score, token = _first(best, tokens, N)
    return score, token, tl.sum(sums, 0)


@triton.jit
def _finish(token_ptr, logprob_ptr, x_row, row, top, place, score, token, total):
    """Writes a row's token, that of its largest logit where nothing was drawn, and its log-probability."""
    nothing = (top != top) | (top == _NEVER)
    token = tl.where(score > _NEVER, token, place)
    tl.store(token_ptr + row, tl.where(nothing, -1, token))
    if logprob_ptr is not None:
        x = tl.load(x_row + tl.where(nothing, 0, token)).to(tl.float32)
        tl.store(logprob_ptr + row, tl.where(nothing, float("nan"), _below(x, top) - tl.log(total)))


@triton.jit
def _sample_kernel(x_ptr, of, token_ptr, logprob_ptr, stride_x, N, BLOCK: tl.constexpr):
    """A program for each row."""
    row = tl.program_id(0)
    x_row = x_ptr + row.to(tl.int64) * stride_x
    top, place = _top_of(x_row, 0, N, N, BLOCK)
    score, token, total = _draw_of(x_row, 0, N, N, row, top, of, logprob_ptr is not None, BLOCK)
    _finish(token_ptr, logprob_ptr, x_row, row, top, place, score, token, total)


@triton.jit
def _sample_tops_kernel(x_ptr, value_ptr, place_ptr, stride_x, N, width, BLOCK: tl.constexpr):
    """A program for each row and part of `width` columns, a multiple of BLOCK."""
    row, part = tl.program_id(0), tl.program_id(1)
    begin = part * width
    top, place = _top_of(x_ptr + row.to(tl.int64) * stride_x, begin, tl.minimum(begin + width, N), N, BLOCK)
    at = row.to(tl.int64) * tl.num_programs(1) + part
    tl.store(value_ptr + at, top)
    tl.store(place_ptr + at, place)


@triton.jit
def _top_of_parts(value_ptr, place_ptr, row, N, PARTS: tl.constexpr):
    at = row.to(tl.int64) * PARTS + tl.arange(0, PARTS)
    return _first(tl.load(value_ptr + at), tl.load(place_ptr + at), N)


@triton.jit
def _sample_parts_kernel(x_ptr, of, top_ptr, place_ptr, score_ptr, token_ptr, sum_ptr, stride_x, N, width,
                         LOGPROBS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    begin = part * width
    top, _ = _top_of_parts(top_ptr, place_ptr, row, N, PARTS)
    x_row = x_ptr + row.to(tl.int64) * stride_x
    score, token, total = _draw_of(x_row, begin, tl.minimum(begin + width, N), N, row, top, of, LOGPROBS, BLOCK)
    at = row.to(tl.int64) * PARTS + part
    tl.store(score_ptr + at, score)
    tl.store(token_ptr + at, token)
    tl.store(sum_ptr + at, total)


@triton.jit
def _sample_merge_kernel(x_ptr, top_ptr, place_ptr, score_ptr, part_token_ptr, sum_ptr, token_ptr, logprob_ptr, stride_x, N,
                         PARTS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    top, place = _top_of_parts(top_ptr, place_ptr, row, N, PARTS)
    score, token = _top_of_parts(score_ptr, part_token_ptr, row, N, PARTS)
    total = tl.sum(tl.load(sum_ptr + row.to(tl.int64) * PARTS + tl.arange(0, PARTS)), 0)
    _finish(token_ptr, logprob_ptr, x_ptr + row.to(tl.int64) * stride_x, row, top, place, score, token, total)


def _parts(rows: int, columns: int, device: torch.device) -> int:
    """How many programs share a row, a power of two: as many as the GPU has room for, with a tile each. Fewer than four are not
    worth two more launches."""
    most = min(2 * num_sms(device) // rows, triton.cdiv(columns, _BLOCK))
    return 1 << (most.bit_length() - 1) if most >= 4 else 1


def draw(logits, temperatures, threshold, min_ps, seed, temperature, min_p, with_logprobs):
    """-> tokens [B] int64, log-probabilities [B] fp32 or empty. threshold: fp32 [B] or None; the settings as in Settings."""
    B, N = logits.shape
    device = logits.device
    tokens = torch.empty(B, dtype=torch.int64, device=device)
    logprobs = torch.empty(B if with_logprobs else 0, dtype=torch.float32, device=device)
    if B == 0:
        return tokens, logprobs
    x = logits if logits.stride(1) == 1 or N == 1 else logits.contiguous()
    threshold = None if threshold is None else threshold.contiguous()
    of = Settings(threshold, temperatures, min_ps, seed.contiguous(), temperature, min_p)
    outputs = (tokens, logprobs if with_logprobs else None)
    parts = _parts(B, N, device)
    if parts == 1:
        block = min(_BLOCK, triton.next_power_of_2(max(N, 128)))
        _sample_kernel[(B,)](x, of, *outputs, x.stride(0), N, BLOCK=block, num_warps=max(1, block // 256))
        return tokens, logprobs
    width = triton.cdiv(triton.cdiv(N, _BLOCK), parts) * _BLOCK
    tops, scores, sums = torch.empty((3, B, parts), dtype=torch.float32, device=device)
    places, part_tokens = torch.empty((2, B, parts), dtype=torch.int32, device=device)
    tile = {"BLOCK": _BLOCK, "num_warps": _BLOCK // 256}
    _sample_tops_kernel[(B, parts)](x, tops, places, x.stride(0), N, width, **tile)
    _sample_parts_kernel[(B, parts)](
        x, of, tops, places, scores, part_tokens, sums, x.stride(0), N, width, LOGPROBS=with_logprobs, PARTS=parts, **tile
    )  # fmt: skip
    _sample_merge_kernel[(B,)](
        x, tops, places, scores, part_tokens, sums, *outputs, x.stride(0), N, PARTS=parts, num_warps=1
    )
    return tokens, logprobs
