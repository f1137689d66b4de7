import math

import pytest
import torch

from fastlm import ops
from fastlm.ops._tensor import host_values
from fastlm.ops.append_kv import OP, append_kv_
from fastlm.testing import bands_intact, guarded, planted_bug, poison_empty

BACKENDS = ("reference", "torch", "triton")
PAGES = (0, 1, 3, 4, 16)  # tokens of a page; 0 is a contiguous cache
each_backend = pytest.mark.parametrize("backend", BACKENDS)
LENGTHS = (0, 5, 12, 5)


def _tables(positions, half, device="cpu"):
    angles = torch.arange(positions, device=device)[:, None] * 10.0 ** -torch.linspace(0, 2, half, device=device)
    return angles.cos(), angles.sin()


def _cache(page, B, T, H_kv, D, DV, dtype, device):
    """k_cache, v_cache and page_table of a cache with room for T tokens a row, in pages in any order."""
    if page == 0:
        rows, places, table = B, T, None
    else:
        count = math.ceil(T / page)
        rows, places = B * count + 3, page
        table = torch.randperm(rows)[: B * count].view(B, count).int().to(device)
    shapes = (rows, places, H_kv, D), (rows, places, H_kv, DV)
    return *(torch.randn(shape, dtype=torch.float64).to(dtype).to(device) for shape in shapes), table


def _new(B, S, H_kv, D, DV, dtype, device):
    return tuple(torch.randn(B, S, H_kv, w, dtype=torch.float64).to(dtype).to(device) for w in (D, DV))


