"""csrc/sample.cu on the host body of the device layer, against the reference of the op, which sorts."""

from ctypes import c_int32

import pytest
import torch

from fastlm import ops
from fastlm.ops.sample import _reference
from fastlm.testing.guards import bands_intact, guarded, poison_empty
from tests.csrc.host_library import DTYPES, HostError, In, Out, library, needs_compiler, planted, same_in_all_orders

pytestmark = needs_compiler
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor([1234567890123456789, 7])
INF = float("inf")
NUMBERS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture(scope="module")
def lib():
    return library("csrc/sample.cu")


def split(options):
    """Options, numbers or tensors [B], as the kernel and the reference take them: (of each row, of all)."""
    each = {f"{n}s": v if isinstance(v := options.get(n), torch.Tensor) else None for n in NUMBERS}
    return each, {n: v if each[f"{n}s"] is not None else options.get(n, v) for n, v in NUMBERS.items()}


def launch(lib, x, order="forward", with_logprobs=True, seed=SEED, **options):
    """tokens and log-probabilities [B]."""
    each, numbers = split(options)
    tokens = torch.empty(len(x), dtype=torch.int64)
    logprobs = torch.empty(len(x)) if with_logprobs else None
    lib.run("fastlm_sample_draw", {
        "logits": In(x), "rows": len(x), "columns": x.shape[1], "row_stride": x.stride(0),
        **{n: In(t) for n, t in each.items()}, "top_k": numbers["top_k"], "temperature": numbers["temperature"],
        "top_p": numbers["top_p"], "min_p": numbers["min_p"], "seed": In(seed), "tokens": Out(tokens),
        "logprobs": Out(logprobs), "dtype": c_int32(DTYPES[x.dtype]),
    }, order=order)  # fmt: skip
    return (tokens, logprobs) if with_logprobs else (tokens,)


def by_reference(x, seed=SEED, **options):
    each, numbers = split(options)
    return _reference(x, *each.values(), seed, *numbers.values(), True)


def assert_same(found, x, **options):
    tokens, logprobs = by_reference(x, **options)
    assert torch.equal(found[0], tokens), (found[0], tokens)
    torch.testing.assert_close(found[1], logprobs, rtol=2e-6, atol=2e-6, equal_nan=True)


