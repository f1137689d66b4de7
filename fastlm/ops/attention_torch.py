"""Attention's torch form: F.scaled_dot_product_attention, with a mask where its own flags do not reach."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops import attention_cpu
from fastlm.ops._tensor import host_values
from fastlm.ops.attention_reference import (
    FROM_START,
    HIDDEN,
    TO_END,
    TO_SEEN,
    Call,
    Extras,
    added_scores,
    reference,
    who_sees_whom,
    without_hidden_keys,
)


def reason_against(call: Call, return_lse: bool) -> str | None:
    """Why SDPA cannot serve this call, or None."""
    if return_lse:
        return "torch's attention returns no differentiable log-sum-exp"
    if call.softcap:
        return "torch's attention has no softcap"
    if call.sinks is not None:
        return "torch's attention has no sinks"
    if call.dropout:
        return "torch's attention drops out by other random numbers"
    if call.extras and Extras(*call.extras).cu_seqlens_q is not None:
        if len(call.extras) - call.extras.count(None) > 2 or call.bias is not None or call.distances is not None:
            return "it takes packed sequences one by one, and only with causal, window and scale"
        if host_values(Extras(*call.extras).cu_seqlens_q) is None:
            return "it takes packed sequences one by one, and cannot read cu_seqlens without a wait or a graph break"
        if call.key_lengths is not None:
            return "it takes packed sequences without key_lengths"
    return None


def attend(*args) -> Tensor:
    """attention(*Call, return_lse=False)."""
    call = Call(*args[:-1])
    if call.bias is not None or call.distances is not None or call.extras:
        extras = Extras(*call.extras)
        if extras.cu_seqlens_q is not None:
            return _packed(call)
        rows = _live_keys(call, extras)
        return _masked(call) if rows is None else _by_rows_of_blocks(call, extras, rows)
    lengths = None if call.key_lengths is None else host_values(call.key_lengths)
    if call.key_lengths is not None and lengths is None:
        return _masked(call)  # lengths that the host must not read: a GPU, a traced graph
    q, k, v = call.q, call.k, call.v
    band = call.align == TO_SEEN, call.left, call.right
    if lengths is None:
        return _sdpa(q, k, v, call.align != FROM_START, call.left, call.right, call.scale)
    if call.align == TO_END and (call.left >= 0 or call.right >= 0):
        return _masked(call)  # cutting the keys would move the diagonal
    if len(set(lengths)) <= 1:
        T = lengths[0] if lengths else 0
        return _sdpa(q, k[:, :T], v[:, :T], *band, call.scale)
    # One call per row of the batch, cut to its length: no mask, no work on keys that nobody sees.
    rows = zip(q.split(1), k.split(1), v.split(1), lengths)
    return torch.cat([_sdpa(q, k[:, :T], v[:, :T], *band, call.scale) for q, k, v, T in rows])


def _live_keys(call: Call, extras: Extras) -> list[list[int]] | None:
    """The live key blocks of each row of blocks, partial ones first, if a block mask that is one for all heads and sequences is
    all the call has and its lists can be read for nothing; else None."""
    alone = (
        call.key_lengths is None and call.bias is None and call.distances is None and call.left < 0 and call.right < 0
    )
    if not alone or extras.row_count is None or len(call.extras) - call.extras.count(None) > 9:
        return None
    counts = host_values(extras.row_count) if extras.row_count.shape[:2] == (1, 1) else None
    if counts is None:
        return None
    return [blocks[:n] for blocks, n in zip(host_values(extras.row_index)[0][0], counts[0][0])]


def _by_rows_of_blocks(call: Call, extras: Extras, rows: list[list[int]]) -> Tensor:
    """Each row of blocks with the keys of its live blocks only, so that the time falls with their share."""
    block_q, block_k = extras.patterns.shape[1:]
    q, k, v = call.q, call.k, call.v
    T = k.shape[1]
    partial = host_values(extras.row_partial)[0][0]
    parts = []
    for row, blocks in enumerate(rows):
        part = q[:, row * block_q : (row + 1) * block_q]
        n = partial[row]
        if not blocks:
            parts.append(part.new_zeros(*part.shape[:3], v.shape[3]))
            continue
        at = torch.cat([torch.arange(b * block_k, min((b + 1) * block_k, T)) for b in blocks])
        mask = torch.ones(part.shape[1], len(at), dtype=torch.bool)
        column = 0
        for b, pattern in zip(blocks[:n], extras.row_pattern[0, 0, row, :n]):
            width = min((b + 1) * block_k, T) - b * block_k
            mask[:, column : column + width] = extras.patterns[pattern, : part.shape[1], :width].bool()
            column += width
        dead = ~mask.any(-1)
        found = _sdpa_with(mask | dead[:, None], part, k.index_select(1, at), v.index_select(1, at), call.scale)
        parts.append(found.masked_fill(dead[:, None, None], 0))
    return torch.cat(parts, 1) if parts else q.new_zeros(*q.shape[:3], v.shape[3])


def _packed(call: Call) -> Tensor:
    """One call per sequence."""
    extras = Extras(*call.extras)
    sizes = [torch.as_tensor(cu).diff().tolist() for cu in (extras.cu_seqlens_q, extras.cu_seqlens_k)]
    parts = zip(call.q.split(sizes[0], 1), call.k.split(sizes[1], 1), call.v.split(sizes[1], 1))
    band = call.align != FROM_START, call.left, call.right
    found = [_sdpa(q, k, v, *band, call.scale) for q, k, v in parts]
    return torch.cat(found, 1) if found else call.q.new_zeros(*call.q.shape[:3], call.v.shape[3])


def _decided(condition):
    """A plain bool for SDPA's flags: torch.compile passes its symbols through bool(), but guards on a branch."""
    if condition:  # noqa: SIM103
        return True
    return False