def _by_loop(k_cache, v_cache, k, v, lengths, table):
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    for b, length in enumerate(lengths.tolist()):
        for s in range(k.shape[1]):
            at = (b, length + s)
            if table is not None:
                at = (int(table[b, at[1] // k_cache.shape[1]]), at[1] % k_cache.shape[1])
            k_cache[at], v_cache[at] = k[b, s].to(k_cache.dtype), v[b, s].to(v_cache.dtype)
    return k_cache, v_cache


def _check(
    backend, device, page=0, lengths=LENGTHS, S=3, D=12, DV=10, dtype=torch.float32, cache_dtype=None, rotary=None
):
    """Against a loop over the tokens, rotated by ops.rotary; everything else in the cache must stay as it is, bit by bit."""
    B, H_kv = len(lengths), 2
    lengths = torch.tensor(lengths, device=device)
    k_cache, v_cache, table = _cache(page, B, 16, H_kv, D, DV, cache_dtype or dtype, device)
    k, v = _new(B, S, H_kv, D, DV, dtype, device)
    turned, options = k, {}
    if rotary is not None:
        half, interleaved = rotary
        cos, sin = _tables(20, half, device)
        options = {"cos": cos, "sin": sin, "interleaved": interleaved}
        positions = lengths[:, None] + torch.arange(S, device=device)
        turned, _ = ops.rotary(k, k, cos, sin, interleaved=interleaved, positions=positions, backend=backend)
    want = _by_loop(k_cache, v_cache, turned, v, lengths, table)
    before = [t.clone() for t in (k, v, lengths)]
    assert append_kv_(k_cache, v_cache, k, v, lengths, page_table=table, backend=backend, **options) is None
    assert all(torch.equal(a, b) for a, b in zip((k, v, lengths), before)), "an input was changed"
    assert torch.equal(v_cache, want[1])
    if rotary is None:
        assert torch.equal(k_cache, want[0])
        return
    changed = want[0] != _by_loop(want[0], v_cache, torch.zeros_like(k), v, lengths, table)[0]
    assert torch.equal(k_cache[~changed], want[0][~changed]), "what is not new was changed"
    torch.testing.assert_close(k_cache, want[0])


@each_backend
@pytest.mark.parametrize("page", PAGES)
def test_against_a_loop(page, backend, device):
    _check(backend, device, page)
    _check(backend, device, page, lengths=(4, 4, 4), S=1)  # equal lengths, one token: what decoding does
    _check(backend, device, page, lengths=(13, 0), S=3)  # up to the last place


@each_backend
@pytest.mark.parametrize("page", (0, 4))
@pytest.mark.parametrize(
    "rotary", [(6, False), (6, True), (4, False), (3, True)], ids=str
)  # whole heads, parts of them
def test_rotary_is_that_of_rotary(rotary, page, backend, device):
    _check(backend, device, page, rotary=rotary)
    _check(backend, device, page, rotary=rotary, lengths=(7, 7), S=2)


@each_backend
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
    ids=str,
)
def test_dtypes(dtypes, backend, device):
    for rotary in (None, (6, False)):
        _check(backend, device, 4, dtype=dtypes[0], cache_dtype=dtypes[1], rotary=rotary)


@pytest.mark.parametrize("shape", [(70, 16), (128, 256), (1, 1)], ids=str)
def test_widths(shape, device):
    D, DV = shape
    _check("triton", device, 3, D=D, DV=DV)
    if D > 1:
        _check("triton", device, 3, D=D, DV=DV, rotary=(D // 2, False))
        _check("triton", device, 3, D=D, DV=DV, rotary=(D // 4, True))


@each_backend
@pytest.mark.parametrize("page", (0, 4))
def test_strides(page, backend, device):
    """Heads before tokens, views of one fused product, tables and lengths with gaps: read and written where they lie."""
    lengths = torch.tensor(LENGTHS, device=device).repeat_interleave(2)[::2]
    k_cache, v_cache, table = _cache(page, 4, 16, 2, 12, 10, torch.float32, device)
    k_cache = k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(*v_cache.shape[:-1], 20, device=device)
    wide[..., ::2] = v_cache
    v_cache = wide[..., ::2]
    if table is not None:
        table = table.repeat_interleave(2, 1)[:, ::2]
    k, v = torch.randn(4, 3, 2, 22, device=device).split((12, 10), -1)
    want = _by_loop(k_cache, v_cache, k, v, lengths, table)
    append_kv_(k_cache, v_cache, k.flip(-1).flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2), v, lengths,
               page_table=table, backend=backend)  # fmt: skip
    assert torch.equal(k_cache, want[0]) and torch.equal(v_cache, want[1])
    assert not wide[..., 1::2].any()


def _check_guards(device):
    for page in (0, 3):
        k_cache, v_cache, table = _cache(page, 4, 16, 2, 12, 10, torch.float32, device)
        k, v = _new(4, 3, 2, 12, 10, torch.float32, device)
        given = (k_cache, v_cache, k, v, torch.tensor(LENGTHS, device=device), *_tables(15, 5, device))
        pairs = [guarded(t) for t in given]
        table_pair = (None, None) if table is None else guarded(table)
        inner = [t for t, _ in pairs]
        with poison_empty():
            append_kv_(*inner[:5], page_table=table_pair[0], cos=inner[5], sin=inner[6], backend="triton")
        append_kv_(*given[:5], page_table=table, cos=given[5], sin=given[6], backend="reference")
        assert all(bands_intact(buffer) for _, buffer in [*pairs, table_pair] if buffer is not None), (
            "wrote outside a tensor"
        )
        for got, want in zip(inner, given):
            torch.testing.assert_close(got, want)


def test_guard_bands(device):
    _check_guards(device)


@pytest.mark.parametrize("page", (0, 4))
def test_tokens_without_a_place_are_left_out(page, device, monkeypatch):
    """As on a GPU, where nobody has looked at lengths and page_table; in the kernel and in the reference alike."""
    monkeypatch.setattr("fastlm.ops.append_kv.host_values", lambda x: None)
    k_cache, v_cache, table = _cache(page, 5, 16, 2, 12, 10, torch.float32, device)
    k, v = _new(5, 3, 2, 12, 10, torch.float32, device)
    lengths = torch.tensor([14, -2, 16, 1 << 40, 3], device=device)
    if table is not None:
        table[4, 0], table[0, 3] = -1, 1 << 20
    want = [k_cache.clone(), v_cache.clone()]
    for b, s, place in ((0, 0, 14), (0, 1, 15), (1, 2, 0), (4, 0, 3), (4, 1, 4), (4, 2, 5)):
        page_number = b if page == 0 else int(table[b, place // page])
        if 0 <= page_number < k_cache.shape[0]:
            at = (page_number, place if page == 0 else place % page)
            want[0][at], want[1][at] = k[b, s], v[b, s]
    for backend in BACKENDS:
        caches = k_cache.clone(), v_cache.clone()
        append_kv_(*caches, k, v, lengths, page_table=table, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(caches, want)), backend
        nowhere = torch.full_like(lengths, -9)
        append_kv_(*caches, k, v, nowhere, page_table=table, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(caches, want)), backend
        # Positions past the tables are clamped, as by rotary.
        cos, sin = _tables(4, 6, device)
        append_kv_(*caches, k, v, lengths.clamp(0, 9), page_table=None if page == 0 else table.clamp(0, 9), cos=cos, sin=sin,
                   backend=backend)  # fmt: skip
        assert torch.isfinite(caches[0]).all()


@each_backend
def test_nothing_to_do(backend, device):
    k_cache, v_cache, _ = _cache(0, 2, 4, 2, 6, 6, torch.float32, device)
    before = k_cache.clone()
    k, v = _new(2, 0, 2, 6, 6, torch.float32, device)
    append_kv_(k_cache, v_cache, k, v, torch.tensor([4, 1], device=device), backend=backend)
    empty = torch.empty(0, 4, 2, 6, device=device)
    append_kv_(empty, empty, *_new(0, 3, 2, 6, 6, torch.float32, device), torch.zeros(0, dtype=torch.int64, device=device),
               backend=backend)  # fmt: skip
    assert torch.equal(k_cache, before)


@each_backend
def test_autograd_sees_the_change(backend, device):
    k_cache, v_cache, _ = _cache(0, 2, 8, 2, 6, 6, torch.float32, device)
    k, v = _new(2, 1, 2, 6, 6, torch.float32, device)
    lengths = torch.tensor([1, 2], device=device)
    x = torch.ones(6, device=device, requires_grad=True)
    loss = (k_cache * x).sum()  # saves k_cache
    append_kv_(k_cache, v_cache, k, v, lengths, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():  # on tensors that have no version, and on some that do
        append_kv_(k_cache.clone(), v_cache.clone(), k, v, lengths, backend=backend)
        append_kv_(k_cache, v_cache, k, v, lengths, backend=backend)
    with torch.no_grad():
        append_kv_(k_cache, v_cache, k.requires_grad_(), v, lengths, backend=backend)
    with pytest.raises(
        ValueError, match=r"append_kv_: it has no gradient, and k requires one; call it under torch.no_grad"
    ):
        append_kv_(k_cache, v_cache, k, v, lengths, backend=backend)


def test_dispatcher(device):
    for page in (0, 4):
        k_cache, v_cache, table = _cache(page, 4, 16, 2, 12, 10, torch.float32, device)
        k, v = _new(4, 3, 2, 12, 10, torch.float32, device)
        lengths = torch.tensor(LENGTHS, device=device)
        torch.library.opcheck(
            OP.forward, (k_cache, v_cache, k, v, lengths, table, *_tables(20, 6, device), False, "triton")
        )


@each_backend
@pytest.mark.parametrize("page", (0, 4))
def test_compile(page, backend, device):
    torch._dynamo.reset()
    cos, sin = _tables(20, 6, device)

    def step(k_cache, v_cache, k, v, lengths, table):
        append_kv_(k_cache, v_cache, k, v, lengths, page_table=table, cos=cos, sin=sin, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for S in (1, 3):
        k_cache, v_cache, table = _cache(page, 4, 16, 2, 12, 10, torch.float32, device)
        k, v = _new(4, S, 2, 12, 10, torch.float32, device)
        lengths = torch.tensor(LENGTHS, device=device)
        want = k_cache.clone(), v_cache.clone()
        compiled(k_cache, v_cache, k, v, lengths, table)
        step(*want, k, v, lengths, table)
        torch.testing.assert_close((k_cache, v_cache), want)


@pytest.mark.parametrize(
    "page, old, new",
    [
        (0, "tl.load(lengths_ptr + b,", "tl.load(lengths_ptr + 0 * b,"),  # the first row's length for all
        (0, "live = live & (place >= 0) & (place < places)", "live = live & (place < places - 1)"),  # the last place
        (0, "live = row < rows", "live = row < rows - 1"),  # the tail not written
        (0, "b * cos + a * sin, mask", "b * cos - a * sin, mask"),
        (0, "position = tl.minimum(place,", "position = tl.minimum(s,"),  # rotated as if every row began at 0
        (0, "live, 2 * HALF, D,", "live, 2 * HALF, D - 1,"),  # the part past the rotary width
        (0, "+ slot * stride_vcs + h", "+ slot * stride_vcs + 0 * h"),  # one head for all
        (3, "b * stride_table + place // PAGE", "place // PAGE"),  # the first row's pages
        (3, "slot = place % PAGE", "slot = place % PAGE * 0"),
        (3, "x.to(INPUT).to(tl.float32)", "(x + 0.01)"),
    ],
    ids=["length", "last", "tail", "sign", "position", "rest", "head", "table", "slot", "value"],
)
def test_planted_bug_is_seen(page, old, new, device):
    with planted_bug("append_kv_", old, new), pytest.raises(AssertionError):
        _check("triton", device, page, rotary=(5, False))
        _check("triton", device, page, lengths=(13, 0), rotary=(5, False))


def test_write_outside_a_tensor_is_seen(device):
    # Only under guard bands: without them this bug corrupts the process.
    bug = planted_bug(
        "append_kv_", "live if BLOCK == WIDTH - START else live & (col < WIDTH)", "live & (col < WIDTH + 8)"
    )
    with bug, pytest.raises(AssertionError, match="wrote outside|not close"):
        _check_guards(device)


def test_explain_and_errors():
    k_cache, v_cache, table = _cache(4, 2, 16, 2, 12, 10, torch.float32, "cpu")
    k, v = _new(2, 3, 2, 12, 10, torch.float32, "cpu")
    lengths, (cos, sin) = torch.tensor([0, 5]), _tables(20, 6)
    args = {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": k,
        "v": v,
        "lengths": lengths,
        "page_table": table,
        "cos": cos,
        "sin": sin,
    }
    assert ops.explain(append_kv_, **args).backend == "torch"
    assert host_values(lengths) == [0, 5]
    before = k_cache.clone()
    for error, message, change in [
        (ValueError, r"k must be \[2, 3, 2, 12\] to fit k_cache, got \[2, 3, 2, 11\]", {"k": k[..., :11]}),
        (ValueError, r"v must be \[2, 3, 2, 10\] to fit v_cache, got \[2, 2, 2, 10\]", {"v": v[:, :2]}),
        (ValueError, r"k must be floating point \[B, S, H_kv, Dh\], got torch.float32 \[3, 2, 12\]", {"k": k[0]}),
        (TypeError, "v must have k's dtype torch.float32, got torch.bfloat16", {"v": v.bfloat16()}),
        (TypeError, "v_cache must have k_cache's dtype", {"v_cache": v_cache.half()}),
        (TypeError, "k_cache must be floating point, got torch.int64", {"k_cache": k_cache.long()}),
        (ValueError, r"v_cache must be \[11, 4, 2, Dv\] like k_cache", {"v_cache": v_cache[:5]}),
        (ValueError, r"k_cache must be \[pages, page_size, H_kv, width\], got", {"k_cache": k_cache[0]}),
        (ValueError, "k_cache must have 2 rows as the new tokens have, got 11; a paged cache needs", {"page_table": None}),
        (ValueError, r"page_table must be \[2, max_pages\], a line for each row, got \[1, 4\]", {"page_table": table[:1]}),
        (TypeError, "page_table must be int32 or int64, got torch.float32", {"page_table": table.float()}),
        (ValueError, r"page_table must name pages 0..10 where a row has tokens, got 11 at \[1, 1\]",
         {"page_table": torch.tensor([[0, 99, 99, 99], [99, 11, 2, 99]])}),
        (TypeError, "lengths must be a tensor on cpu, got list", {"lengths": [0, 5]}),
        (TypeError, "lengths must be int32 or int64, got torch.float32", {"lengths": lengths.float()}),
        (ValueError, r"lengths must be \[2\], one for each row, got \[3\]", {"lengths": torch.tensor([0, 1, 2])}),
        (ValueError, r"lengths must lie in 0..13, so that 3 tokens fit into 16 places, got \[0, 14\]",
         {"lengths": torch.tensor([0, 14])}),
        (ValueError, "lengths must lie in", {"lengths": torch.tensor([0, -1])}),
        (ValueError, "cos and sin come together", {"sin": None}),
        (TypeError, "cos must be float32", {"cos": cos.half()}),
        (ValueError, r"cos must be \[max_positions, R/2\] with 0 < R <= Dh = 12", {"cos": cos[:, :0]}),
        (ValueError, "sin must be .* alike in cos and sin", {"sin": sin[:4]}),
        (ValueError, "cos and sin have 7 positions, and the last token stands at 7", {"cos": cos[:7], "sin": sin[:7]}),
        (ValueError, "v must be on v_cache's device cpu, got meta", {"v": v.to("meta")}),
        (ValueError, "backend must be 'auto' or one of", {"backend": "fast"}),
    ]:  # fmt: skip
        with pytest.raises(error, match="append_kv_: " + message):
            append_kv_(**{**args, **change})
    with pytest.raises(ValueError, match="got float64"):
        append_kv_(k_cache.double(), v_cache.double(), k, v, lengths, page_table=table, backend="triton")
    assert torch.equal(k_cache, before)
