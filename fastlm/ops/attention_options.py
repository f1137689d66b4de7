"""What a user may say to attention, checked and brought into the form its op takes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._tensor import autocast_dtype, host_values
from fastlm.ops.attention_reference import FROM_START, TO_END, TO_SEEN, Call, Extras
from fastlm.ops.block_mask import BlockMask
from fastlm.ops.number_checks import SMALLEST, check_number
from fastlm.ops.random_bits import seed_tensor

_CORNERS = {False: (TO_END, -1), True: (TO_SEEN, 0), "bottom_right": (TO_SEEN, 0), "top_left": (FROM_START, 0)}
_NO_LIMIT = 2**30  # a window this wide shows everything, and sums with positions stay in 32 bits
_INTEGERS = (torch.int32, torch.int64)


class RelativeBias(NamedTuple):
    """T5's learned bias by bucketed distance (Raffel et al. 2020, arXiv:1910.10683), for attention's relative_bias.

    Attributes:
        table: [buckets, H], any floating dtype; gets a gradient.
        bidirectional: half of the buckets for keys after the query (encoders); False: those share bucket 0 (decoders).
        max_distance: from here on all distances share the last bucket.
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128

    def by_distance(self) -> Tensor:
        """[H, 2 max_distance + 1]: the bias of a key at distance -max_distance, ..., max_distance from its query."""
        reach = self.max_distance
        if not isinstance(self.table, Tensor) or self.table.ndim != 2 or not isinstance(reach, int):
            raise TypeError(f"attention: relative_bias needs a table [buckets, H] and an int max_distance, got "
                            f"{list(getattr(self.table, 'shape', [])) or self.table!r} and {reach!r}")  # fmt: skip
        buckets = self.table.shape[0] // (2 if self.bidirectional else 1)
        exact = buckets // 2
        if exact < 1 or reach <= exact:
            raise ValueError(
                f"attention: relative_bias needs max_distance > {exact}, half the buckets of one side, and at least two of "
                f"them, got {self.table.shape[0]} buckets and max_distance {reach}"
            )
        distance = torch.arange(-reach, reach + 1, device=self.table.device)
        far = distance.abs() if self.bidirectional else (-distance).clamp(min=0)
        # The first half of the buckets holds one distance each, the rest grow with its logarithm.
        grown = (
            exact + (torch.log(far.float() / exact) / math.log(reach / exact) * (buckets - exact)).clamp(min=0).long()
        )
        bucket = torch.where(far < exact, far, grown.clamp(max=buckets - 1))
        if self.bidirectional:
            bucket = bucket + buckets * (distance > 0)
        return F.embedding(bucket, self.table).transpose(0, 1)  # its backward sums in a fixed order on a GPU


