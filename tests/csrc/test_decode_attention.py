"""csrc/decode_attention.cu on the host body of the device layer, against the op's reference."""

import ctypes
import re
from ctypes import c_int32
from itertools import combinations
from math import prod

import pytest
import torch

from fastlm.ops import _cuda
from fastlm.ops.decode_attention import OP, decode_attention
from fastlm.testing import assert_accurate
from tests.csrc.host_library import (
    DTYPES,
    ROOT,
    HostError,
    In,
    Out,
    library,
    needs_compiler,
    needs_nvcc,
    planted,
    same_in_all_orders,
)
from tests.csrc.nvcc import compiled, instructions
from tests.ops import decode_cases as cases
from tests.ops.test_decode_attention_contract import _check_guards

pytestmark = needs_compiler
SOURCE = "csrc/decode_attention.cu"
HEADERS = tuple(f"decode_attention_{part}.h" for part in ("plain", "mma", "merge", "share"))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LENGTHS = (0, 1, 18, 150)  # shares of 64 keys or 128: nothing, a key, a tile and a tail, three shares and a tail


@pytest.fixture(scope="module")
def lib():
    return library(SOURCE)


def assert_close(found, want, dtype):
    """16 bits: as close as weights rounded to them let it come."""
    tolerance = {"rtol": 2e-2, "atol": 4e-3} if dtype != FP32 else {}
    torch.testing.assert_close(found, want, **tolerance)


def scratch(*shape, dtype=FP32):
    """Room that the kernel need not fill: it is not dense."""
    return Out(torch.empty(2 * prod(shape), dtype=dtype)[::2])


def launch(lib, args, options=None, splits=1, order="forward", **changed):
    """(o, lse) by one launch. options: those of the op. `changed` replaces members of the launcher's struct."""
    q, k, v, lengths, table = args
    (B, S, H, D), (_, page, H_kv, DV) = q.shape, v.shape
    o, lse = torch.full((B, S, H, DV), float("nan"), dtype=q.dtype), torch.full((B, H, S), float("nan"))
    options = options or {}
    starts, slopes, distances, sinks = (
        options.get(n) for n in ("key_starts", "alibi_slopes", "relative_bias", "sinks")
    )

    def is_wide(x):
        return c_int32(x is not None and x.dtype == torch.int64)

    def dtype(x):
        return c_int32(0 if x is None else DTYPES[x.dtype])

    numbers = {
        "B": B, "S": S, "H": H, "H_kv": H_kv, "key_width": D, "value_width": DV, "page_size": page,
        "max_pages": 1 if table is None else table.shape[1], "reach": 0 if distances is None else distances.shape[1] // 2,
        "left": options.get("window", -1), "splits": splits, "least": 1,
    }  # fmt: skip
    lib.run("fastlm_decode_attention_fwd", {
        "q": In(q), "k": In(k), "v": In(v), "lengths": In(lengths), "page_table": In(table), "key_starts": In(starts),
        "alibi_slopes": In(slopes), "distances": In(distances), "sinks": In(sinks), "o": Out(o), "lse": Out(lse),
        "partial": scratch(splits, B * S * H, DV), "stats": scratch(splits, B * S * H, 2),
        "counters": scratch(B * H * S, dtype=torch.int32),
        "q_strides": q.stride()[:3], "k_strides": k.stride(), "v_strides": v.stride(),
        "table_stride": 0 if table is None else table.stride(0), "pages": k.shape[0],
        **{name: c_int32(n) for name, n in numbers.items()},
        "dtype": dtype(q), "distances_dtype": dtype(distances), "sinks_dtype": dtype(sinks),
        "wide_lengths": is_wide(lengths), "wide_table": is_wide(table), "wide_starts": is_wide(starts),
        "scale": D**-0.5, "softcap": options.get("softcap", 0.0), **changed,
    }, order=order)  # fmt: skip
    return o, lse


def check(lib, args, options=None, *splits, run=same_in_all_orders):
    """Output and log-sum-exp under the accuracy rule, the same bits in all orders of threads and blocks."""
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in args]
    changed = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
               for n, x in (options or {}).items()}  # fmt: skip
    exact = decode_attention(*wide[:4], page_table=args[4], return_lse=True, backend="reference", **changed)
    user = cases.plain(*args, **(options or {}))
    for n in splits or (1,):
        found = run(lambda order, n=n: launch(lib, args, options, n, order))
        for what, got, e, p in zip(("output", "lse"), found, exact, user):
            assert_accurate(got, e, p, f"{what}, {n} splits")


