"""Calls of decode_attention for its tests: random caches with garbage where nobody looks, plain code to compare with."""

import math
import sys

import torch

from fastlm.ops.decode_attention import decode_attention
from fastlm.testing import assert_accurate

LENGTHS = (0, 1, 18, 37)  # 37 keys: three tiles of the interpreter's 16


def inputs(device, page=0, S=1, H=4, H_kv=2, D=20, DV=12, T=37, lengths=LENGTHS, dtype=torch.float32, garbage=True):
    """q, k_cache, v_cache, lengths, page_table. page: tokens of a page, 0 for a contiguous cache.

    garbage: NaN wherever no row has a token, page numbers that do not exist wherever a row has none.
    """
    B, lengths = len(lengths), torch.tensor(lengths, dtype=torch.int64)
    q = torch.randn(B, S, H, D, dtype=torch.float64)
    k, v = (torch.randn(B, T, H_kv, width, dtype=torch.float64) for width in (D, DV))
    table = None
    if garbage:
        for b, n in enumerate(lengths.tolist()):
            k[b, n:], v[b, n:] = float("nan"), float("nan")
    if page:
        count = math.ceil(T / page)
        pages = B * count + 3
        table = torch.randperm(pages)[: B * count].view(B, count)
        pools = [
            torch.full((pages, page, H_kv, x.shape[3]), float("nan" if garbage else 0), dtype=x.dtype) for x in (k, v)
        ]
        for pool, x in zip(pools, (k, v)):
            padded = torch.full((B, count * page, *x.shape[2:]), float("nan" if garbage else 0), dtype=x.dtype)
            padded[:, :T] = x
            pool[table] = padded.unflatten(1, (count, page))
        k, v = pools
        if garbage:
            table[torch.arange(count) * page >= lengths[:, None]] = 1 << 20
            table[lengths == 0] = -5
        table = table.int().to(device)
    return *(x.to(dtype).to(device) for x in (q, k, v)), lengths.to(device), table


def options(name, H, device, starts=(0, 0, 9, 20)):
    """A feature of the matrix as arguments of decode_attention."""
    return {
        "window": {"window": 5},
        "alibi": {"alibi_slopes": torch.rand(H, device=device)},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": torch.randn(H, device=device)},
        "key_starts": {"key_starts": torch.tensor(starts, device=device)},
        "relative_bias": {"relative_bias": torch.randn(H, 9, device=device)},
    }[name]


def plain(q, k_cache, v_cache, lengths, table, window=None, alibi_slopes=None, softcap=None, sinks=None, key_starts=None,
          relative_bias=None):  # fmt: skip
    """What a user writes: row by row, products in the inputs' dtype, the softmax in fp32, rounded before the second product."""
    (B, S, H, D), group = q.shape, q.shape[2] // k_cache.shape[2]
    o, lse = torch.zeros(B, S, H, v_cache.shape[3], dtype=q.dtype), torch.full((B, H, S), float("-inf"))
    for b, n in enumerate(lengths.tolist()):
        start = 0 if key_starts is None else int(key_starts[b])
        key = torch.arange(start, max(n, start))
        at = (b, key) if table is None else (table[b, key // k_cache.shape[1]].long(), key % k_cache.shape[1])
        k, v = (x[at].repeat_interleave(group, 1).transpose(0, 1) for x in (k_cache, v_cache))
        distance = key - (n - S + torch.arange(S))[:, None]
        scores = ((q[b].transpose(0, 1) @ k.transpose(-1, -2)) * D**-0.5).float()
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[:, None, None] * distance.abs()
        if relative_bias is not None:
            reach = relative_bias.shape[1] // 2
            scores = scores + relative_bias[:, distance.clamp(-reach, reach) + reach].float()
        seen = distance <= 0
        if window is not None:
            seen = seen & (distance >= -window)
        live = seen.any(-1)
        scores = scores.masked_fill(~seen, float("-inf"))[:, live]
        if sinks is not None:
            scores = torch.cat((scores, sinks.float()[:, None, None].expand(H, scores.shape[1], 1)), -1)
        probs = scores.softmax(-1)[..., : len(key)].to(q.dtype)
        o[b, live], lse[b][:, live] = (probs @ v).transpose(0, 1), scores.logsumexp(-1)
    return o, lse


def check(args, options, *splits, backend="triton"):
    """Output and log-sum-exp of a backend under the accuracy rule, with every number of splits, in the reference and, where it
    serves the call, in the torch form."""
    wide = lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    host = lambda x: x.cpu() if isinstance(x, torch.Tensor) else x  # noqa: E731

    def call(backend, convert=lambda x: x, **more):
        q, k, v, lengths, table = map(convert, args)
        changed = {key: convert(x) for key, x in options.items()}
        return decode_attention(q, k, v, lengths, page_table=table, backend=backend, **changed, **more)

    exact = call("reference", wide, return_lse=True)
    user = plain(*map(host, args), **{key: host(x) for key, x in options.items()})
    runs = {f"{backend}, {n} splits": call(backend, splits=n, return_lse=True) for n in splits or (None,)}
    runs["reference"] = call("reference", return_lse=True)
    if not options.keys() & {"softcap", "sinks"}:
        runs["torch"] = (call("torch"),)
    for name, found in runs.items():
        for what, got, e, p in zip(("output", "lse"), found, exact, user):
            assert_accurate(got, e, p, f"decode_attention {name} {list(options)} {args[0].dtype}: {what}")


def hide_values(monkeypatch):
    """Lengths and tables cannot be read, as on a GPU."""
    for name in ("decode_attention", "attention_torch"):
        monkeypatch.setattr(sys.modules[f"fastlm.ops.{name}"], "host_values", lambda x: None)