def _sdpa(q, k, v, align_end, left, right, scale):
    """F.scaled_dot_product_attention on transposed views; every key of k is visible to someone or cut off here."""
    S, T = q.shape[1], k.shape[1]
    if left >= 0 or right > 0:
        offset = T - S if align_end else 0
        if _decided((right < 0 or offset + right >= 0) and (left < 0 or S - 1 + offset - left <= T - 1)):
            return _windowed(q, k, v, offset, left, right, scale)  # every query sees something
        return _masked(
            Call(q, k, v, None, None, None, None, [], TO_END if align_end else FROM_START, left, right, scale, 0.0, 0.0)
        )
    causal = right == 0
    if S == 1 and q.device.type == "cpu":
        first_only = causal and not align_end
        return _sdpa_one_query(q, k[:, :1] if first_only else k, v[:, :1] if first_only else v, scale)
    if causal and align_end and S > T:  # the first rows see nothing
        live = _sdpa(q[:, S - T :], k, v, align_end, left, right, scale)
        return torch.cat([live.new_zeros(q.shape[0], S - T, q.shape[2], v.shape[3]), live], 1)
    if causal and not align_end and S < T:  # the last keys are seen by nobody
        k, v, T = k[:, :S], v[:, :S], S
    # torch's is_causal means top-left; on a square the two corners are one.
    square = causal and _decided(S == T)
    if square and attention_cpu.serves(q, k, v):
        return attention_cpu.causal(q, k, v, scale, _causal_reference)
    mask = None
    if causal and not square:
        mask = _band(S, T, T - S if align_end else 0, -1, 0, q.device)
    return _sdpa_with(mask, q, k, v, scale, square)


def _sdpa_with(mask, q, k, v, scale, causal=False):
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=_decided(q.shape[2] != k.shape[2]),
    ).transpose(1, 2)  # fmt: skip


_FEWEST = 128  # queries that a window takes at a time


def _windowed(q, k, v, offset, left, right, scale):
    """A window, some queries at a time with the keys they see: 2048 queries with a window of 256 take a quarter of the time."""
    S, T = q.shape[1], k.shape[1]
    step = max(_FEWEST, left + right)
    if left < 0 or right < 0 or torch.compiler.is_compiling() or step >= S or q.device.type != "cpu":
        return _sdpa_with(_band(S, T, offset, left, right, q.device), q, k, v, scale)
    parts = []
    for first in range(0, S, step):
        rows = min(step, S - first)
        lo, hi = max(0, first + offset - left), min(T, first + rows + offset + right)
        mask = _band(rows, hi - lo, first + offset - lo, left, right, q.device)
        parts.append(_sdpa_with(mask, q[:, first : first + rows], k[:, lo:hi], v[:, lo:hi], scale))
    return torch.cat(parts, 1)


def _band(S, T, offset, left, right, device):
    """Boolean [S, T]: keys from `left` before to `right` after the diagonal; -1 for no limit."""
    mask = torch.ones(S, T, dtype=torch.bool, device=device)
    mask = mask.tril(offset + right) if right >= 0 else mask
    return mask.triu(offset - left) if left >= 0 else mask


def _causal_reference(q, k, v, scale):
    return reference(q, k, v, None, None, None, None, [], TO_SEEN, -1, 0, scale, 0.0, 0.0, False)


def _sdpa_one_query(q, k, v, scale):
    """Decoding on the CPU: the query heads of a group become queries of one head.

    A product with one row is slow there in 16 bits: measured 3.6x (T 128) to 6x (T 1024) with three heads to a group, and
    1.5x to 1.8x for ungrouped heads by writing the query twice (a view) and dropping the second answer.
    """
    B, _, H, D = q.shape
    rows = q.reshape(B, k.shape[2], H // k.shape[2], D)
    alone = rows.shape[2] == 1 and q.dtype.itemsize == 2
    if alone:
        rows = rows.expand(-1, -1, 2, -1)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return (out[:, :, :1] if alone else out).reshape(B, 1, H, v.shape[3])


def _masked(call: Call) -> Tensor:
    """With a mask, of numbers where something is added to the scores; rows that see nothing are put right."""
    q = call.q
    seen = who_sees_whom(call)
    added = added_scores(call)
    if added is not None:
        seen = seen & (added >= HIDDEN)
    dead = ~seen.any(-1, keepdim=True)
    mask = seen | dead
    if added is not None:
        mask = added.masked_fill(~mask, float("-inf")).masked_fill(
            dead, 0
        )  # stays fp32: rounded, it would move sharp scores
    k, v = without_hidden_keys(call, call.k), without_hidden_keys(call, call.v)
    mask = mask.expand(-1, -1, q.shape[1], k.shape[1])
    return _sdpa_with(mask, q, k, v, call.scale).masked_fill(dead.transpose(1, 2), 0)
