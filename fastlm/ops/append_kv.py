"""Writing new keys and values into a cache, contiguous or paged, in place. Here too: what the two ops on caches check."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops._op import Op
from fastlm.ops._tensor import host_values
from fastlm.ops.rotary import OP as ROTARY
from fastlm.ops.rotary import rotated

_INTEGERS = (torch.int32, torch.int64)


def _reference(k_cache, v_cache, k, v, lengths, page_table, cos, sin, interleaved, rotary="reference"):
    B, S = k.shape[:2]
    place = lengths.long()[:, None] + torch.arange(S, device=k.device)
    if cos is not None:
        k = ROTARY.plain(rotary, k, k[:, :, :0], cos, sin, interleaved, place)[0]
    if page_table is None:
        page, slot = torch.arange(B, device=k.device)[:, None].expand(B, S), place
        live = (place >= 0) & (place < k_cache.shape[1])
    else:
        size = k_cache.shape[1]
        live = (place >= 0) & (place < page_table.shape[1] * size)
        page = page_table.long().gather(1, (place // size).clamp(0, max(page_table.shape[1] - 1, 0)))
        live, slot = live & (page >= 0) & (page < k_cache.shape[0]), place % size
    if k.numel() + v.numel() == 0 or k_cache.numel() + v_cache.numel() == 0:
        return
    page, slot, live = page.flatten(), slot.flatten(), live.flatten()
    # A token without a place does what the first one with a place does, which changes nothing and needs no look at the values.
    first = live.int().argmax()
    token = torch.arange(B * S, device=k.device).where(live, first)
    page, slot = page[token].clamp(0, k_cache.shape[0] - 1), slot[token].clamp(0, k_cache.shape[1] - 1)
    for cache, new in ((k_cache, k), (v_cache, v)):
        new = new.flatten(0, 1)[token].to(cache.dtype)
        cache[page, slot] = torch.where(live.any(), new, cache[page, slot])


def _torch(k_cache, v_cache, k, v, lengths, page_table, cos, sin, interleaved):
    starts = host_values(lengths)
    if starts is None:  # places that the host must not read: a GPU, a traced graph
        return _reference(k_cache, v_cache, k, v, lengths, page_table, cos, sin, interleaved, "torch")
    S, alike = k.shape[1], len(set(starts)) == 1
    place = torch.arange(starts[0], starts[0] + S) if alike else lengths.long()[:, None] + torch.arange(S)
    if cos is not None:
        k = rotated(k, cos, sin, interleaved, place)
    if page_table is not None:
        size = k_cache.shape[1]
        page = page_table.long()[:, place // size] if alike else page_table.long().gather(1, place // size)
        at = (page, place % size)
    elif alike:
        at = (slice(None), slice(starts[0], starts[0] + S))
    else:
        at = (torch.arange(len(starts))[:, None], place)
    k_cache[at], v_cache[at] = k.to(k_cache.dtype), v.to(v_cache.dtype)


OP = Op(
    "append_kv_",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths, Tensor? page_table, Tensor? cos, Tensor? sin,"
    " bool interleaved, str backend) -> ()",
    reference=_reference,
    torch=_torch,
    kernels={"triton": ("append_kv:append_kv", None)},
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)

OP.fake(lambda *args: None)


def places_of_cache(op: str, k_cache: Tensor, v_cache: Tensor, page_table: Tensor | None, B: int) -> int:
    """How many tokens a row of the cache has room for. Raises, in the name of `op`, for caches and tables that do not fit."""
    form = "[B, T_max, H_kv, width]" if page_table is None else "[pages, page_size, H_kv, width]"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.ndim != 4:
            raise ValueError(f"{op}: {name} must be {form}, got {list(cache.shape)}")
        if not cache.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {cache.dtype}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        wanted = ", ".join(map(str, k_cache.shape[:3]))
        raise ValueError(
            f"{op}: v_cache must be [{wanted}, Dv] like k_cache {list(k_cache.shape)}, got {list(v_cache.shape)}"
        )
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(f"{op}: v_cache must have k_cache's dtype {k_cache.dtype}, got {v_cache.dtype}")
    if v_cache.device != k_cache.device:
        raise ValueError(f"{op}: v_cache must be on k_cache's device {k_cache.device}, got {v_cache.device}")
    if page_table is None:
        if k_cache.shape[0] != B:
            raise ValueError(
                f"{op}: k_cache must have {B} rows as the new tokens have, got {k_cache.shape[0]}; a paged cache needs page_table"
            )
        return k_cache.shape[1]
    check_integers(op, "page_table", page_table, k_cache.device)
    if page_table.ndim != 2 or page_table.shape[0] != B:
        raise ValueError(
            f"{op}: page_table must be [{B}, max_pages], a line for each row, got {list(page_table.shape)}"
        )
    if k_cache.shape[1] == 0:
        raise ValueError(f"{op}: the pages of k_cache {list(k_cache.shape)} have no room; page_size must be at least 1")
    return page_table.shape[1] * k_cache.shape[1]


def check_integers(op: str, name: str, x: Tensor, device: torch.device) -> None:
    """Raises unless x is an int32 or int64 tensor on the device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor on {device}, got {type(x).__name__}")
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{op}: {name} must be int32 or int64, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on the cache's device {device}, got {x.device}")