def make_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal,
    window,
    scale,
    bias,
    relative_bias,
    alibi_slopes,
    softcap,
    sinks,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    key_lengths,
    key_starts,
    prefix_lengths,
    document_ids,
    block_mask,
    dropout_p,
    seed,
    check,
) -> Call:
    """The Call of ops.attention's arguments; raises what its docstring says, before anything is computed."""
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    _check_heads(q, k, v, packed)
    if packed:
        if cu_seqlens_k is None and q.shape[0] == k.shape[0]:
            cu_seqlens_k = cu_seqlens_q
        q, k, v = q[None], k[None], v[None]
    align, left, right = _band(causal, window)
    dtype = autocast_dtype(q)
    if dtype is not None and q.dtype is not torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them")
    values = check or q.device.type == "cpu"
    if packed:
        longest_q = _check_cu("cu_seqlens_q", cu_seqlens_q, q, None, values, max_seqlen_q)
        longest_k = _check_cu("cu_seqlens_k", cu_seqlens_k, k, cu_seqlens_q.shape[0], values, max_seqlen_k)
        B, S, T = cu_seqlens_q.shape[0] - 1, None, None
        if longest_q is not None:
            _check_covers(bias, block_mask, longest_q, longest_k)
    else:
        B, S, T = q.shape[0], q.shape[1], k.shape[1]
        if max_seqlen_q is not None or max_seqlen_k is not None:
            raise ValueError(
                "attention: max_seqlen_q and max_seqlen_k belong to packed sequences; give cu_seqlens_q too"
            )
    for name, x in (("key_lengths", key_lengths), ("key_starts", key_starts), ("prefix_lengths", prefix_lengths)):
        if x is not None:
            _check_per_sequence(name, x, B, q, None if name == "prefix_lengths" else T, values)
    scale, softcap = score_numbers("attention", scale, softcap, q.shape[3])
    if not 0 <= dropout_p < 1:
        raise ValueError(f"attention: dropout_p must lie in [0, 1), got {dropout_p}")
    H = q.shape[2]
    _check_per_head("alibi_slopes", alibi_slopes, H, q)
    _check_per_head("sinks", sinks, H, q)
    given = (alibi_slopes, cu_seqlens_q, key_starts, prefix_lengths, document_ids, block_mask)
    extras = []
    if dropout_p or any(x is not None for x in given):
        slopes = None if alibi_slopes is None else alibi_slopes.float()
        extras = Extras(slopes, cu_seqlens_q, cu_seqlens_k, key_starts, prefix_lengths, *_documents(document_ids, q, k, packed),
                        seed_tensor("attention", seed, q) if dropout_p else None,
                        *_blocks(block_mask, q, B, H, S, T)).listed()  # fmt: skip
    simple = bias is None and relative_bias is None and alibi_slopes is None and left < 0
    if simple and S == 1 and align == TO_SEEN and not packed:
        right = -1  # one query at the bottom right sees every key
    if simple and right < 0:
        align = FROM_START  # nothing is measured from the diagonal
    return Call(
        q, k, v, key_lengths, _bias(bias, q, B, H, S, T), _distances(relative_bias, H, q), sinks, extras,
        align, left, right, scale, softcap, dropout_p,
    )  # fmt: skip


def score_numbers(op: str, scale: float | None, softcap: float | None, width: int) -> tuple[float, float]:
    """(scale, softcap) of a call, with the default of a head's width and 0 for no softcap."""
    if scale is None:
        scale = width**-0.5
    else:
        check_number(op, "scale", scale)
    if softcap is None:
        return scale, 0.0
    # Kernels have it times log2(e).
    check_number(op, "softcap", softcap, SMALLEST, 1e38, "> 0 or None: a normal number of fp32, 1.2e-38 to 1e38")
    if not abs(scale) <= 1e37 * softcap:  # and 2 log2(e) scale / softcap
        raise ValueError(f"{op}: softcap must be at least 1e-37 times scale {scale}, got {softcap}")
    return scale, float(softcap)


def _check_heads(q, k, v, packed):
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x)
    if not (q.is_floating_point() and k.is_floating_point() and v.is_floating_point()):
        raise TypeError(f"attention: q, k and v must be floating point, got {q.dtype}, {k.dtype}, {v.dtype}")
    ndim, rows = (3, "[total, ") if packed else (4, "[B, S, ")
    if not q.ndim == k.ndim == v.ndim == ndim:
        raise ValueError(
            f"attention: q, k and v must be {rows}H, Dh], {rows.replace('S', 'T')}H_kv, Dh] and {rows.replace('S', 'T')}H_kv, "
            f"Dv]{' with cu_seqlens' * packed}, got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
            + ("; packed sequences need cu_seqlens_q" if not packed and q.ndim == 3 else "")
        )
    H, D = q.shape[-2:]
    H_kv = k.shape[-2]
    if (not packed and k.shape[0] != q.shape[0]) or k.shape[-1] != D or D == 0:
        wanted = f"[T, H_kv, {D}]" if packed else f"[{q.shape[0]}, T, H_kv, {D}]"
        raise ValueError(f"attention: k must be {wanted} like q {list(q.shape)}, got {list(k.shape)}")
    if v.shape[:-1] != k.shape[:-1] or v.shape[-1] == 0:
        wanted = ", ".join(map(str, k.shape[:-1]))
        raise ValueError(f"attention: v must be [{wanted}, Dv] like k {list(k.shape)}, got {list(v.shape)}")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"attention: q's {H} heads must be a multiple of k's and v's {H_kv}")
    if not q.device == k.device == v.device:
        raise ValueError(f"attention: k and v must be on q's device {q.device}, got {k.device}, {v.device}")


