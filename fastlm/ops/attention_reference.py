"""Attention's formula in plain torch: the oracle of the kernels, and what derivatives of any order come from.

Everything that only some calls have is in `Call`; packed sequences are one long sequence in which nobody sees past the borders,
so that nothing here depends on the values of cu_seqlens and every transform and export can look through it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops._tensor import compute_dtype
from fastlm.ops.block_mask import BlockMask
from fastlm.ops.random_bits import philox
from fastlm.ops.softcap import capped

# The diagonal begins at the first query and key; ends at the last query and the last key that can be seen; or at the last key.
FROM_START, TO_SEEN, TO_END = 0, 1, 2
HIDDEN = -2e38  # what is added to a score hides the key if it is lower: torch.finfo(torch.float32).min as well as -inf


class Extras(NamedTuple):
    """Tensors without a gradient that few calls have. They go through the dispatcher as one list, in this order."""

    alibi_slopes: Tensor | None = None  # fp32 [H]
    cu_seqlens_q: Tensor | None = None  # int32 or int64 [B + 1]; q, k and v are then [1, total, heads, width]
    cu_seqlens_k: Tensor | None = None
    key_starts: Tensor | None = None  # int32 or int64 [B]
    prefix_lengths: Tensor | None = None  # int32 or int64 [B]
    documents_q: Tensor | None = None  # integers [B, S], or [1, total]
    documents_k: Tensor | None = None  # integers [B, T], or [1, total]
    seed: Tensor | None = None  # int64 [2], (seed, offset)
    row_count: Tensor | None = None  # from here on: BlockMask.tensors()
    row_partial: Tensor | None = None
    row_index: Tensor | None = None
    row_pattern: Tensor | None = None
    column_count: Tensor | None = None
    column_partial: Tensor | None = None
    column_index: Tensor | None = None
    column_pattern: Tensor | None = None
    patterns: Tensor | None = None

    def listed(self) -> list[Tensor | None]:
        """The list for the dispatcher: empty where there is nothing."""
        return [] if all(t is None for t in self) else list(self)


class Call(NamedTuple):
    """One call of attention as its op, its reference and its launchers take it, checked and with defaults resolved."""

    q: Tensor  # [B, S, H, Dh]
    k: Tensor  # [B, T, H_kv, Dh]
    v: Tensor  # [B, T, H_kv, Dv]
    key_lengths: Tensor | None  # int32 or int64 [B]
    bias: Tensor | None  # 4-D, broadcastable to [B, H, S, T]
    distances: Tensor | None  # [H, 2 R + 1]: added to the score of a key at distance d, -R <= d <= R, clamped
    sinks: Tensor | None  # [H]
    extras: list[Tensor | None]
    align: int  # where the diagonal lies, from which distances count: FROM_START, TO_SEEN or TO_END
    left: int  # keys seen before the diagonal, -1 for all
    right: int  # keys seen after it, -1 for all; causal is 0
    scale: float
    softcap: float  # 0 for none
    dropout: float  # probability, 0 for none


def reference(*args) -> Tensor | tuple[Tensor, Tensor]:
    """attention(*Call, return_lse) in the inputs' own precision (16-bit inputs in fp32)."""
    *rest, return_lse = args
    call = Call(*rest)
    scores, seen, dead = scores_and_mask(call)
    # Rows that see nothing get equal scores, so that no derivative of any order meets inf - inf.
    scores = scores.masked_fill(~seen, float("-inf")).masked_fill(dead, 0)
    if call.sinks is not None:  # one more key for every query, whose value is 0
        sinks = call.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), -1)
    probs = scores.softmax(-1)[..., : call.k.shape[1]].masked_fill(~seen, 0)
    if call.dropout:
        probs = probs * kept(call).to(probs.dtype) / (1 - call.dropout)
    v = without_hidden_keys(call, call.v)
    vf = v.to(scores.dtype).transpose(1, 2).unsqueeze(2)
    out = (probs.unflatten(1, (v.shape[2], -1)) @ vf).flatten(1, 2).transpose(1, 2).to(call.q.dtype).contiguous()
    if not return_lse:
        return out
    lse = torch.logsumexp(scores, -1, keepdim=True) if scores.shape[-1] else scores.sum(-1, keepdim=True)
    return out, lse.masked_fill(dead, float("-inf")).squeeze(-1)


