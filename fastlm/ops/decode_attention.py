"""Attention of a few new tokens over a cache of keys and values, contiguous or paged."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import attention_torch
from fastlm.ops._cuda import not_measured
from fastlm.ops._op import Op
from fastlm.ops._tensor import autocast_dtype, host_values
from fastlm.ops.append_kv import check_no_gradient, check_pages, check_per_row, places_of_cache
from fastlm.ops.attention_options import RelativeBias, score_numbers
from fastlm.ops.attention_reference import TO_SEEN, Call, Extras
from fastlm.ops.attention_reference import reference as attention_reference

MAX_WIDTH = 256
MAX_QUERIES = 16
_MAX_PLACES = 0x7FFF0000  # FASTLM_DECODE_ATTENTION_PLACES


def _reference(call: Call, page_table: Tensor | None, return_lse: bool):
    """attention over the gathered cache. `call` holds the cache as k and v."""
    return attention_reference(*_as_attention(call, page_table), return_lse)


def _as_attention(call: Call, page_table: Tensor | None) -> Call:
    """The same call over a contiguous cache, and with keys before every window hidden: they may hold anything."""
    if call.left >= 0:
        starts, S = Extras(*call.extras).key_starts if call.extras else None, call.q.shape[1]
        window = (call.key_lengths.clamp(max=_places(call.k, page_table)) - S - call.left).clamp(min=0)
        call = _with_starts(call, window if starts is None else torch.maximum(starts, window))
    if page_table is None:
        return call
    return call._replace(k=_gathered(call.k, page_table), v=_gathered(call.v, page_table))


def _places(cache, page_table):
    return cache.shape[1] * (1 if page_table is None else page_table.shape[1])


def _gathered(cache: Tensor, page_table: Tensor) -> Tensor:
    """The pages of each row one behind the other: [B, max_pages * page_size, H_kv, width]."""
    if cache.shape[0] == 0:
        return cache.new_zeros(page_table.shape[0], 0, *cache.shape[2:])
    return cache[page_table.long().clamp(0, cache.shape[0] - 1)].flatten(1, 2)


def _with_starts(call: Call, starts: Tensor | None) -> Call:
    extras = Extras(*call.extras) if call.extras else Extras()
    return call._replace(extras=extras._replace(key_starts=starts).listed())


def _torch(call: Call, page_table: Tensor | None, return_lse: bool) -> Tensor:
    spans = _spans(call)
    if spans is None:  # lengths that the host must not read: a GPU, a traced graph
        return attention_torch.attend(*_as_attention(call, page_table), False)
    if len(set(spans)) == 1:
        return _attend_span(call, page_table, spans[0])
    rows = [call.q.new_empty(0, *call.q.shape[1:3], call.v.shape[3])]
    for b, span in enumerate(spans):  # one call per row, of the keys it sees: no mask, no work on keys that nobody sees
        one = slice(b, b + 1)
        if page_table is None:
            row = _attend_span(call._replace(q=call.q[one], k=call.k[one], v=call.v[one]), None, span)
        else:
            row = _attend_span(call._replace(q=call.q[one]), page_table[one], span)
        rows.append(row)
    return torch.cat(rows)


def _spans(call: Call) -> list[tuple[int, int]] | None:
    """(first, end) of the keys that each row sees at all, or None where reading lengths costs a wait or a graph break."""
    lengths = host_values(call.key_lengths)
    starts = Extras(*call.extras).key_starts if call.extras else None
    firsts = [0] * len(lengths or []) if starts is None else host_values(starts)
    if lengths is None or firsts is None:
        return None
    if call.left >= 0:
        firsts = [max(first, end - call.q.shape[1] - call.left) for first, end in zip(firsts, lengths)]
    return [(min(first, end), end) for first, end in zip(firsts, lengths)]


def _attend_span(call: Call, page_table: Tensor | None, span: tuple[int, int]) -> Tensor:
    """The call where every row sees keys of [first, end) at most."""
    first, end = span
    if page_table is not None:
        size = call.k.shape[1]
        page_table = page_table[:, first // size : -(-end // size)]
        first, end = first % size, first % size + end - first
        call = call._replace(k=_gathered(call.k, page_table), v=_gathered(call.v, page_table))
    if first == end:
        return call.q.new_zeros(*call.q.shape[:3], call.v.shape[3])
    call = _with_starts(call._replace(k=call.k[:, first:end], v=call.v[:, first:end], key_lengths=None), None)
    if call.q.shape[1] == 1:
        call = call._replace(left=-1)  # the one query sees all that is left
    return attention_torch.attend(*call, False)


def _supports(backend, call, page_table, return_lse):
    if backend == "torch":
        return attention_torch.reason_against(call, return_lse)
    width = max(call.q.shape[3], call.v.shape[3])
    if backend in ("triton", "cuda") and width > MAX_WIDTH:
        return f"its heads are at most {MAX_WIDTH} wide, got {width}"
    if backend == "cuda":
        if call.v.shape[3] == 0:
            return "its values are at least one element wide"
        if _places(call.k, page_table) > _MAX_PLACES:
            return f"a row has at most {_MAX_PLACES} places, got {_places(call.k, page_table)}"
    return None


OP = Op(
    "decode_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? page_table, Tensor? key_starts, Tensor? alibi_slopes,"
    " Tensor? distances, Tensor? sinks, int left, float scale, float softcap, int splits, str backend)"
    " -> (Tensor o, Tensor lse)",
    reference=lambda *args: _reference(Call(*args[:-2]), *args[-2:]),
    torch=lambda *args: _torch(Call(*args[:-2]), *args[-2:]),
    kernels={"triton": ("decode_attention:decode_attention", None), "cuda": ("decode_attention_fwd", None)},
    supports=lambda backend, *args: _supports(backend, Call(*args[:-2]), *args[-2:]),
    slower=not_measured,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _fake(q, k_cache, v_cache, *rest):
    B, S, H, _ = q.shape
    return q.new_empty(B, S, H, v_cache.shape[3]), q.new_empty(B, H, S, dtype=torch.float32)


OP.fake(_fake)


def _check(q, k_cache, v_cache, lengths, page_table, splits):
    """Raises for what does not fit; returns how many places a row has."""
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"decode_attention: q must be floating point [B, S, H, Dh], got {q.dtype} {list(q.shape)}")
    B, S, H, D = q.shape
    if S > MAX_QUERIES:
        raise ValueError(
            f"decode_attention: q has {S} new tokens, at most {MAX_QUERIES}; for more use "
            "ops.attention(..., causal=True, key_lengths=lengths)"
        )
    places = places_of_cache("decode_attention", k_cache, v_cache, page_table, B)
    H_kv = k_cache.shape[2]
    if k_cache.shape[3] != D or D == 0:
        raise ValueError(f"decode_attention: k_cache must have q's width {D}, at least 1, got {list(k_cache.shape)}")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"decode_attention: q's {H} heads must be a multiple of k_cache's {H_kv}")
    if q.device != k_cache.device:
        raise ValueError(f"decode_attention: q must be on k_cache's device {k_cache.device}, got {q.device}")
    check_per_row("decode_attention", "lengths", lengths, B, q.device)
    if splits is not None and not 1 <= splits <= 65535:
        raise ValueError(f"decode_attention: splits must lie in 1..65535, or be None to choose, got {splits}")
    return places


def _check_values(call, places, page_table, check):
    """On the CPU, where looking costs nothing, and where asked."""
    lengths, starts = call.key_lengths, Extras(*call.extras).key_starts if call.extras else None
    if host_values(lengths) is None and not (check and lengths.device.type == "cuda"):
        return
    for name, x in (("lengths", lengths), ("key_starts", starts)):
        if x is not None and x.numel() and not 0 <= int(x.min()) <= int(x.max()) <= places:
            raise ValueError(f"decode_attention: {name} must lie in 0..{places}, the places of a row, got {x.tolist()}")
    if page_table is not None:
        first = lengths.clamp(max=0) if starts is None else starts
        if call.left >= 0:
            first = torch.maximum(first, lengths - call.q.shape[1] - call.left)
        check_pages("decode_attention", page_table, call.k.shape[0], call.k.shape[1], first, lengths)


def _window(window):
    """How many keys before the diagonal are seen, -1 for all."""
    if window is None:
        return -1
    try:
        left, right = (window, 0) if isinstance(window, int) else (-1 if side is None else int(side) for side in window)
    except (TypeError, ValueError):
        left, right = -2, -2
    if left < -1 or right < -1:
        raise ValueError(
            "decode_attention: window must be the number of keys seen before the query's own, or a pair (left, right), each "
            f"side >= 0, or -1 for no limit, got {window!r}"
        )
    return left


def _per_head(name, x, q):
    if x is None:
        return
    if not x.is_floating_point():
        raise TypeError(f"decode_attention: {name} must be floating point, got {x.dtype}")
    if x.shape != q.shape[2:3]:
        raise ValueError(
            f"decode_attention: {name} must be [{q.shape[2]}], one for each query head, got {list(x.shape)}"
        )
    if x.device != q.device:
        raise ValueError(f"decode_attention: {name} must be on q's device {q.device}, got {x.device}")


def _distances(relative_bias, q):
    if relative_bias is None:
        return None
    x = relative_bias.by_distance() if isinstance(relative_bias, RelativeBias) else relative_bias
    if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[0] != q.shape[2] or x.shape[1] % 2 == 0:
        raise ValueError(
            f"decode_attention: relative_bias must be a RelativeBias or a tensor [{q.shape[2]}, 2 R + 1], the bias of distances "
            f"-R..R, got {list(getattr(x, 'shape', [])) or x!r}"
        )
    if x.device != q.device:
        raise ValueError(f"decode_attention: relative_bias must be on q's device {q.device}, got {x.device}")
    return x


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    page_table: Tensor | None = None,
    scale: float | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    relative_bias: RelativeBias | Tensor | None = None,
    key_starts: Tensor | None = None,
    splits: int | None = None,
    return_lse: bool = False,
    check: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last S tokens of each row over all its tokens: attention(q, k, v, causal=True, key_lengths=lengths).

    Query s of row b sees key j of its row where j <= lengths[b] - S + s. The options mean what they mean in `attention`.

    Args:
        q: [B, S, H, Dh], S from 1 to 16, fp16, bf16, fp32 (any float dtype on the reference), any strides. Its keys and values
            are in the cache already; see append_kv_.
        k_cache, v_cache: [B, T_max, H_kv, Dh] and [B, T_max, H_kv, Dv], or with page_table [pages, page_size, H_kv, Dh] and
            [pages, page_size, H_kv, Dv]; q's dtype, any strides, page_size any number from 1. H must be a multiple of H_kv.
        lengths: int32 or int64 [B], the tokens each row holds, the new ones included. What lies past them is not read.
        page_table: int32 or int64 [B, max_pages]: key j of row b is slot j % page_size of page page_table[b, j // page_size]
            (Kwon et al. 2023, arXiv:2309.06180). Entries of pages that no query of the row sees may be anything.
        scale: multiplies the scores; None for Dh ** -0.5.
        window: how many keys before its own a query sees, as a number or as the left of (left, right); None or -1: all.
        alibi_slopes, sinks: [H]. softcap: > 0. relative_bias: a RelativeBias, or a tensor [H, 2 R + 1].
        key_starts: int32 or int64 [B]: keys before it are not seen: left padding.
        splits: how many shares the keys of a row are cut into, each for one program; None chooses by the size of the GPU. The
            same number gives the same bits.
        return_lse: also return the log-sum-exp of the scores (and sink).
        check: check the values of lengths, key_starts and page_table on a GPU too, at the price of a wait.
        backend: "auto", "reference", "torch", "triton" or "cuda".

    Returns:
        o [B, S, H, Dv] in q's dtype; with return_lse the pair (o, lse), lse [B, H, S] fp32, natural logarithm. A query that
        sees no key gives o = 0 and lse = -inf. Scores and sums are fp32. Under autocast q is cast to the cache's dtype.

    Raises:
        ValueError: shapes that do not fit, values out of range (seen on the CPU or with check=True; clamped on a GPU), more
        than 16 queries, inputs that require a gradient outside torch.no_grad() (use ops.attention), an unsupported backend.
        TypeError: dtypes that differ or are not floating point, lengths that are not integers.

    Backends: triton on compute capability >= 8.0, Dh and Dv <= 256; cuda likewise (16-bit caches whose rows begin at 16 bytes are
    read best), not chosen by "auto"; torch (the CPU's choice) without return_lse, softcap and sinks. Papers: Dao et al. 2023,
    "Flash-Decoding for long-context inference"; Ainslie et al. 2023, arXiv:2305.13245.
    """
    places = _check(q, k_cache, v_cache, lengths, page_table, splits)
    if autocast_dtype(q) is not None:
        q = q.to(k_cache.dtype)  # never the other way round: the cache is large
    if q.dtype != k_cache.dtype:
        raise TypeError(f"decode_attention: q must have the cache's dtype {k_cache.dtype}, got {q.dtype}; cast it")
    left = _window(window)
    _per_head("alibi_slopes", alibi_slopes, q)
    _per_head("sinks", sinks, q)
    scale, softcap = score_numbers("decode_attention", scale, softcap, q.shape[3])
    if key_starts is not None:
        check_per_row("decode_attention", "key_starts", key_starts, q.shape[0], q.device)
    distances = _distances(relative_bias, q)
    check_no_gradient(
        "decode_attention", "use ops.attention, or torch.no_grad()", q=q, k_cache=k_cache, v_cache=v_cache, sinks=sinks,
        alibi_slopes=alibi_slopes, relative_bias=distances,
    )  # fmt: skip
    slopes = None if alibi_slopes is None else alibi_slopes.float()
    call = Call(
        q=q, k=k_cache, v=v_cache, key_lengths=lengths, bias=None, distances=distances, sinks=sinks,
        extras=Extras(alibi_slopes=slopes, key_starts=key_starts).listed(), align=TO_SEEN, left=left, right=0,
        scale=float(scale), softcap=softcap, dropout=0.0,
    )  # fmt: skip
    _check_values(call, places, page_table, check)
    backend = OP.choose(backend, *call, page_table, return_lse)
    if backend in OP.plain_forms:
        return OP.plain(backend, *call, page_table, return_lse)
    found = OP.forward(
        q, k_cache, v_cache, lengths, page_table, key_starts, slopes, distances, sinks, left, call.scale, call.softcap,
        splits or 0, backend,
    )  # fmt: skip
    return found if return_lse else found[0]