def _check_device(name, x, q):
    if x.device != q.device:
        raise ValueError(f"attention: {name} must be on q's device {q.device}, got {x.device}")


def _values(x, wanted):
    """The values of x as a list if they are wanted and reading them breaks nothing."""
    if not wanted:
        return None
    return x.tolist() if x.device.type == "cuda" else host_values(x)


def _band(causal, window):
    """(align, left, right) of a Call."""
    try:
        align, right = _CORNERS[causal]
    except (KeyError, TypeError):
        raise ValueError(
            f"attention: causal must be False, True, 'bottom_right' or 'top_left', got {causal!r}"
        ) from None
    if window is None:
        return align, -1, right
    try:
        left, after = (-1 if side is None else side for side in window)
        if not all(isinstance(side, (int, torch.SymInt)) for side in (left, after)):
            raise TypeError
    except (TypeError, ValueError):
        raise ValueError(
            f"attention: window must be a pair (left, right) of integers or None, got {window!r}"
        ) from None
    if left < -1 or after < -1:
        raise ValueError(f"attention: window's sides must be >= 0, or -1 for no limit, got {window!r}")
    left, after = (-1 if side >= _NO_LIMIT else side for side in (left, after))
    return align, left, after if right < 0 else right


def _check_tensor(name, x):
    if not isinstance(x, Tensor):
        raise TypeError(
            f"attention: {name} must be a tensor, got {type(x).__name__}; pass torch.tensor(...) on q's device"
        )


def _check_integers(name, x, q):
    _check_tensor(name, x)
    if x.dtype not in _INTEGERS:
        raise TypeError(f"attention: {name} must be int32 or int64, got {x.dtype}")
    _check_device(name, x, q)


def _check_cu(name, cu, x, length, values, longest):
    if cu is None:
        raise ValueError(
            f"attention: packed sequences need {name} [B + 1], the cumulative lengths, from 0 to the total"
        )
    _check_integers(name, cu, x)
    if cu.ndim != 1 or cu.shape[0] < 1 or (length is not None and cu.shape[0] != length):
        raise ValueError(f"attention: {name} must be [{'B + 1' if length is None else length}], got {list(cu.shape)}")
    found = _values(cu, values)
    if found is None:
        return None
    steps = [b - a for a, b in zip(found, found[1:])]
    if found[0] != 0 or found[-1] != x.shape[1] or min(steps, default=0) < 0:
        raise ValueError(f"attention: {name} must rise from 0 to {x.shape[1]}, the rows given, got {found}")
    if longest is not None and max(steps, default=0) > longest:
        raise ValueError(f"attention: max_seqlen{name[-2:]} is {longest}, and a sequence has {max(steps)} rows")
    return max(steps, default=0)


def _check_covers(bias, block_mask, longest_q, longest_k):
    """That what goes by position reaches the end of the longest packed sequence."""
    sizes = []
    if isinstance(bias, Tensor):
        sizes.append(("bias", [n if n > 1 else None for n in (1, 1, *bias.shape)[-2:]]))
    if isinstance(block_mask, BlockMask):
        sizes.append(("block_mask", block_mask.lengths))
    for name, size in sizes:
        if any(n is not None and n < longest for n, longest in zip(size, (longest_q, longest_k))):
            covered = [1 if n is None else n for n in size]
            raise ValueError(f"attention: {name} covers {covered} queries and keys, the longest packed sequences have "
                             f"{[longest_q, longest_k]}; make it that large")  # fmt: skip