def check_per_row(op: str, name: str, x: Tensor, B: int, device: torch.device) -> None:
    """Raises unless x is an integer for each of B rows."""
    check_integers(op, name, x, device)
    if x.shape != (B,):
        raise ValueError(f"{op}: {name} must be [{B}], one for each row, got {list(x.shape)}")


def check_pages(op: str, page_table: Tensor, pages: int, size: int, first: Tensor, end: Tensor) -> None:
    """Raises if a page that holds places first[b] .. end[b]-1 of a row b is none of the cache's. Reads values."""
    if page_table.numel() == 0:
        return
    low, high = map(int, page_table.aminmax())
    if low >= 0 and high < pages:
        return
    number = torch.arange(page_table.shape[1], device=page_table.device)
    used = ((number + 1) * size > first[:, None]) & (number * size < end[:, None])
    wrong = used & ((page_table < 0) | (page_table >= pages))
    if wrong.any():
        b, p = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: page_table must name pages 0..{pages - 1} where a row has tokens, got {int(page_table[b, p])} at [{b}, {p}]"
        )


def check_no_gradient(op: str, remedy: str, **tensors: Tensor | None) -> None:
    """Raises if one of the tensors is to be differentiated."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: it has no gradient, and {name} requires one; {remedy}")


def _check(k_cache, v_cache, k, v, lengths, page_table, cos, sin):
    if k.ndim != 4 or not k.is_floating_point():
        raise ValueError(f"append_kv_: k must be floating point [B, S, H_kv, Dh], got {k.dtype} {list(k.shape)}")
    places = places_of_cache("append_kv_", k_cache, v_cache, page_table, k.shape[0])
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x.shape != (*k.shape[:2], *cache.shape[2:]):
            wanted = [*k.shape[:2], *cache.shape[2:]]
            raise ValueError(f"append_kv_: {name} must be {wanted} to fit {name}_cache, got {list(x.shape)}")
        if x.dtype != k.dtype:
            raise TypeError(f"append_kv_: v must have k's dtype {k.dtype}, got {x.dtype}")
        if x.device != cache.device:
            raise ValueError(f"append_kv_: {name} must be on {name}_cache's device {cache.device}, got {x.device}")
    check_per_row("append_kv_", "lengths", lengths, k.shape[0], k.device)
    if (cos is None) != (sin is None):
        raise ValueError("append_kv_: cos and sin come together; pass both or neither")
    for name, t in (("cos", cos), ("sin", sin)):
        if t is None:
            continue
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"append_kv_: {name} must be float32 (16 bits cannot hold the angle), got {t.dtype}")
        if t.ndim != 2 or t.shape != cos.shape or t.shape[0] == 0 or not 0 < 2 * t.shape[1] <= k.shape[3]:
            raise ValueError(
                f"append_kv_: {name} must be [max_positions, R/2] with 0 < R <= Dh = {k.shape[3]}, alike in cos and sin, got "
                f"{list(t.shape)}"
            )
        if t.device != k.device:
            raise ValueError(f"append_kv_: {name} must be on k's device {k.device}, got {t.device}")
    starts = host_values(lengths)
    if starts and k.shape[1]:
        _check_places(starts, k.shape[1], places, cos, page_table, lengths, k_cache)


def _check_places(starts, count, places, cos, page_table, lengths, k_cache):
    low, high = min(starts), max(starts) + count
    if low < 0 or high > places:
        raise ValueError(
            f"append_kv_: lengths must lie in 0..{places - count}, so that {count} tokens fit into {places} places, got {starts}"
        )
    if cos is not None and high > cos.shape[0]:
        raise ValueError(
            f"append_kv_: cos and sin have {cos.shape[0]} positions, and the last token stands at {high - 1}"
        )
    if page_table is not None:
        check_pages("append_kv_", page_table, k_cache.shape[0], k_cache.shape[1], lengths, lengths + count)


def append_kv_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    page_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    backend: str = "auto",
) -> None:
    """Writes new keys and values behind each row's tokens, in place: token s of row b goes to place lengths[b] + s.

    Args:
        k_cache, v_cache: [B, T_max, H_kv, Dh] and [B, T_max, H_kv, Dv], or with page_table [pages, page_size, H_kv, Dh] and
            [pages, page_size, H_kv, Dv]; fp16, bf16, fp32 (any float dtype on the reference and torch), any strides; written.
        k: [B, S, H_kv, Dh], v: [B, S, H_kv, Dv], one float dtype, which may differ from the cache's; any strides.
        lengths: int32 or int64 [B], the tokens each row has before the call; not changed, as all layers write at the same places.
        page_table: int32 or int64 [B, max_pages]: place p of row b is slot p % page_size of page page_table[b, p // page_size]
            (Kwon et al. 2023, arXiv:2309.06180). Entries of pages in which nothing is written may be anything.
        cos, sin: [max_positions, R/2] fp32, R <= Dh: k is first rotated at its own place, as `rotary` does it and with its
            rounding. None: k comes rotated, or needs no rotation.
        interleaved: as in `rotary`.
        backend: "auto", "reference", "torch" or "triton".

    Nothing else in the caches changes. Places beyond the cache, and pages that do not exist, are an error on the CPU; on a GPU,
    where looking would stall it, and under torch.compile such tokens are left out. Positions beyond cos are clamped there.

    Raises:
        ValueError: shapes or devices that do not fit, places beyond the cache, a k or v that requires a gradient outside
        torch.no_grad(), an unknown or unsupported backend. TypeError: dtypes that do not fit.

    Backends: triton (compute capability >= 8.0, one launch), torch (the CPU default), reference.
    """
    _check(k_cache, v_cache, k, v, lengths, page_table, cos, sin)
    check_no_gradient("append_kv_", "call it under torch.no_grad()", k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    backend = OP.choose(backend, k_cache, v_cache, k, v, lengths, page_table, cos, sin)
    args = (k_cache, v_cache, k, v, lengths, page_table, cos, sin, interleaved)
    if backend in OP.plain_forms:
        OP.plain(backend, *args)
        return
    OP.forward(*args, backend)
    if not torch.compiler.is_compiling():  # the kernel's stores are not seen by autograd's version counters
        torch.autograd.graph.increment_version([t for t in (k_cache, v_cache) if not t.is_inference()])
