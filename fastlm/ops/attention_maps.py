"""Attention's weights, for looking inside a model: what each query reads, and how much each key is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlm.ops._tensor import compute_dtype
from fastlm.ops.attention_options import make_call
from fastlm.ops.attention_reference import Call, scores_and_mask

# The options of ops.attention that change its weights, and their defaults.
_OPTIONS: dict[str, Any] = {
    "causal": False,
    "check": False,
    **dict.fromkeys(
        ("window", "scale", "bias", "relative_bias", "alibi_slopes", "softcap", "sinks", "cu_seqlens_q", "cu_seqlens_k",
         "max_seqlen_q", "max_seqlen_k", "key_lengths", "key_starts", "prefix_lengths", "document_ids", "block_mask")
    ),
}  # fmt: skip
OPTIONS = frozenset(_OPTIONS)


def attention_weights(q: Tensor, k: Tensor, *, queries: slice | None = None, **options: Any) -> Tensor:
    """The weights that `attention` gives the keys: softmax(softcap(q k^T * scale) + biases + mask), before dropout.

    Args:
        q, k: as in `attention`.
        queries: a slice with step 1 of the S queries (packed: of all rows) whose weights are wanted; None for all. Memory is
            that of the result: choose few queries of a long sequence.
        options: those of `attention`, except dropout_p, seed, return_lse and backend.

    Returns:
        [B, H, rows, T] (packed [H, rows, total]), fp32 (fp64 for fp64 inputs), differentiable. A query's weights sum to 1, to
        less with sinks, and are 0 where it sees no key.

    Raises:
        What `attention` raises; TypeError for options it does not have; ValueError for a slice with another step.

    Runs in plain torch on any device.
    """
    call = _call("attention_weights", q, k, options)
    rows = slice(None) if queries is None else queries
    if not isinstance(rows, slice) or rows.step not in (None, 1):
        raise ValueError(
            f"attention_weights: queries must be a slice with step 1, such as slice(0, 8), got {queries!r}"
        )
    start, stop, _ = rows.indices(call.q.shape[1])
    with torch.autocast(q.device.type, enabled=False):
        return _unpacked(q, _weights(call, slice(start, max(start, stop))))


def received_attention(q: Tensor, k: Tensor, *, rows: int = 256, **options: Any) -> Tensor:
    """How much weight each key receives: the sum of `attention_weights` over the queries, without the S x T weights.

    Args:
        q, k, options: as in `attention_weights`.
        rows: queries worked on at a time. Memory beyond the result is a few times B * H * rows * T numbers, also for the
            gradient, whose backward computes the weights again. (Packed sequences with a block_mask hold it dense.)

    Returns:
        [B, H, T] (packed [H, total]), fp32 (fp64 for fp64 inputs), differentiable. Its sum over the keys is the number of
        queries that see a key, or less with sinks.

    Raises:
        What `attention_weights` raises; ValueError for rows below 1.
    """
    if rows < 1:
        raise ValueError(f"received_attention: rows must be at least 1, got {rows}")
    call = _call("received_attention", q, k, options)
    with torch.autocast(q.device.type, enabled=False):
        return _unpacked(q, _received(call, rows))


def _received(call: Call, rows: int) -> Tensor:
    S, T = call.q.shape[1], call.k.shape[1]
    tensors = (call.q, call.k, call.bias, call.distances, call.sinks)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    total = torch.zeros(call.q.shape[0], call.q.shape[2], T, device=call.q.device, dtype=compute_dtype(call.q))
    for start in range(0, S, rows):
        part = slice(start, min(start + rows, S))
        # Autograd would keep the weights of every block for the backward.
        total = total + (checkpoint(_summed, call, part, use_reentrant=False) if keep else _summed(call, part))
    return total


def _summed(call: Call, rows: slice) -> Tensor:
    return _weights(call, rows).sum(2)


def _weights(call: Call, rows: slice) -> Tensor:
    scores, seen, dead = scores_and_mask(call, rows)
    scores = scores.masked_fill(~seen, float("-inf")).masked_fill(dead, 0)
    if call.sinks is not None:
        sinks = call.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), -1)
    return scores.softmax(-1)[..., : call.k.shape[1]].masked_fill(~seen, 0)


def _unpacked(q: Tensor, found: Tensor) -> Tensor:
    return found if q.ndim == 4 else found[0]


def _call(name: str, q: Tensor, k: Tensor, options: dict[str, Any]) -> Call:
    unknown = sorted(set(options) - OPTIONS)
    if unknown:
        raise TypeError(
            f"{name}: {', '.join(unknown)} changes no weight or is no option of attention; it takes {sorted(OPTIONS)}"
        )
    return make_call(q, k, k, **(_OPTIONS | options), dropout_p=0.0, seed=None)