def scores_and_mask(call: Call, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, H, S, T] with everything added, who sees whom (broadcastable to them), and rows that see nothing [.., 1].

    With `rows`, here and below, only those queries.
    """
    q, k = call.q[:, rows], without_hidden_keys(call, call.k)
    dtype = compute_dtype(q)
    qf = q.to(dtype).transpose(1, 2).unflatten(1, (k.shape[2], -1))
    scores = (qf @ k.to(dtype).transpose(1, 2).unsqueeze(2).transpose(-1, -2) * call.scale).flatten(1, 2)
    if call.softcap:
        scores = capped(scores, call.softcap)
    seen = who_sees_whom(call, rows)
    added = added_scores(call, rows)
    if added is not None:
        shut = added < HIDDEN
        seen = seen & ~shut
        scores = scores + added.masked_fill(shut, 0)
    return scores, seen, ~seen.any(-1, keepdim=True)


def who_sees_whom(call: Call, rows: slice = slice(None)) -> Tensor:
    """Boolean, 4-D, broadcastable to the scores [B, H, S, T]; a bias of -inf aside."""
    seen = _Place(call, rows).seen()
    return seen[:, None] if seen.ndim == 3 else seen


def added_scores(call: Call, rows: slice = slice(None)) -> Tensor | None:
    """What is added to the scaled scores, broadcastable to [B, H, S, T], or None."""
    place, dtype, parts = _Place(call, rows), compute_dtype(call.q), []
    if place.extras.alibi_slopes is not None:
        parts.append(-place.extras.alibi_slopes.to(dtype)[:, None, None] * place.distance.abs()[:, None].to(dtype))
    if call.distances is not None:
        reach = call.distances.shape[1] // 2
        at = place.distance.clamp(-reach, reach) + reach
        parts.append(call.distances.to(dtype)[:, at].transpose(0, 1))
    if call.bias is not None:
        parts.append(place.bias().to(dtype))
    return sum(parts[1:], parts[0]) if parts else None


def without_hidden_keys(call: Call, x: Tensor) -> Tensor:
    """x [B, T, ...] with zeros where key_lengths and key_starts hide the keys: 0 * garbage is NaN where the garbage is."""
    if call.key_lengths is None and Extras(*call.extras).key_starts is None:
        return x
    place = _Place(call, slice(None))
    position, lengths, starts = place.key_position, call.key_lengths, place.extras.key_starts
    hidden = torch.zeros((), dtype=torch.bool, device=x.device)
    if place.packed:
        if lengths is not None:
            hidden = hidden | (position >= lengths[place.segment_k])
        if starts is not None:
            hidden = hidden | (position < starts[place.segment_k])
        hidden = hidden[None]
    else:
        if lengths is not None:
            hidden = hidden | (position >= lengths[:, None])
        if starts is not None:
            hidden = hidden | (position < starts[:, None])
    return x.masked_fill(hidden[:, :, None, None], 0)


class _Place:
    """Positions of queries and keys within their sequences, and what follows from them.

    Attributes: query [*, S, 1] and key [*, 1, T] positions; distance [*, S, T] of a key from the diagonal, key - query - offset.
    """

    def __init__(self, call: Call, rows: slice) -> None:  # Dynamo of torch 2.11 takes no slice as a class's default
        self.call, self.rows = call, rows
        extras = self.extras = Extras(*call.extras)
        S, T, device = call.q.shape[1], call.k.shape[1], call.q.device
        self.packed = extras.cu_seqlens_q is not None
        query, key = torch.arange(S, device=device)[rows], torch.arange(T, device=device)
        if self.packed:
            cu_q, cu_k = extras.cu_seqlens_q.long(), extras.cu_seqlens_k.long()
            self.segment_q, self.segment_k = segments(cu_q, S)[rows], segments(cu_k, T)
            query, key = query - cu_q[self.segment_q], key - cu_k[self.segment_k]
            self.lengths_q, self.lengths_k = cu_q.diff(), cu_k.diff()
        else:
            self.lengths_q, self.lengths_k = S, T
        self.query, self.key, self.key_position = query[None, :, None], key[None, None, :], key
        limit = self._per_query(self.lengths_k)
        if call.key_lengths is not None:
            limit = self._per_query(call.key_lengths).clamp(min=0).clamp(max=limit)
        self.limit = limit
        end = {FROM_START: None, TO_SEEN: limit, TO_END: self._per_query(self.lengths_k)}[call.align]
        self.offset = 0 if end is None else end - self._per_query(self.lengths_q)
        self.distance = self.key - self.query - self.offset

    def _per_query(self, values):
        """One value for each sequence [B] (or a number), laid out for broadcasting against [*, S, T]."""
        if not isinstance(values, Tensor):
            return values
        return values[self.segment_q][None, :, None] if self.packed else values[:, None, None]

    def seen(self) -> Tensor:
        """Boolean, broadcastable to [B, S, T], or [B, H, S, T] under a block mask."""
        call, extras = self.call, self.extras
        seen = (self.key < self.limit).expand(-1, self.query.shape[1], -1)
        band = None
        if call.right >= 0:
            band = self.distance <= call.right
        if call.left >= 0:
            after = self.distance >= -call.left
            band = after if band is None else band & after
        if band is not None:
            if extras.prefix_lengths is not None:
                band = band | (self.key < self._per_query(extras.prefix_lengths))
            seen = seen & band
        if extras.key_starts is not None:
            seen = seen & (self.key >= self._per_query(extras.key_starts))
        if extras.documents_q is not None:
            seen = seen & (extras.documents_q[:, self.rows, None] == extras.documents_k[:, None, :])
        if self.packed:
            seen = seen & (self.segment_q[:, None] == self.segment_k[None, :])
        if extras.row_count is not None:
            seen = seen[:, None] & self._blocks()
        return seen

    def _sizes(self) -> tuple[int, int]:
        """Lengths a block mask covers: those of the call, or all that its lists have room for where sequences are packed."""
        extras = self.extras
        if not self.packed:
            return self.call.q.shape[1], self.call.k.shape[1]
        block_q, block_k = extras.patterns.shape[1:]
        return extras.row_count.shape[2] * block_q, extras.column_count.shape[2] * block_k

    def bias(self) -> Tensor:
        """The additive bias, broadcastable to [B, H, S, T]."""
        bias = self.call.bias
        return self._gathered(bias if self.packed or bias.shape[2] == 1 else bias[:, :, self.rows])

    def _blocks(self) -> Tensor:
        """The block mask, bool, broadcastable to [B, H, S, T]."""
        mask = block_mask_of(self.extras, self._sizes())
        if self.packed or self.rows == slice(None):
            return self._gathered(mask.to_dense())
        # Only the rows of blocks that are asked for are made dense.
        size = mask.block[0]
        start, stop, _ = self.rows.indices(mask.lengths[0])
        first, last = start // size, -(-stop // size)
        lists = (x[:, :, first:last] for x in mask.tensors()[:4])
        length = min(last * size, mask.lengths[0]) - first * size
        part = BlockMask((length, mask.lengths[1]), mask.block, *lists, *mask.tensors()[4:])
        return part.to_dense()[:, :, start - first * size : stop - first * size]

    def _gathered(self, x: Tensor) -> Tensor:
        """x [B | 1, H | 1, S | 1, T | 1], whose last two are positions within a sequence, as the packed rows have it."""
        if not self.packed:
            return x
        zero = torch.zeros((), dtype=torch.int64, device=x.device)
        sequence = self.segment_q if x.shape[0] > 1 else zero
        # Other sequences' keys may lie past the end of x; they are not seen.
        query = self.query[0].clamp(max=x.shape[2] - 1) if x.shape[2] > 1 else zero
        key = self.key[0].clamp(max=x.shape[3] - 1) if x.shape[3] > 1 else zero
        sequence = sequence[:, None] if sequence.ndim else sequence
        shape = (self.query.shape[1], self.call.k.shape[1])
        sequence, query, key = (t.expand(shape) for t in (sequence, query, key))
        return x.transpose(0, 1)[:, sequence, query, key][None]


def segments(cu: Tensor, total: int) -> Tensor:
    """int64 [total]: the sequence each packed row belongs to, from cumulative lengths cu [B + 1]."""
    rows = torch.arange(total, device=cu.device)
    return torch.searchsorted(cu, rows, right=True).sub(1).clamp(0, max(cu.shape[0] - 2, 0))


def block_mask_of(extras: Extras, lengths: tuple[int, int]) -> BlockMask:
    """The BlockMask whose tensors the call carries."""
    return BlockMask(lengths, tuple(extras.patterns.shape[1:]), *extras[Extras._fields.index("row_count") :])


def kept(call: Call) -> Tensor:
    """Which probabilities dropout keeps: bool [B, H, S, T], or [1, H, total, total] where sequences are packed.

    Philox 4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405) with key `seed` and counter (key // 4, query, sequence * H +
    head, offset); of its four words the one of key % 4, kept if it is at least dropout * 2^32.
    """
    place = _Place(call, slice(None))
    H = call.q.shape[2]
    head = torch.arange(H, device=call.q.device)[None, :, None, None]
    batch = place.segment_q[None, :] if place.packed else torch.arange(call.q.shape[0], device=call.q.device)[:, None]
    query, key = place.query[:, None], place.key[:, None]
    shape = (call.q.shape[0], H, call.q.shape[1], call.k.shape[1])
    seed = place.extras.seed
    counter = [key // 4, query, batch[:, None, :, None] * H + head, seed[1]]
    words = torch.stack(philox(seed[0], *(c.expand(shape) for c in counter)), -1)
    word = words.gather(-1, (key % 4).expand(shape).unsqueeze(-1)).squeeze(-1)
    return word >= int(call.dropout * 2**32)
