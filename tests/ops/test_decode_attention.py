from itertools import combinations

import pytest
import torch

from fastlm import ops
from fastlm.ops.append_kv import append_kv_
from fastlm.ops.attention_options import RelativeBias
from fastlm.ops.decode_attention import decode_attention
from tests.ops import decode_cases as cases

BACKENDS = ("reference", "torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("page", [0, 1, 4, 6, 16, 64])
@pytest.mark.parametrize("S", [1, 3])
def test_pages_and_splits(page, S, device):
    """Against plain code on every kind of page (one key, some of them to a tile, a tile, several tiles), cut in 1 to 3 shares."""
    cases.check(cases.inputs(device, page, S=S), {}, *((2, None) if S == 1 else (1, 3)))


def test_it_is_attention(device):
    q, k, v, lengths, _ = cases.inputs(device, S=3)
    want = ops.attention(q, k, v, causal=True, key_lengths=lengths, return_lse=True, backend="reference")
    for backend in ("reference", "triton"):
        got = decode_attention(q, k, v, lengths, return_lse=True, backend=backend)
        torch.testing.assert_close(got, want)
    assert not got[0][0].any() and (got[1][0] == float("-inf")).all()  # a row of no tokens
    assert not got[0][1, :2].any() and got[0][1, 2].all()  # one token, three queries


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H, H_kv", [(4, 1), (4, 4), (6, 2)])
def test_dtypes_and_groups(H, H_kv, dtype, device):
    for page, S, splits in ((0, 1, 2), (4, 2, 1)):
        cases.check(cases.inputs(device, page, S=S, H=H, H_kv=H_kv, lengths=(1, 37), dtype=dtype), {}, splits)


@pytest.mark.parametrize("D, DV", [(8, 40), (72, 16), (128, 64), (256, 8), (1, 1)])
def test_widths(D, DV, device):
    for page in (0, 4):
        cases.check(cases.inputs(device, page, D=D, DV=DV, lengths=(20, 7)), {}, 2)


def test_more_rows_than_a_tile(device):
    args = cases.inputs(device, 4, S=16, H=10, H_kv=2, lengths=(37, 9))  # 80 rows to a key head: two tiles
    cases.check(args, {"window": 3}, 2)


FEATURES = ("paged", "queries", "groups", "window", "alibi", "softcap", "sinks", "key_starts", "relative_bias")


@pytest.mark.parametrize("pair", list(combinations(FEATURES, 2)), ids="-".join)
def test_every_pair_of_features(pair, device):
    H_kv = 1 if "groups" in pair else 2
    args = cases.inputs(device, 6 if "paged" in pair else 0, S=3 if "queries" in pair else 1, H=2, H_kv=H_kv)
    options = {}
    for name in pair:
        if name not in ("paged", "queries", "groups"):
            options |= cases.options(name, 2, device)
    cases.check(args, options, 1 + FEATURES.index(pair[0]) % 2)


@pytest.mark.parametrize("page", [0, 4, 16])
def test_all_features_at_once(page, device):
    options = {}
    for name in FEATURES[3:]:
        options |= cases.options(name, 4, device)
    cases.check(cases.inputs(device, page, S=3), options, 1, 3)
    buckets = RelativeBias(torch.randn(8, 4, device=device), bidirectional=False, max_distance=20)
    args = cases.inputs(device, page)
    got, want = (
        decode_attention(*args[:4], page_table=args[4], relative_bias=buckets, backend=b)
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(got, want)


@each_backend
@pytest.mark.parametrize("page", [0, 4])
def test_the_sides_of_a_window(page, backend, device):
    args = cases.inputs(device, page, S=2, lengths=(1, 37))
    call = lambda window: decode_attention(*args[:4], page_table=args[4], window=window, backend=backend)  # noqa: E731
    assert torch.equal(call(7), call((7, 0))) and torch.equal(call(7), call((7, -1)))
    assert torch.equal(call(None), call(-1)) and torch.equal(call(None), call((None, None)))
    torch.testing.assert_close(call(1000), call(None))
    assert (call(7)[1] - call(None)[1]).abs().max() > 0.01


@each_backend
@pytest.mark.parametrize("page, S", [(1, 1), (4, 3), (16, 1)])
def test_pages_before_the_window_may_be_gone(S, page, backend, device, monkeypatch):
    """Their numbers may be anything, and so may what lies before the window in the page where it begins."""
    q, k, v, lengths, table = cases.inputs(device, page, S=S)
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
        cases.hide_values(monkeypatch)
        got = decode_attention(q, k, v, lengths, page_table=gone, window=5, backend=backend)
        torch.testing.assert_close(got, want)
    q, k, v, lengths, _ = (x.nan_to_num() if x.is_floating_point() else x for x in (q, k, v, lengths, table))
    got = decode_attention(q, k, v, lengths, page_table=gone_starts, key_starts=starts, backend=backend)
    torch.testing.assert_close(got[2], want_starts[2])


def test_runs_repeat_and_inputs_stay(device):
    args = cases.inputs(device, 4, S=2, lengths=(3, 37), garbage=False)
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
    args = cases.inputs(device, 4, T=600, lengths=(600, 599, 13), D=16, DV=16)
    cases.check(args, {})  # two shares of 256 keys at least, one of them empty in the short row


@each_backend
@pytest.mark.parametrize("page", [0, 4])
def test_strides(page, backend, device):
    q, k, v, lengths, table = cases.inputs(device, page, S=3)
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
    q, k, v, lengths, table = cases.inputs(
        device, 4, D=16, DV=16, T=8, lengths=(8,), dtype=torch.float16, garbage=False
    )
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
        q, k, v, lengths, table = cases.inputs(device, **sizes)
        o = decode_attention(q, k, v, lengths, page_table=table, backend=backend)
        assert o.shape == (*q.shape[:3], 12) and not o.any()
    no_pages = torch.empty(0, 4, 2, 20, device=device), torch.empty(0, 4, 2, 12, device=device)
    q, lengths = torch.randn(2, 1, 4, 20, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    table = torch.zeros(2, 0, dtype=torch.int32, device=device)
    assert not decode_attention(q, *no_pages, lengths, page_table=table, backend=backend).any()


def test_values_that_nobody_checked_are_clamped(device, monkeypatch):
    """As on a GPU: lengths past the cache, pages that do not exist."""
    cases.hide_values(monkeypatch)
    for page in (0, 4, 16):
        q, k, v, _, table = cases.inputs(device, page, lengths=(32, 32, 32), T=32, garbage=False)
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
    _, k_cache, v_cache, _, table = cases.inputs(device, page, D=D, DV=D, T=20, lengths=(0,) * B, garbage=False)
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


@pytest.mark.gpu
@pytest.mark.parametrize("page", [0, 1, 16, 64, 100, 256])
@pytest.mark.parametrize("S", [1, 4])
def test_tiles_of_a_gpu(page, S):
    """Many tiles of the size that a GPU takes, at every kind of page."""
    sizes = {"T": 1500, "lengths": (1500, 0, 700, 3), "H": 8, "D": 128, "DV": 128, "dtype": torch.bfloat16}
    args = cases.inputs("cuda", page, S=S, **sizes)
    cases.check(args, {}, None, 1, 3)
    cases.check(args, {"window": 300, **cases.options("sinks", 8, "cuda")}, None, 1)
