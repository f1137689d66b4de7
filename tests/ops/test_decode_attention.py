import json
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

from fastlm import ops
from fastlm.ops.append_kv import append_kv_
from fastlm.ops.attention_options import RelativeBias
from fastlm.ops.decode_attention import OP, decode_attention
from fastlm.testing import assert_accurate, bands_intact, guarded, planted_bug, poison_empty

BACKENDS = ("reference", "torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 18, 37)  # 37 keys: three tiles of the interpreter's 16
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _inputs(device, page=0, S=1, H=4, H_kv=2, D=20, DV=12, T=37, lengths=LENGTHS, dtype=torch.float32, garbage=True):
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


def _options(name, H, device, starts=(0, 0, 9, 20)):
    """A feature of the matrix as arguments of decode_attention."""
    return {
        "window": {"window": 5},
        "alibi": {"alibi_slopes": torch.rand(H, device=device)},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": torch.randn(H, device=device)},
        "key_starts": {"key_starts": torch.tensor(starts, device=device)},
        "relative_bias": {"relative_bias": torch.randn(H, 9, device=device)},
    }[name]


def _plain(q, k_cache, v_cache, lengths, table, window=None, alibi_slopes=None, softcap=None, sinks=None, key_starts=None,
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


def _check(device, args, options, *splits):
    """Output and log-sum-exp under the accuracy rule, with every number of splits, in the reference and, where it serves the
    call, in the torch form."""
    wide = lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    host = lambda x: x.cpu() if isinstance(x, torch.Tensor) else x  # noqa: E731

    def call(backend, convert=lambda x: x, **more):
        q, k, v, lengths, table = map(convert, args)
        changed = {key: convert(x) for key, x in options.items()}
        return decode_attention(q, k, v, lengths, page_table=table, backend=backend, **changed, **more)

    exact = call("reference", wide, return_lse=True)
    plain = _plain(*map(host, args), **{key: host(x) for key, x in options.items()})
    runs = {f"triton, {n} splits": call("triton", splits=n, return_lse=True) for n in splits or (None,)}
    runs["reference"] = call("reference", return_lse=True)
    if not options.keys() & {"softcap", "sinks"}:
        runs["torch"] = (call("torch"),)
    for name, found in runs.items():
        for what, got, e, p in zip(("output", "lse"), found, exact, plain):
            assert_accurate(got, e, p, f"decode_attention {name} {list(options)} {args[0].dtype}: {what}")


@pytest.mark.parametrize("page", [0, 1, 4, 6, 16, 64])
@pytest.mark.parametrize("S", [1, 3])
def test_pages_and_splits(page, S, device):
    """Against plain code on every kind of page (one key, some of them to a tile, a tile, several tiles), cut in 1 to 3 shares."""
    _check(device, _inputs(device, page, S=S), {}, *((2, None) if S == 1 else (1, 3)))


def test_it_is_attention(device):
    q, k, v, lengths, _ = _inputs(device, S=3)
    want = ops.attention(q, k, v, causal=True, key_lengths=lengths, return_lse=True, backend="reference")
    for backend in ("reference", "triton"):
        got = decode_attention(q, k, v, lengths, return_lse=True, backend=backend)
        torch.testing.assert_close(got, want)
    assert not got[0][0].any() and torch.equal(
        got[1][0], torch.full_like(got[1][0], float("-inf"))
    )  # a row of no tokens
    assert not got[0][1, :2].any() and got[0][1, 2].all()  # one token, three queries


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H, H_kv", [(4, 1), (4, 4), (6, 2)])
def test_dtypes_and_groups(H, H_kv, dtype, device):
    for page, S, splits in ((0, 1, 2), (4, 2, 1)):
        _check(device, _inputs(device, page, S=S, H=H, H_kv=H_kv, lengths=(1, 37), dtype=dtype), {}, splits)


@pytest.mark.parametrize("D, DV", [(8, 40), (72, 16), (128, 64), (256, 8), (1, 1)])
def test_widths(D, DV, device):
    for page in (0, 4):
        _check(device, _inputs(device, page, D=D, DV=DV, lengths=(20, 7)), {}, 2)


def test_more_rows_than_a_tile(device):
    _check(device, _inputs(device, 4, S=16, H=10, H_kv=2, lengths=(37, 9)), {"window": 3}, 2)  # 80 rows: two tiles


FEATURES = ("paged", "queries", "groups", "window", "alibi", "softcap", "sinks", "key_starts", "relative_bias")


@pytest.mark.parametrize("pair", list(combinations(FEATURES, 2)), ids="-".join)
def test_every_pair_of_features(pair, device):
    H_kv = 1 if "groups" in pair else 2
    args = _inputs(device, 6 if "paged" in pair else 0, S=3 if "queries" in pair else 1, H=2, H_kv=H_kv)
    options = {}
    for name in pair:
        if name not in ("paged", "queries", "groups"):
            options |= _options(name, 2, device)
    _check(device, args, options, 1 + FEATURES.index(pair[0]) % 2)


@pytest.mark.parametrize("page", [0, 4, 16])
def test_all_features_at_once(page, device):
    options = {}
    for name in FEATURES[3:]:
        options |= _options(name, 4, device)
    _check(device, _inputs(device, page, S=3), options, 1, 3)
    buckets = RelativeBias(torch.randn(8, 4, device=device), bidirectional=False, max_distance=20)
    args = _inputs(device, page)
    got, want = (
        decode_attention(*args[:4], page_table=args[4], relative_bias=buckets, backend=b)
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(got, want)


@each_backend
@pytest.mark.parametrize("page", [0, 4])
def test_the_sides_of_a_window(page, backend, device):
    args = _inputs(device, page, S=2, lengths=(1, 37))
    call = lambda window: decode_attention(*args[:4], page_table=args[4], window=window, backend=backend)  # noqa: E731
    assert torch.equal(call(7), call((7, 0))) and torch.equal(call(7), call((7, -1)))
    assert torch.equal(call(None), call(-1)) and torch.equal(call(None), call((None, None)))
    torch.testing.assert_close(call(1000), call(None))
    assert (call(7)[1] - call(None)[1]).abs().max() > 0.01


@each_backend
@pytest.mark.parametrize("page, S", [(1, 1), (4, 3), (16, 1)])
def test_pages_before_the_window_may_be_gone(S, page, backend, device, monkeypatch):
    """Their numbers may be anything, and so may what lies before the window in the page where it begins."""
    q, k, v, lengths, table = _inputs(device, page, S=S)
    want = decode_attention(q, k, v, lengths, page_table=table, window=5, backend="reference")
    starts = torch.tensor([0, 0, 13, 0], device=device)
    want_starts = decode_attention(q, k, v, lengths, page_table=table, key_starts=starts, backend="reference")
    gone, gone_starts = table.clone(), table.clone()
    for b, n in enumerate(lengths.tolist()):
        first = max(n - S - 5, 0)
        gone[b, : first // page], gone_starts[b, : int(starts[b]) // page] = 1 << 19, -7
        if n > 0 and first % page:
            k[int(table[b, first // page]), : first % page] = float("nan")
            v[int(table[b, first // page]), : first % page] = float("nan")
    for splits in (1, 2):
        got = decode_attention(q, k, v, lengths, page_table=gone, window=5, splits=splits, backend=backend)
        torch.testing.assert_close(got, want)
    if backend == "torch":
        _hide_values(monkeypatch)
        got = decode_attention(q, k, v, lengths, page_table=gone, window=5, backend=backend)
        torch.testing.assert_close(got, want)
    q, k, v, lengths, _ = (x.nan_to_num() if x.is_floating_point() else x for x in (q, k, v, lengths, table))
    got = decode_attention(q, k, v, lengths, page_table=gone_starts, key_starts=starts, backend=backend)
    torch.testing.assert_close(got[2], want_starts[2])


def _hide_values(monkeypatch):
    """Lengths and tables cannot be read, as on a GPU."""
    for name in ("decode_attention", "attention_torch"):
        monkeypatch.setattr(sys.modules[f"fastlm.ops.{name}"], "host_values", lambda x: None)


def _check_guards(device, **options):
    for page, splits in ((0, 1), (6, 2)):
        args = _inputs(device, page, S=3, lengths=(5, 37))
        pairs = [guarded(t) for t in args if t is not None]
        inner = [t for t, _ in pairs]

        def call(q, k, v, n, table=None, splits=splits):
            kept = {"splits": splits, "return_lse": True, "backend": "triton"}
            return decode_attention(q, k, v, n, page_table=table, **kept, **options)

        with poison_empty():
            got = call(*inner)
        assert all(bands_intact(buffer) for _, buffer in pairs), "wrote outside an input"
        assert all(torch.equal(a, b) for a, b in zip(got, call(*args))), "unwritten elements or a read outside a tensor"
        want = decode_attention(*args[:4], page_table=args[4], return_lse=True, backend="reference", **options)
        torch.testing.assert_close(got, want)


def test_guard_bands(device):
    _check_guards(device)
    _check_guards(device, window=5, **_options("sinks", 4, device), **_options("key_starts", 4, device, (0, 20)))


def test_runs_repeat_and_inputs_stay(device):
    args = _inputs(device, 4, S=2, lengths=(3, 37), garbage=False)
    before = [x.clone() for x in args]
    for splits in (1, 3, None):
        one, two = (decode_attention(*args[:4], page_table=args[4], splits=splits, backend="triton") for _ in range(2))
        assert torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(args, before))


def test_shares_of_their_own_choice(device, monkeypatch):
    """The shares of a sequence are cut from the keys it has, so the room in the cache only limits how many there are."""
    from fastlm.kernels import decode_attention as kernels

    assert kernels._choose_splits(256, 32, 132) == 1  # two programs to each of 132 SMs: nothing to gain
    assert kernels._choose_splits(8, 1000, 132) == 30  # 240 programs for 264 places
    assert kernels._choose_splits(8, 4, 132) == 4
    assert kernels._choose_splits(300, 32, 132) == 4  # 1200 programs in five rounds; 300 would leave half idle
    args = _inputs(device, 4, T=600, lengths=(600, 599, 13), D=16, DV=16)
    _check(device, args, {})  # two shares of 256 keys at least, one of them empty in the short row


@each_backend
@pytest.mark.parametrize("page", [0, 4])
def test_strides(page, backend, device):
    q, k, v, lengths, table = _inputs(device, page, S=3)
    want = decode_attention(q, k, v, lengths, page_table=table, backend="reference")
    q = q.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)  # heads before tokens
    wide = torch.full((*v.shape[:-1], 2 * v.shape[-1]), float("nan"), device=device)
    wide[..., ::2] = v
    lengths = lengths.repeat_interleave(2)[::2]
    table = None if table is None else table.repeat_interleave(2, 1)[:, ::2].long()
    got = decode_attention(q, k, wide[..., ::2], lengths.int(), page_table=table, backend=backend)
    torch.testing.assert_close(got, want)
    one = decode_attention(q[:1].expand(2, -1, -1, -1), k[-1:].expand(2, -1, -1, -1), v[-1:].expand(2, -1, -1, -1),
                           torch.tensor([3, 2], device=device), backend=backend) if page == 0 else None  # fmt: skip
    if one is not None:
        again = decode_attention(q[:1], k[-1:], v[-1:], torch.tensor([3], device=device), backend="reference")
        torch.testing.assert_close(one[:1], again)


def test_offsets_past_2_31(device):
    """A page far away in memory: only its address is large."""
    q, k, v, lengths, table = _inputs(device, 4, D=16, DV=16, T=8, lengths=(8,), dtype=torch.float16, garbage=False)
    try:
        buffer = torch.empty(2**31 + (1 << 20), dtype=torch.float16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    want = decode_attention(q, k, v, lengths, page_table=table, backend="triton")
    stride = 2**31 // (k.shape[0] - 1) + 16
    far = buffer.as_strided(k.shape, (stride, *k.stride()[1:]))
    for caches in ((far.copy_(k), v), (k, far.copy_(v))):
        caches = [far if x is far else x for x in caches]
        far.copy_(k if caches[0] is far else v)
        assert torch.equal(decode_attention(q, *caches, lengths, page_table=table, backend="triton"), want)


@each_backend
def test_nothing_to_see(backend, device):
    for sizes in (
        {"lengths": (0, 0)},
        {"lengths": (), "T": 5},
        {"lengths": (0, 0), "T": 0},
        {"S": 0},
        {"page": 4, "lengths": (0,)},
    ):
        q, k, v, lengths, table = _inputs(device, **sizes)
        o = decode_attention(q, k, v, lengths, page_table=table, backend=backend)
        assert o.shape == (*q.shape[:3], 12) and not o.any()
    no_pages = torch.empty(0, 4, 2, 20, device=device), torch.empty(0, 4, 2, 12, device=device)
    q, lengths = torch.randn(2, 1, 4, 20, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    table = torch.zeros(2, 0, dtype=torch.int32, device=device)
    assert not decode_attention(q, *no_pages, lengths, page_table=table, backend=backend).any()


def test_values_that_nobody_checked_are_clamped(device, monkeypatch):
    """As on a GPU: lengths past the cache, pages that do not exist."""
    _hide_values(monkeypatch)
    for page in (0, 4, 16):
        q, k, v, _, table = _inputs(device, page, lengths=(32, 32, 32), T=32, garbage=False)
        wild = torch.tensor([1 << 40, -3, 32], device=device)
        if table is not None:
            table[2, 0], table[2, 1] = -1, 1 << 30
        want = decode_attention(q, k, v, wild.clamp(0, 32), page_table=None if table is None else table.clamp(0, k.shape[0] - 1),
                                backend="reference")  # fmt: skip
        for backend in BACKENDS:
            torch.testing.assert_close(decode_attention(q, k, v, wild, page_table=table, backend=backend), want)


@pytest.mark.parametrize("page, S", [(0, 1), (4, 1), (4, 3), (5, 2)])
def test_token_by_token_it_is_attention_over_the_whole(page, S, device):
    """Prompts of unequal lengths, then S tokens at a time through append_kv_ with rotary, on the kernels throughout."""
    B, T, H, H_kv, D = 2, 12, 4, 2, 16
    q, k, v = (torch.randn(B, T, heads, D, device=device) for heads in (H, H_kv, H_kv))
    angles = torch.arange(40, device=device)[:, None] * 10.0 ** -torch.linspace(0, 2, D // 2, device=device)
    tables = angles.cos(), angles.sin()
    _, k_cache, v_cache, _, table = _inputs(device, page, D=D, DV=D, T=20, lengths=(0,) * B, garbage=False)
    k_cache.fill_(float("nan")), v_cache.fill_(float("nan"))
    # Row 1 begins with three tokens, row 0 with none: what is compared with is each row's own sequence.
    lengths = torch.tensor([0, 3], device=device)
    first = k[1:, :3], v[1:, :3]
    one = None if table is None else table[1:]
    caches = (k_cache, v_cache) if one is not None else (k_cache[1:], v_cache[1:])
    append_kv_(*caches, *first, lengths[:1], page_table=one, cos=tables[0], sin=tables[1], backend="triton")
    got = torch.full((B, T, H, D), float("nan"), device=device)
    for step in range(0, 9, S):
        places = lengths[:, None] + torch.arange(S, device=device)
        rows = torch.arange(B, device=device)[:, None]
        new_q, new_k, new_v = (x[rows, places] for x in (q, k, v))
        append_kv_(
            k_cache, v_cache, new_k, new_v, lengths, page_table=table, cos=tables[0], sin=tables[1], backend="triton"
        )
        lengths = lengths + S
        turned, _ = ops.rotary(new_q, new_q, *tables, positions=places, backend="triton")
        got[rows, places] = decode_attention(turned, k_cache, v_cache, lengths, page_table=table, backend="triton")
        assert step + S <= 9 or S == 2
        if step + 2 * S > 9:
            break
    whole_q, whole_k = ops.rotary(q, k, *tables, backend="reference")
    want = ops.attention(whole_q, whole_k, v, causal=True, backend="reference")
    for b, n in enumerate(lengths.tolist()):
        start = (0, 3)[b]
        assert n - start >= 8
        torch.testing.assert_close(got[b, start:n], want[b, start:n])


def test_dispatcher(device):
    for page, splits in ((0, 1), (4, 2)):
        q, k, v, lengths, table = _inputs(device, page, S=2, garbage=False)
        starts, sinks = torch.zeros_like(lengths), torch.randn(4, device=device)
        args = (
            q,
            k,
            v,
            lengths,
            table,
            starts,
            sinks.abs(),
            torch.randn(4, 5, device=device),
            sinks,
            7,
            0.3,
            2.0,
            splits,
        )
        torch.library.opcheck(OP.forward, (*args, "triton"))
        torch.library.opcheck(OP.forward, (q, k, v, lengths, table, *[None] * 4, -1, 0.3, 0.0, splits, "triton"))


@pytest.mark.parametrize("page, backend", [(0, "triton"), (4, "triton"), (4, "torch")])
def test_compile(page, backend, device):
    torch._dynamo.reset()
    fn = lambda q, k, v, n, table: decode_attention(q, k, v, n, page_table=table, window=9, backend=backend)  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ({"T": 37}, {"T": 20, "lengths": (7, 20)}):
        args = _inputs(device, page, S=2, garbage=False, **sizes)
        torch.testing.assert_close(compiled(*args), fn(*args))


@each_backend
def test_autocast_follows_the_cache(backend, device):
    q, k, v, lengths, _ = _inputs(device, dtype=torch.bfloat16)
    want = decode_attention(q, k, v, lengths, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = decode_attention(q.float(), k, v, lengths, backend=backend)
        assert decode_attention(q, k.float(), v.float(), lengths, backend=backend).dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """No wait for the GPU, and a captured step follows lengths that change."""
    args = _inputs("cuda", 16, T=600, lengths=(600, 599, 13), garbage=False, dtype=torch.bfloat16)
    call = lambda: decode_attention(*args[:4], page_table=args[4], backend="triton")  # noqa: E731
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for change in (0, -5):
        args[3].add_(change)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, call())


BUGS = {
    "no scale": ("scores = scores * (scale * LOG2E)", "scores = scores * LOG2E"),
    "sum not shrunk": ("total = total * shrink + tl.sum(probs, 1)", "total = total + tl.sum(probs, 1)"),
    "mask forgotten": ("visible(rule, place, query[:, None], key[None, :])", "key[None, :] < hi + query[:, None]"),
    "another head's keys": ("k_base = k_ptr + h_kv.to(tl.int64) * stride_kh", "k_base = k_ptr + 0 * h_kv.to(tl.int64)"),
    "another row's pages": ("table_row = table_ptr + b64 * stride_table", "table_row = table_ptr + 0 * b64"),
    "pages a tile late": ("        page = next_page\n", ""),
    "slot": ("((start + n).to(tl.uint32) % PAGE).to(tl.int64) * stride_slot", "0 * n"),
    "query": ("query = row // GROUP", "query = row // GROUP * 0"),
    "garbage loaded": ("live = (key >= place.start) & (key < hi)", "live = key >= 0"),
    "a share forgotten": ("lo += tl.program_id(1) * share", "lo += (tl.program_id(1) + 1) * share"),
    "shares overlap": ("hi = tl.minimum(hi, lo + share)", "hi = tl.minimum(hi, lo + share + BLOCK_N)"),
    "shares not weighed": ("acc = acc * shrink + tl.sum(o * weights[:, None], 0)", "acc = acc + tl.sum(o, 0)"),
    "sum of shares": ("total = total * shrink + tl.sum(totals * weights, 0)", "total = total + tl.sum(totals, 0)"),
    "tail unwritten": ("    live = row < S * GROUP\n    query", "    live = row < S * GROUP - 1\n    query"),
    "sink forgotten": ("total = total * shrink + tl.exp2(sink - new_top)", "total = total * shrink"),
    "edge tiles skipped": ("gap_at, gap, 0)\n        next_start", "gap_at, gap + BLOCK_N, 0)\n        next_start"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(bug, device):
    with planted_bug("decode_attention", *BUGS[bug]), pytest.raises(AssertionError):
        _check_guards(device, **_options("sinks", 4, device), **_options("key_starts", 4, device, (0, 20)))
        _check_guards(device, window=5)
        _check_guards(device)


def test_write_outside_a_tensor_is_seen(device):
    # Only under guard bands: without them this bug corrupts the process.
    bug = planted_bug(
        "decode_attention", "mask=mask & (total > 0.0)[:, None])", "mask=(dv < DV + 4)[None, :] & live[:, None])"
    )
    with bug, pytest.raises(AssertionError, match="wrote outside|not close|unwritten"):
        _check_guards(device)


# In a process of its own: Triton must not be interpreting. Nothing runs; launches are turned into compiles.
SCRIPT = """
import json, re, sys, torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from benchmarks import aot
from fastlm.kernels.decode_attention import decode_attention

aot._keep_ptxas_log()
plain_run, compiled = JITFunction.run, {}

def run(self, *args, grid, warmup, **kwargs):
    kernel = plain_run(self, *args, grid=grid, warmup=True, **kwargs)
    compiled.setdefault(self.fn.__name__, {})[kernel.hash] = kernel
    return kernel

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def launch(B, T, page, S=1, left=-1, heavy=False):
    cache = meta(*((B * T // page, page) if page else (B, T)), 2, 128)
    table = meta(B, T // page, dtype=torch.int32) if page else None
    slopes = meta(8, dtype=torch.float32) if heavy else None
    distances = meta(8, 257) if heavy else None
    decode_attention(meta(B, S, 8, 128), cache, cache, meta(B, dtype=torch.int64), table, None, slopes, distances, None, left,
                     0.1, 0.0, 0)

JITFunction.run = run
driver.set_active(aot._Driver(90))
for B in [*range(1, 40), 528]:  # the last one fills 132 SMs without a cut
    for T in (1000, 1008, 65536):
        launch(B, T, 8)
counts = {name: len(kernels) for name, kernels in compiled.items()}
loops, ahead = 0, 0
for arch in (80, 90):
    driver.set_active(aot._Driver(arch))
    for page in (0, 1, 64):
        for options in ({}, {"left": 2048}, {"heavy": True}):
            compiled.clear()
            launch(8, 65536, page, **options)
            for kernel in compiled["_decode_attention_kernel"].values():
                lines = kernel.asm["ttgir"].splitlines()
                for i, line in enumerate(lines):
                    if "scf.for" in line:
                        depth = len(line) - len(line.lstrip())
                        end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith(" " * depth + "}"))
                        body = "\\n".join(lines[i:end])
                        loops += 1
                        ahead += body.count("async_copy_global_to_local") == 2 and "tt.load %k" not in body
print(json.dumps([counts, loops, ahead]))
"""


def test_compiled_code():
    """Batches and lengths of all sizes share their code, and every loop loads its keys and values ahead."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    counts, loops, ahead = json.loads(done.stdout.splitlines()[-1])
    assert counts == {"_decode_attention_kernel": 2, "_combine_kernel": 1}  # in shares and in one piece
    assert loops == ahead == 2 * 3 * 3 * 2


def test_explain_and_errors():
    q, k, v, lengths, table = _inputs("cpu", 4, lengths=(37, 18), garbage=False)
    args = {"q": q, "k_cache": k, "v_cache": v, "lengths": lengths, "page_table": table}
    assert ops.explain(decode_attention, **args).backend == "torch"
    found = ops.explain(decode_attention, **args, sinks=torch.randn(4))
    assert found.backend == "reference" and "sinks" in found.reasons["torch"]
    for error, message, change in [
        (ValueError, r"q must be floating point \[B, S, H, Dh\], got torch.float32 \[1, 4, 20\]", {"q": q[0]}),
        (ValueError, "q has 17 new tokens, at most 16; for more use ops.attention", {"q": q.expand(2, 17, 4, 20)}),
        (ValueError, r"k_cache must have q's width 19, at least 1, got", {"q": q[..., :19]}),
        (ValueError, "q's 3 heads must be a multiple of k_cache's 2", {"q": q[:, :, :3]}),
        (TypeError, "q must have the cache's dtype torch.float32, got torch.bfloat16; cast it", {"q": q.bfloat16()}),
        (ValueError, r"v_cache must be \[23, 4, 2, Dv\] like k_cache", {"v_cache": v[:, :3]}),
        (ValueError, "k_cache must have 2 rows .* a paged cache needs page_table", {"page_table": None}),
        (ValueError, r"page_table must be \[2, max_pages\]", {"page_table": table[0]}),
        (ValueError, "page_table must name pages 0..22 where a row has tokens, got 23 at", {"page_table": table * 0 + 23}),
        (ValueError, r"lengths must lie in 0..40, the places of a row, got \[37, 41\]", {"lengths": torch.tensor([37, 41])}),
        (TypeError, "lengths must be int32 or int64, got torch.bool", {"lengths": lengths > 0}),
        (ValueError, r"lengths must be \[2\], one for each row, got \[1\]", {"lengths": lengths[:1]}),
        (ValueError, r"key_starts must lie in 0..40, .* got \[0, -1\]", {"key_starts": torch.tensor([0, -1])}),
        (ValueError, r"key_starts must be \[2\]", {"key_starts": torch.tensor(3)}),
        (ValueError, "window must be the number of keys seen before .* got -2", {"window": -2}),
        (ValueError, r"window must be .* got \(1, 2, 3\)", {"window": (1, 2, 3)}),
        (ValueError, r"window must be .* got 'all'", {"window": "all"}),
        (ValueError, "softcap must be > 0 or None, got 0", {"softcap": 0.0}),
        (ValueError, "splits must lie in 1..65535, or be None to choose, got 0", {"splits": 0}),
        (ValueError, r"sinks must be \[4\], one for each query head, got \[2\]", {"sinks": torch.randn(2)}),
        (TypeError, "alibi_slopes must be floating point, got torch.int64", {"alibi_slopes": torch.arange(4)}),
        (ValueError, r"relative_bias must be a RelativeBias or a tensor \[4, 2 R \+ 1\], .* got \[4, 8\]",
         {"relative_bias": torch.randn(4, 8)}),
        (ValueError, "sinks must be on q's device cpu, got meta", {"sinks": torch.randn(4, device="meta")}),
        (ValueError, "it has no gradient, and q requires one; use ops.attention, or torch.no_grad",
         {"q": q.clone().requires_grad_()}),
        (ValueError, "backend 'torch' cannot serve this call: torch's attention has no softcap",
         {"softcap": 1.0, "backend": "torch"}),
    ]:  # fmt: skip
        with pytest.raises(error, match="decode_attention: " + message):
            decode_attention(**{**args, **change})
    with torch.no_grad():
        decode_attention(**{**args, "q": q.clone().requires_grad_()})
    wide = torch.randn(1, 1, 1, 264)
    with pytest.raises(ValueError, match="its heads are at most 256 wide, got 264"):
        decode_attention(wide, wide, wide, torch.ones(1, dtype=torch.int64), backend="triton")