def _check_per_sequence(name, x, B, q, highest, values):
    _check_integers(name, x, q)
    if x.ndim != 1 or x.shape[0] != B:
        raise ValueError(f"attention: {name} must be [{B}], one for each sequence, got {list(x.shape)}")
    found = _values(x, values)
    if found and (min(found) < 0 or (highest is not None and max(found) > highest)):
        limits = f"[0, {highest}] (k's length)" if highest is not None else "[0, ...)"
        raise ValueError(f"attention: {name} must lie in {limits}, got {found}")


def _check_per_head(name, x, H, q):
    if x is None:
        return
    _check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"attention: {name} must be floating point, got {x.dtype}")
    if x.shape != (H,):
        raise ValueError(f"attention: {name} must be [{H}], one for each query head, got {list(x.shape)}")
    _check_device(name, x, q)


def _documents(ids, q, k, packed):
    if ids is None:
        return None, None
    pair = (ids, ids) if isinstance(ids, Tensor) else ids
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(
            f"attention: document_ids must be one tensor or a pair for queries and keys, got {type(ids).__name__}"
        )
    for which, x, rows in zip(("queries", "keys"), pair, (q, k)):
        _check_integers("document_ids", x, q)
        if x.shape != rows.shape[:2] and not (packed and x.shape == rows.shape[1:2]):
            wanted = list(rows.shape[1:2] if packed else rows.shape[:2])
            raise ValueError(f"attention: document_ids of the {which} must be {wanted}, got {list(x.shape)}; pass a pair "
                             "(queries', keys') where the two differ")  # fmt: skip
    return tuple(x if x.ndim == 2 else x[None] for x in pair)


def _bias(bias, q, B, H, S, T):
    if bias is None:
        return None
    _check_tensor("bias", bias)
    if not bias.is_floating_point():
        raise TypeError(
            f"attention: bias must be floating point, got {bias.dtype}; a boolean mask m is torch.where(m, 0.0, -inf)"
        )
    _check_device("bias", bias, q)
    full = bias[(None,) * (4 - bias.ndim)] if bias.ndim <= 4 else bias
    if full.ndim != 4 or any(
        n not in (1, m) for n, m in zip(full.shape, (B, H, S or full.shape[2], T or full.shape[3]))
    ):
        wanted = [B, H, "longest q" if S is None else S, "longest k" if T is None else T]
        raise ValueError(f"attention: bias must broadcast to {wanted}, got {list(bias.shape)}")
    return full


def _distances(relative_bias, H, q):
    if relative_bias is None:
        return None
    by_distance = relative_bias.by_distance() if isinstance(relative_bias, RelativeBias) else relative_bias
    if not isinstance(by_distance, Tensor) or by_distance.ndim != 2 or by_distance.shape[1] % 2 == 0:
        raise ValueError("attention: relative_bias must be a RelativeBias (T5's bucket table) or a tensor [H, 2 R + 1], the bias "
                         f"of distances -R..R, got {list(getattr(by_distance, 'shape', [])) or by_distance!r}")  # fmt: skip
    if by_distance.shape[0] != H:
        raise ValueError(f"attention: relative_bias must have {H} heads, got {by_distance.shape[0]}")
    if not by_distance.is_floating_point():
        raise TypeError(f"attention: relative_bias must be floating point, got {by_distance.dtype}")
    _check_device("relative_bias", by_distance, q)
    return by_distance


def _blocks(mask, q, B, H, S, T):
    if mask is None:
        return (None,) * 9
    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"attention: block_mask must be a fastlm.ops.BlockMask, got {type(mask).__name__}; see BlockMask.from_dense"
        )
    tensors = mask.tensors()
    batch, heads = tensors[0].shape[:2]
    if batch not in (1, B) or heads not in (1, H):
        raise ValueError(f"attention: block_mask is for {batch} sequences and {heads} heads, the call has {B} and {H}")
    if S is not None and mask.lengths != (S, T):
        raise ValueError(f"attention: block_mask is for {mask.lengths} queries and keys, the call has {(S, T)}")
    _check_device("block_mask", tensors[0], q)
    return tensors