# Each kernel: products on mma with 8 rows of 64, 128 and 256 (some narrower) and 16 rows; a key to a lane by 4 and by 1.
KERNELS = {
    "mma_64": {"dtype": BF16, "D": 64, "DV": 64}, "mma_narrow": {"dtype": FP16, "D": 40, "DV": 24},
    "mma_128": {"dtype": BF16, "D": 128, "DV": 128}, "mma_80": {"dtype": FP16, "D": 80, "DV": 96},
    "mma_256": {"dtype": BF16, "D": 256, "DV": 256}, "mma_rows": {"dtype": FP16, "D": 128, "DV": 64, "S": 5},
    "fp32": {"dtype": FP32, "D": 20, "DV": 36}, "fp32_odd": {"dtype": FP32, "D": 21, "DV": 7, "S": 3},
    "bf16_odd": {"dtype": BF16, "D": 64, "DV": 33}, "fp32_wide": {"dtype": FP32, "D": 256, "DV": 256},
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_pages_and_splits(lib, kernel):
    """A contiguous cache and pages of one key, some to a tile, a tile, several tiles; in one share and in more."""
    for page, splits in ((0, 1), (0, 3), (1, 1), (6, 2), (16, 3), (64, 1)):
        check(lib, cases.inputs("cpu", page, T=150, lengths=LENGTHS, **kernel), {}, splits)


@pytest.mark.parametrize("S, H, H_kv", [(1, 8, 1), (4, 4, 2), (2, 7, 7), (3, 10, 2), (16, 4, 2)])
@pytest.mark.parametrize("dtype", (FP16, FP32))
def test_rows_of_a_key_head(lib, S, H, H_kv, dtype):
    """Eight rows, sixteen, fewer, and several tiles of them; some queries stand before the first key."""
    args = cases.inputs("cpu", 6, S=S, H=H, H_kv=H_kv, D=16, DV=16, T=70, lengths=(0, 3, 70), dtype=dtype)
    check(lib, args, {"window": 9}, 1, 2)


@pytest.mark.parametrize("kernel", ("mma_128", "mma_narrow", "fp32"))
def test_a_paged_cache_gives_the_bits_of_a_contiguous_one(lib, kernel):
    sizes = {**KERNELS[kernel], "T": 96, "lengths": (96, 77), "garbage": False}
    q, k, v, lengths, _ = cases.inputs("cpu", **sizes)
    want = launch(lib, (q, k, v, lengths, None), splits=2)
    for page in (1, 6, 16, 48):
        table = torch.randperm(2 * 96 // page, dtype=torch.int32).view(2, -1)
        pools = [torch.empty(2 * 96 // page, page, *x.shape[2:], dtype=x.dtype) for x in (k, v)]
        for pool, x in zip(pools, (k, v)):
            pool[table] = x.unflatten(1, (-1, page))
        found = launch(lib, (q, *pools, lengths, table), splits=2)
        assert all(torch.equal(a, b) for a, b in zip(found, want))


@pytest.mark.parametrize("dtype", (BF16, FP32))
def test_nothing_is_read_that_nobody_sees(lib, dtype):
    """Not before the window or the first key, not past the last: the cache is cut off there, and page numbers are wild."""
    q, k, v, _, _ = cases.inputs("cpu", S=2, D=64, DV=64, T=80, lengths=(80,), dtype=dtype, garbage=False)
    seen = slice(80 - 2 - 30, 80)
    k[:, : seen.start], v[:, : seen.start] = float("nan"), float("nan")
    lengths, starts = torch.tensor([80], dtype=torch.int32), torch.tensor([49])
    want = decode_attention(q, k[:, 49:], v[:, 49:], lengths - 49, backend="reference", return_lse=True)
    for options in ({"window": 29}, {"key_starts": starts}):
        found = launch(lib, (q, k, v, lengths, None), options, 2)
        assert all(x.isfinite().all() for x in found)
    assert_close(found, want, dtype)
    page = 8
    pages = [x[0].unflatten(0, (-1, page)).flip(0).contiguous() for x in (k, v)]
    table = torch.arange(10).flip(0)[None].repeat(1, 1)
    table[:, :6], lengths = -(1 << 40), lengths.long() - 9  # and the last one holds no key of this row
    table[:, 9] = 1 << 40
    pages = [x[1:].contiguous() for x in pages]  # nor is it there
    found = launch(lib, (q, *pages, lengths, table - (table < 10).long() * (table >= 0)), {"key_starts": starts}, 2)
    want = decode_attention(q, k[:, 49:71], v[:, 49:71], lengths - 49, backend="reference", return_lse=True)
    assert_close(found, want, dtype)


@pytest.mark.parametrize("dtype", (BF16, FP32))
@pytest.mark.parametrize("page", (0, 4, 16))
def test_wild_lengths_and_pages_are_clamped(lib, page, dtype):
    """As on a GPU, where nobody has looked at them."""
    sizes = {"D": 64, "DV": 64, "T": 32, "lengths": (32, 32, 32), "dtype": dtype, "garbage": False}
    q, k, v, _, table = cases.inputs("cpu", page, **sizes)
    lengths, starts = torch.tensor([1 << 40, -3, 32]), torch.tensor([-5, 0, 1 << 33])
    if page:
        table[2, 0], table[0, 1] = -1, 1 << 30
    want = decode_attention(q, k, v, lengths.clamp(0, 32), page_table=None if table is None else table.clamp(0, len(k) - 1),
                            key_starts=starts.clamp(0, 32), backend="reference", return_lse=True)  # fmt: skip
    found = launch(lib, (q, k, v, lengths, table), {"key_starts": starts}, 3)
    assert_close(found, want, dtype)


@pytest.mark.parametrize("dtype", (BF16, FP32))
def test_strides(lib, dtype):
    q, k, v, lengths, table = cases.inputs("cpu", 6, S=3, D=32, DV=32, dtype=dtype)
    want = launch(lib, (q, k, v, lengths, table))
    far = torch.full((3, *k.shape[:2], 3, 32), float("nan"), dtype=dtype)[1, :, :, 1:]
    heads_first = v.transpose(1, 2).contiguous().transpose(1, 2)
    other_q = q.transpose(0, 2).contiguous().transpose(0, 2)
    wide_table = torch.cat((table, table), 1)[:, : table.shape[1]]
    found = launch(lib, (other_q, far.copy_(k), heads_first, lengths.int(), wide_table))
    assert all(torch.equal(a, b) for a, b in zip(found, want))
    by_elements = torch.full((*k.shape[:3], 64), float("nan"), dtype=dtype)[..., ::2]
    found = launch(lib, (q, by_elements.copy_(k), v, lengths, table))
    assert_close(found, want, dtype)


def test_wrong_arguments_are_refused(lib):
    args = cases.inputs("cpu", D=16, DV=16)
    for changed in ({"key_width": 257}, {"page_size": 0x7FFF0001}, {"H": 3}, {"dtype": 3}, {"least": 0}):
        with pytest.raises(HostError, match="returned 1: no report"):
            launch(lib, args, **{name: c_int32(n) for name, n in changed.items()})
    with pytest.raises(HostError, match="returned 1: no report"):
        launch(lib, args, splits=0)
    with pytest.raises(HostError, match="out of bounds: read of .* of buffer 'k'"):
        launch(lib, args, page_size=c_int32(60), lengths=In(torch.tensor([0, 1, 18, 60])))


def test_how_many_shares(lib):
    choose = ctypes.CDLL(lib._dll._name).fastlm_decode_attention_splits
    choose.argtypes = [ctypes.c_int64] * 3
    assert choose(256, 32, 264) == 1  # nothing to gain
    assert choose(8, 1000, 264) == 30  # 240 blocks for 264 places
    assert choose(8, 4, 264) == choose(8, 4, 264) == 4
    assert choose(300, 32, 264) == 4  # 1200 blocks in five rounds; 300 would leave half idle


# --- the op, through its binding --------------------------------------------------------------------------------------

on_the_host = pytest.mark.usefixtures("cuda_on_the_host")
FEATURES = ("paged", "queries", "window", "alibi", "softcap", "sinks", "key_starts", "relative_bias")


@on_the_host
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_features(dtype):
    for pair in combinations(FEATURES, 2):
        args = cases.inputs(
            "cpu", 6 if "paged" in pair else 0, S=3 if "queries" in pair else 1, D=16, DV=24, dtype=dtype
        )
        options = {}
        for name in pair:
            if name not in ("paged", "queries"):
                options |= cases.options(name, 4, "cpu")
        cases.check(args, options, 1 + FEATURES.index(pair[0]) % 2, backend="cuda")


@on_the_host
def test_all_features_and_a_hidden_distance():
    options = {}
    for name in FEATURES[2:]:
        options |= cases.options(name, 4, "cpu")
    options |= {"sinks": options["sinks"].half(), "relative_bias": options["relative_bias"].bfloat16()}
    for dtype in DTYPES:
        args = cases.inputs("cpu", 4, S=3, D=16, DV=24, dtype=dtype)
        cases.check(args, options, 1, 3, None, backend="cuda")
    options["relative_bias"][1, 3] = torch.finfo(torch.bfloat16).min
    got, want = (
        decode_attention(*args[:4], page_table=args[4], return_lse=True, backend=b, **options)
        for b in ("cuda", "reference")
    )
    assert_close(got, want, dtype)


@on_the_host
def test_nothing_to_see():
    for sizes in (
        {"lengths": (0, 0)},
        {"lengths": (), "T": 5},
        {"lengths": (0, 0), "T": 0},
        {"S": 0},
        {"page": 4, "lengths": (0,)},
    ):
        q, k, v, lengths, table = cases.inputs("cpu", **sizes)
        o, lse = decode_attention(q, k, v, lengths, page_table=table, return_lse=True, backend="cuda")
        assert o.shape == (*q.shape[:3], 12) and not o.any() and (lse == float("-inf")).all()


@on_the_host
def test_contract():
    """Nothing else is touched, repeated bits, autocast follows the cache, the dispatcher's rules, compiled calls."""
    _check_guards("cpu", "cuda")
    _check_guards(
        "cpu", "cuda", window=5, **cases.options("key_starts", 4, "cpu", (0, 20)), **cases.options("sinks", 4, "cpu")
    )
    q, k, v, lengths, table = args = cases.inputs("cpu", 4, S=2, D=16, DV=16, dtype=BF16, garbage=False)
    before = [x.clone() for x in args]
    one, two = (decode_attention(*args[:4], page_table=table, splits=3, backend="cuda") for _ in range(2))
    assert torch.equal(one, two) and all(torch.equal(a, b) for a, b in zip(args, before))
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(decode_attention(q.float(), k, v, lengths, page_table=table, splits=3, backend="cuda"), one)
    sinks = torch.randn(4)
    slopes, distances, starts = sinks.abs(), torch.randn(4, 5), torch.zeros_like(lengths)
    for rest in ((starts, slopes, distances, sinks, 7, 0.3, 2.0, 2), (None, None, None, None, -1, 0.3, 0.0, 0)):
        torch.library.opcheck(OP.forward, (q, k, v, lengths, table, *rest, "cuda"))

    def call(q, k, v, n, table):
        return decode_attention(q, k, v, n, page_table=table, window=9, backend="cuda")

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ({"T": 37}, {"T": 20, "lengths": (7, 20)}):
        args = cases.inputs("cpu", 4, S=2, garbage=False, **sizes)
        torch.testing.assert_close(compiled(*args), call(*args))


@on_the_host
def test_offsets_past_2_31():
    """A page far away in memory: only its address is large."""
    q, k, v, lengths, table = cases.inputs("cpu", 4, D=16, DV=16, T=8, lengths=(8,), dtype=FP16, garbage=False)
    try:
        buffer = torch.empty(2**31 + (1 << 20), dtype=FP16)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    want = decode_attention(q, k, v, lengths, page_table=table, backend="cuda")
    far = buffer.as_strided(k.shape, (2**31 // (k.shape[0] - 1) // 8 * 8 + 16, *k.stride()[1:]))
    for change in (lambda: (far.copy_(k), v), lambda: (k, far.copy_(v))):
        assert torch.equal(decode_attention(q, *change(), lengths, page_table=table, backend="cuda"), want)


@on_the_host
def test_what_it_does_not_take():
    wide = torch.randn(1, 1, 1, 264)
    with pytest.raises(ValueError, match="its heads are at most 256 wide, got 264"):
        decode_attention(wide, wide, wide, torch.ones(1, dtype=torch.int64), backend="cuda")
    q, k, v, lengths, table = cases.inputs("cpu", 4, garbage=False)
    rest, call = (None, None, None, None, -1, 0.3, 0.0, 1), torch.ops.fastlm_host.decode_attention_fwd
    for args, words in (
        ((q, k.bfloat16(), v, lengths, table), "must have one dtype"),
        ((q, k, v, lengths[:2], table), "lengths has the wrong shape"),
        ((q, k, v, lengths, table.float()), "page_table must be int32 or int64"),
        ((q, k[..., :7], v, lengths, table), "do not fit together"),
        ((q, k, v, lengths, None), "must have q's rows"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call(*args, *rest)


@pytest.mark.gpu
@pytest.mark.parametrize("page", (0, 1, 16, 100))
def test_on_a_gpu(page):
    if reason := _cuda.unavailable():
        pytest.skip(reason)
    for S, D, dtype in ((1, 128, BF16), (4, 64, FP16), (2, 256, BF16), (3, 80, FP32)):
        sizes = {"T": 1500, "lengths": (1500, 0, 700, 3), "H": 8, "D": D, "DV": D, "dtype": dtype}
        args = cases.inputs("cuda", page, S=S, **sizes)
        cases.check(args, {"window": 1200, **cases.options("sinks", 8, "cuda")}, None, 1, 3, 40, backend="cuda")

    def call():
        return decode_attention(*args[:4], page_table=args[4], splits=3, backend="cuda")

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for change in (0, -5):
        args[3].add_(change).clamp_(min=0)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, call())


# --- mistakes ---------------------------------------------------------------------------------------------------------

BUGS = {
    "strides swapped": (
        "return page * strides[0] + slot * strides[1];",
        "return page * strides[1] + slot * strides[0];",
    ),
    "pages a tile late": ("    place = next;\n", ""),
    "wrong shuffle mask": ("shuffle(page, i, kAllLanes, 32, at)", "shuffle(page, i, 0xffff, 32, at)"),
    "queries are not waited for": ("  block_barrier();\n  for (;", "  for (;"),
    "warps are not waited for": ("  block_barrier();\n  for (int item", "  for (int item"),
    "ticket too early": ("block_x(), share.live)", "block_x(), share.live - 1)"),
    "tail unmasked": ("return key >= share.lo && key < share.end;", "return key >= share.lo;"),
    "window forgotten": ("key >= row.first && key <= row.position", "key <= row.position"),
    "halves swapped": ("g % 2 ? kHighHalves : kLowHalves", "g % 2 ? kLowHalves : kHighHalves"),
    "a share forgotten": ("first + block_y() * each * step : hi", "first + (block_y() + 1) * each * step : hi"),
    "shares not weighed": ("fast_exp2(one[0] - base_of(sum.top));", "1.0f;"),
    "sum not shrunk": (
        "sum.total = sum.total * shrink + (s[n][j] + s[n][2 + j]);",
        "sum.total += s[n][j] + s[n][2 + j];",
    ),
    "sink forgotten": ("total = total * shrink + fast_exp2(sink - higher);", "total = total * shrink;"),
}


@pytest.fixture(scope="module")
def one_kernel(tmp_path_factory):
    """A file with the kernel for bf16 of up to 128 alone: less to compile."""
    text = (ROOT / SOURCE).read_text(encoding="utf-8").replace("case FASTLM_BFLOAT16:", "case 1:")
    text = re.sub(r" +(case (64|256)|case FASTLM_FLOAT16|if \(plan.groups == 2\)|if \(!plan.on_mma\)).*\n", "", text)
    text = re.sub(r"int start_plain\(.*?\n}\n", "", text, flags=re.DOTALL)
    path = tmp_path_factory.mktemp("one") / "decode_attention.cu"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def with_bug(one_kernel, tmp_path_factory):
    return planted(one_kernel, BUGS, tmp_path_factory.mktemp("planted"), HEADERS)


@needs_nvcc
def test_keys_and_values_move_in_16_bytes(one_kernel, tmp_path):
    """16 of each tile: before the loop, and in it the next tile's keys after the products with keys, values after those."""
    _, cubin = compiled(one_kernel, "sm_90a", tmp_path)
    ((_, code),) = instructions(cubin).items()
    reads = [i for i, line in enumerate(code) if "LDG" in line and ".CONSTANT" in line]
    assert len(reads) == 32 and all("LDG.E.128" in code[i] for i in reads)
    products = [i for i, line in enumerate(code) if "HMMA" in line]
    assert len(products) == 16 and not any(line.split()[0] in ("LDL", "STL") for line in code)
    order = "".join(kind for _, kind in sorted([(i, "r") for i in reads] + [(i, "p") for i in products]))
    assert order == 16 * "r" + 8 * "p" + 8 * "r" + 8 * "p" + 8 * "r", order


def in_one_order(run):
    return run("backward")


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_seen(name, with_bug):
    lib, sizes = with_bug[name], {"D": 72, "DV": 72, "T": 150, "lengths": (18, 150), "dtype": BF16}
    with pytest.raises((AssertionError, HostError)):
        for page in (0, 6):
            options = {"window": 100, **cases.options("sinks", 4, "cpu")}
            check(lib, cases.inputs("cpu", page, **sizes), options, 1, 3, run=in_one_order)