OPTIONS = {
    "plain": {}, "hot": {"temperature": 3.0}, "greedy": {"temperature": 0.0}, "top_k": {"top_k": 5}, "one": {"top_k": 1},
    "top_p": {"top_p": 0.7}, "min_p": {"min_p": 0.1}, "cold": {"temperature": 1e-38},
    "endless": {"temperature": INF, "top_p": 0.5},
    "all": {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "each": {
        "temperature": torch.tensor([0.0, 0.7, 1.0, -1.0, 1.5]), "top_k": torch.tensor([0, 3, 1000000, 2, 20]),
        "top_p": torch.tensor([0.5, 1.0, 0.8, 0.1, 0.0]), "min_p": torch.tensor([0.0, 0.1, 0.0, 1.0, 0.3]),
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_token_is_that_of_the_reference(lib, dtype, options):
    for columns in (75, 300):
        x = (3 * torch.randn(5, columns)).to(dtype)
        assert_same(same_in_all_orders(lambda order, x=x: launch(lib, x, order, **options)), x, **options)


# Rows wider than what shared memory holds. k-th and share found among candidates; so many, or so flat, that they are not.
WIDE = {
    "top_p": (3.0, {"top_p": 0.8}), "both": (3.0, {"top_k": 64, "top_p": 0.9, "min_p": 0.01}), "plain": (3.0, {}),
    "many": (3.0, {"top_k": 900}), "flat": (0.1, {"top_p": 0.9}), "flat_many": (0.1, {"top_k": 1500, "top_p": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("spread, options", WIDE.values(), ids=WIDE)
def test_wide_rows(lib, spread, options):
    for dtype in (FP32, BF16):
        x = (spread * torch.randn(1, 2101)).to(dtype)
        assert_same(launch(lib, x, **options), x, **options)


def test_wide_rows_in_other_orders(lib):
    x = 3 * torch.randn(2, 2101)
    assert_same(same_in_all_orders(lambda order: launch(lib, x, order, top_k=40, top_p=0.9)), x, top_k=40, top_p=0.9)


# Four and two blocks to a row: what a cluster collects, what it draws together, and what its first block does alone.
CLUSTERS = {
    "plain": (3.0, {}), "top_k": (3.0, {"top_k": 40}), "top_p": (3.0, {"top_p": 0.8}), "min_p": (3.0, {"min_p": 0.05}),
    "flat": (0.1, {"top_p": 0.9}), "greedy": (3.0, {"temperature": 0.0}),
}  # fmt: skip


@pytest.mark.parametrize("spread, options", CLUSTERS.values(), ids=CLUSTERS)
def test_clusters(lib, spread, options):
    x = spread * torch.randn(2, 16387)
    found = launch(lib, x, **options)
    assert_same(found, x, **options)
    with lib.without_clusters():
        assert torch.equal(launch(lib, x, with_logprobs=False, **options)[0], found[0])


def test_the_large_logits_of_a_cluster_in_one_block(lib):
    """5% of the mass are more tokens of that block than it offers."""
    i = torch.arange(16388)
    x = (0.01 * (i // 2048 % 4) + 0.01 * i / len(i)).expand(3, -1)  # four blocks of 512 threads with four numbers each
    for options in ({"top_p": 0.05}, {"top_k": 300}):
        assert_same(launch(lib, x, **options), x, **options)


def test_clusters_in_other_orders_and_with_nothing_to_draw(lib):
    x = (3 * torch.randn(2, 16392)).bfloat16()
    x[1, 16000] = float("nan")
    options = {"top_k": 20, "top_p": 0.9}
    assert_same(same_in_all_orders(lambda order: launch(lib, x, order, **options)), x, **options)


def test_a_vocabulary_of_128k(lib):
    x = (2.5 * torch.randn(1, 128003)).bfloat16()
    for options in ({}, {"top_k": 50, "top_p": 0.95}):
        assert_same(launch(lib, x, **options), x, **options)


@pytest.mark.parametrize("columns, value", ((40, 0.0), (40, -3.0), (2200, -3.0)))
def test_equal_logits_stay_together(lib, columns, value):
    """Two values: of the smaller, which top_k=3 and top_p=0.5 reach into, all stay; and more than shared memory holds."""
    x = torch.full((3, columns), value)
    x[:, 7] = value + 0.01
    for options in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.9}):
        assert_same(launch(lib, x, **options), x, **options)
    assert len(set(launch(lib, x, top_k=3)[0].tolist())) == 3
    (greedy, _) = launch(lib, torch.full((2, columns), -0.0).index_fill(1, torch.tensor([5]), 0.0), temperature=0.0)
    assert greedy.tolist() == [0, 0]


@pytest.mark.parametrize("columns", (24, 2100))
@pytest.mark.parametrize("options", ({}, {"top_k": 3, "top_p": 0.6}, {"temperature": 0.0}), ids=str)
def test_rows_with_infinities_and_nan(lib, columns, options):
    x = torch.randn(7, columns)
    x[0, 3] = float("nan")
    x[1] = -INF
    x[2, 5], x[2, 9] = INF, INF
    x[3, : columns // 2] = -INF
    x[4] = -INF
    x[4, columns - 1] = -5.0
    x[5, 2], x[5, 4] = -float("nan"), INF
    x[6] = torch.finfo(FP32).min
    x[6, 1] = 3e38
    tokens, logprobs = found = launch(lib, x, **options)
    assert_same(found, x, **options)
    assert tokens[[0, 1, 5]].tolist() == [-1] * 3 and logprobs[[0, 1, 5]].isnan().all()
    assert tokens[2] in (5, 9) and tokens[3] >= columns // 2 and tokens[[4, 6]].tolist() == [columns - 1, 1]


def test_rows_anywhere(lib):
    """At odd strides and addresses, with NaN between them, which is not read as an element: eight rows, of which each begins at
    another place of a vector."""
    for dtype in (FP32, BF16, FP16):
        for columns in (1, 7, 12, 77, 4501):
            wide = torch.full((8, columns + 14 | 1), float("nan"), dtype=dtype)
            x = wide[:, 5 : columns + 5].copy_(3 * torch.randn(8, columns))
            for options in (
                ({}, {"top_p": 0.9}) if columns < 99 else ({"top_k": 20, "top_p": 0.9}, {"temperature": 2.0})
            ):
                assert_same(launch(lib, x, **options), x, **options)


def test_the_offset_and_the_row_change_the_draw(lib):
    x = torch.zeros(4, 1000)
    draws = [
        launch(lib, x, seed=torch.tensor(seed))[0].tolist() for seed in ((1, 0), (1, 1), (2, 0), (1, 2**32), (-1, 5))
    ]
    assert len({t for d in draws[:3] for t in d}) == 12 and draws[3] == draws[0] and draws[4] != draws[0]


def test_wrong_arguments_are_refused(lib):
    x = torch.randn(2, 8)
    with pytest.raises(HostError, match="returned 1: no report"):
        launch(lib, x[:0])
    with pytest.raises(HostError, match="returned 1: no report"):
        launch(lib, x[:, :0])
    with pytest.raises(HostError, match="returned 1: no report"):
        launch(lib, x[:, :1].expand(2, 2**24))  # masses of so many could overflow


def options_of(name):
    return lambda lib: test_the_token_is_that_of_the_reference(lib, FP32, OPTIONS[name])


def wide(name):
    return lambda lib: test_wide_rows(lib, *WIDE[name])


def cluster(name):
    return lambda lib: test_clusters(lib, *CLUSTERS[name])


# mistake -> what is written wrongly, and the test that must see it
BUGS = {
    "no barrier before the candidates are read": ("total = row_reduce(total, Add(), kNothing);", "", options_of("top_k")),
    "candidates beyond what is held": (
        "if (slot < kHeld) their_keys[slot]", "their_keys[slot]", lambda lib: test_equal_logits_stay_together(lib, 2200, -3.0)),
    "an incomplete set is taken": (
        "if (few && collected <= kHeld) held", "if (few) held", lambda lib: test_equal_logits_stay_together(lib, 2200, -3.0)),
    "the share of the candidates, not of the row": ("(by_count ? left : total)", "(left)", wide("top_p")),
    "too little mass is taken": ("if (left < target) held = 0;", "", wide("flat")),
    "a block's own cut": (
        "static_cast<uint32_t>(row_reduce(static_cast<uint64_t>(reached), Max(), kNothing))", "reached",
        test_the_large_logits_of_a_cluster_in_one_block),
    "candidates kept to oneself": ("cluster_pointer(counter, 0)", "counter", cluster("top_k")),
    "a bit too far": ("above[c] += digit > c ? amount : 0", "above[c] += digit > c + 1 ? amount : 0", options_of("top_k")),
    "two zeros": ("float_bits(x + 0.0f)", "float_bits(x)", lambda lib: test_equal_logits_stay_together(lib, 40, 0.0)),
    "infinity less infinity": (
        "x == top ? 0.0f : (x - top)", "(x - top)", lambda lib: test_rows_with_infinities_and_nan(lib, 24, {})),
    "infinity times nothing": (
        "maximum(minimum(1.0f / temperature, kLargest), kSmallest)", "minimum(1.0f / temperature, kLargest)",
        options_of("endless")),
    "vectors that do not begin at 16 bytes": ("row.x + begin - row.shift)", "row.x + begin)", test_rows_anywhere),
    "a vector not moved to its place": ("shift & 2 * word ? w[i + 2]", "shift & 2 * word ? w[i + 1]", test_rows_anywhere),
    "the beginning of a row left out": ("begin >= row.shift &&", "", test_rows_anywhere),
    "words in another order": ("token & 2 ? other : half", "token & 2 ? half : other", options_of("top_p")),
    "noise left out too early": ("* kLog2e) * 1.001f) lead", "* kLog2e) * 0.000001f) lead", cluster("plain")),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_bug(tmp_path_factory):
    bugs = {name: (old, new) for name, (old, new, _) in BUGS.items()}
    return planted("csrc/sample.cu", bugs, tmp_path_factory.mktemp("planted"), ["sample_row.h", "sample_search.h"])


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_seen(name, with_bug):
    see = BUGS[name][2]
    with pytest.raises((AssertionError, HostError)):
        for _ in range(3):
            see(with_bug[name])


# --- through the op -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cuda_on_the_host")
class TestThroughTheOp:
    def test_values_strides_and_settings(self):
        values = torch.randn(5, 60)
        want = ops.sample(values, top_k=9, seed=3, return_logprobs=True, backend="reference")
        each = torch.tensor([9, 9, 9, 9, 9], dtype=torch.int32)
        for x in (
            values,
            values.T.contiguous().T,
            torch.stack([values, values], -1)[..., 0],
            values[:, None].expand(5, 2, 60)[:, 1],
        ):
            for top_k in (9, each, torch.tensor(9)):
                found = ops.sample(x, top_k=top_k, seed=3, return_logprobs=True, backend="cuda")
                assert torch.equal(found[0], want[0])
                torch.testing.assert_close(found[1], want[1])
        assert torch.equal(
            ops.sample(values[:1].expand(5, 60), temperature=0, backend="cuda"), values[:1].argmax(-1).expand(5)
        )

    def test_nothing_else_is_touched(self):
        x, buffer = guarded(torch.randn(3, 37))
        before = x.clone()
        with poison_empty():
            one, two = (ops.sample(x, top_p=0.9, seed=1, backend="cuda") for _ in range(2))
        assert torch.equal(one, two) and torch.equal(x, before) and bands_intact(buffer) and (one < 37).all()
        assert ops.sample(x[:0], backend="cuda").shape == (0,)

    @pytest.mark.parametrize(
        "options",
        (
            {"temperature": torch.full((6,), INF), "top_p": 0.5},
            {"temperature": 3.4e38, "top_p": 0.5},
            {"top_k": 2**70},
            {"seed": torch.tensor([3, 8, 1, 9])[::2]},
        ),
        ids=("infinite temperature", "largest temperature", "top_k beyond int64", "seed with a stride"),
    )
    def test_settings_at_the_edge(self, options):
        x = torch.randn(6, 37)
        x[0, ::2] = -INF
        one, two = (ops.sample(x, **{"seed": 3} | options, backend=b) for b in ("reference", "cuda"))
        assert torch.equal(one, two)

    def test_rows_that_are_too_wide(self):
        with pytest.raises(ValueError, match=r"fewer than 2\^24 logits, got \[2, 16777216\]"):
            ops.sample(torch.zeros(2, 1).expand(2, 2**24), backend="cuda")

    def test_compiled_and_checked(self):
        def call(x, top_p):
            return ops.sample(x, top_p=top_p, seed=5, return_logprobs=True, backend="cuda")

        for x in (torch.randn(4, 40), torch.randn(3, 9)):
            top_p = torch.full((len(x),), 0.8)
            for got, want in zip(
                torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")(x, top_p), call(x, top_p)
            ):
                torch.testing.assert_close(got, want)
        ours, theirs = (getattr(torch.ops, space).sample.default._schema for space in ("fastlm", "fastlm_host"))
        assert [(a.name, str(a.type)) for a in ours.arguments][:-1] == [(a.name, str(a.type)) for a in theirs.arguments]
        assert [str(r.type) for r in ours.returns] == [str(r.type) for r in theirs.returns]
        for x in (torch.randn(4, 40), torch.randn(4, 40, requires_grad=True)):
            args = (x, None, None, torch.full((4,), 0.5), None, SEED, 1.0, 0, 1.0, 0.0, True, "cuda")
            torch.library.opcheck(torch.ops.fastlm.sample.default, args)
        assert not call(x, torch.ones(4))[1].requires_grad

    def test_wrong_calls_are_refused_before_memory_is_touched(self):
        x, run = torch.randn(2, 8), torch.ops.fastlm_host.sample
        rest = (1.0, 0, 1.0, 0.0, True)
        for args, words in (
            ((x.double(), None, None, None, None, SEED, *rest), "logits must be float32, bfloat16 or float16"),
            ((x[0], None, None, None, None, SEED, *rest), r"logits must be \[B, V\]"),
            ((x, torch.ones(3), None, None, None, SEED, *rest), r"temperatures must be contiguous \[2\], float32"),
            ((x, None, torch.ones(2), None, None, SEED, *rest), r"top_ks must be contiguous \[2\], int64"),
            ((x, None, None, None, None, SEED[:1], *rest), r"seed must be an int64 tensor \[2\]"),
        ):
            with pytest.raises(RuntimeError, match=words):
                run(*args)
