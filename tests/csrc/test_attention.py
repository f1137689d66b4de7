"""csrc/attention.cu on the host body of the device layer, against the reference of the op, and as machine code."""

import inspect
import math
import re
from ctypes import c_int32

import pytest
import torch

from fastlm.ops import _cuda, attention, attention_cuda
from fastlm.ops.attention import OP
from fastlm.ops.attention_options import make_call
from fastlm.ops.attention_reference import reference
from fastlm.testing import assert_accurate
from tests.csrc.host_library import (
    ASYNC_ORDERS,
    DTYPES,
    HostError,
    In,
    Out,
    library,
    needs_compiler,
    needs_nvcc,
    planted,
    same_in_all_orders,
)  # fmt: skip
from tests.csrc.nvcc import compiled, instructions

SOURCE = "csrc/attention.cu"
BF16, FP16 = torch.bfloat16, torch.float16
# Each way that threads go with one of the four ways of asynchronous work.
SOME_ORDERS = [ASYNC_ORDERS[i] for i in (0, 7, 9, 10)]


@pytest.fixture(scope="module")
def lib():
    return library(SOURCE)


def diagonal_of(causal, S, T):
    """Query i sees keys up to i + this."""
    return {False: T, True: T - S, "top_left": 0}[causal]


def launch(lib, q, k, v, causal=False, scale=None, programs=3, order=ASYNC_ORDERS[0][0], buffers=None, **changed):
    """(o, lse); buffers: of what q, k and v are parts; `changed` replaces members of the launcher's struct."""
    B, S, H, width = q.shape
    T = k.shape[1]
    o = torch.full((B, S, H, width), float("nan"), dtype=q.dtype)
    lse = torch.full((B, H, S), float("nan"))
    strides = {f"{name}_strides": x.stride()[:3] for name, x in (("q", q), ("k", k), ("v", v))}
    lib.run("fastlm_attention_fwd", {
        "q": In(q), "k": In(k), "v": In(v), "o": Out(o), "lse": Out(lse), "batch": B, "queries": S, "keys": T, "heads": H,
        "kv_heads": k.shape[2], **strides, "diagonal": diagonal_of(causal, S, T), "width": c_int32(width),
        "dtype": c_int32(DTYPES[q.dtype]), "programs": c_int32(programs), "scale": width**-0.5 if scale is None else scale,
        **changed,
    }, order=order, buffers=buffers)  # fmt: skip
    return o, lse


def call_of(q, k, v, causal, scale):
    given = {"q": q, "k": k, "v": v, "causal": causal, "scale": scale, "dropout_p": 0.0, "check": False}
    return make_call(**dict.fromkeys(inspect.signature(make_call).parameters) | given)


def check(lib, q, k, v, causal=False, scale=None, programs=3, orders=SOME_ORDERS, buffers=None):
    found = same_in_all_orders(lambda order: launch(lib, q, k, v, causal, scale, programs, order, buffers), orders)
    exact = reference(*call_of(q.double(), k.double(), v.double(), causal, scale), True)
    plain = reference(*call_of(q, k, v, causal, scale), True)
    for name, a, e, p in zip(("o", "lse"), found, exact, plain):
        assert_accurate(a, e, p, name)
    return found


def inputs(B, S, T, H, heads, width, dtype=BF16):
    return tuple(torch.randn(B, n, h, width).to(dtype) for n, h in ((S, H), (T, heads), (T, heads)))


# B, S, T, H, H_kv, width, causal. Tiles are 192 x 128 (queries x keys), 128 x 128 and 128 x 80.
SHAPES = {
    "one query": (1, 1, 1, 1, 1, 64, False),
    "less than a tile": (1, 37, 53, 1, 1, 64, True),
    "four tiles of keys": (1, 201, 391, 2, 1, 64, False),
    "more keys than queries": (1, 201, 391, 2, 1, 64, True),
    "more queries than keys": (1, 421, 135, 1, 1, 64, True),
    "top left": (1, 130, 300, 1, 1, 64, "top_left"),
    "whole tiles": (1, 192, 256, 1, 1, 64, True),
    "groups and batch": (2, 100, 150, 4, 2, 64, True),
    "128 wide": (1, 131, 300, 2, 1, 128, False),
    "128 wide, causal": (2, 200, 290, 1, 1, 128, True),
    "256 wide": (1, 130, 170, 1, 1, 256, True),
}


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward(lib, shape):
    *sizes, causal = shape
    check(lib, *inputs(*sizes), causal)


@needs_compiler
@pytest.mark.parametrize("width", (64, 128))
def test_all_orders(lib, width):
    """Several tiles of queries and of keys to a block; every order of threads with every one of asynchronous work."""
    check(lib, *inputs(1, 250, 300, 2, 1, width, FP16), True, orders=ASYNC_ORDERS)


@needs_compiler
def test_one_block_takes_all_tiles(lib):
    check(lib, *inputs(1, 300, 200, 3, 3, 64, FP16), True, programs=1)


@needs_compiler
def test_parts_of_a_fused_product_and_swapped_dimensions(lib):
    qkv = torch.randn(2, 50, 3, 2, 64).bfloat16()
    check(lib, *qkv.unbind(2), True, buffers={"qkv": In(qkv)})
    q, k, v = (x.transpose(1, 2) for x in torch.randn(3, 2, 2, 50, 64).bfloat16())  # [B, H, S, D] in memory
    check(lib, q, k, v)


@needs_compiler
def test_queries_that_see_no_key(lib):
    q, k, v = inputs(1, 300, 60, 1, 1, 64)
    o, lse = check(lib, q, k, v, True)
    assert (o[:, :240] == 0).all() and (lse[..., :240] == float("-inf")).all() and lse[..., 240:].isfinite().all()


@needs_compiler
def test_large_scores_and_what_is_not_finite(lib):
    q, k, v = inputs(1, 40, 200, 1, 1, 64)
    check(lib, 30 * q, k, v, scale=0.5)
    q[0, 3, 0, 5], v[0, 7, 0, 9], k[0, 190, 0, 1] = float("nan"), float("inf"), float("nan")
    o, lse = launch(lib, q, k, v, True)  # key 190 is seen from query 30 on
    assert o[0, 3].isnan().all() and lse[0, 0, 3].isnan() and o[0, 30:].isnan().all()
    want = torch.ones(64, dtype=torch.bool)
    want[9] = False
    rest = [i for i in range(30) if i != 3]
    assert torch.equal(o[0, rest, 0].isfinite(), want.expand(len(rest), 64))


@needs_compiler
def test_wrong_arguments_are_refused(lib):
    q, k, v = inputs(1, 40, 40, 3, 2, 64)
    for wrong in (
        (q, k, v),
        (q[:, :0], k[:, :, :1], v[:, :, :1]),
        (q.float(), k[:, :, :1].float(), v[:, :, :1].float()),
    ):
        with pytest.raises(HostError, match="returned 1: no report"):
            launch(lib, *wrong)
    q, k, v = inputs(1, 40, 40, 1, 1, 96)
    with pytest.raises(HostError, match="returned 1: no report"):
        launch(lib, q, k, v)
    q, k, v = inputs(1, 40, 40, 1, 1, 64)
    for scale in (0.0, 2.0**-127, 2.0**127.5, math.inf, math.nan):
        with pytest.raises(HostError, match="returned 1: no report"):
            launch(lib, q, k, v, scale=scale)
    for many in ({"queries": 1 << 29}, {"keys": 1 << 29}):
        with pytest.raises(HostError, match="returned 1: no report"):
            launch(lib, q, k, v, **many)
    q, k, v = torch.randn(3, 1, 40, 1, 66)[..., :64].bfloat16().unbind(0)
    k = torch.randn(1, 40, 1, 66).bfloat16()[..., :64]
    with pytest.raises(
        HostError, match="stride 1 must be a multiple of 16 bytes|stride 2 must be a multiple of 16 bytes"
    ):
        launch(lib, q, k, v)


BUGS = {
    "a slot of keys freed early": (
        "wgmma_wait<1>(s);\n        release(b.k_empty, n + 1);", "release(b.k_empty, n + 1);\n        wgmma_wait<1>(s);"),
    "a wait missing": ("wgmma_wait<0>(o);\n        release(b.v_empty, n);", "release(b.v_empty, n);"),
    "too few bytes": ("A::kTile * 2);", "A::kTile * 2 - 128);"),
    "strides swapped": ("{strides[2], strides[1], strides[0]}", "{strides[1], strides[2], strides[0]}"),
    "a barrier missing": ("    block_barrier();\n", ""),
    "the wrong parity": ("n / kStages % 2 ^ 1);", "n / kStages % 2);"),
    "the wrong panel": ("Matrix<T, Major::mn, KEYS> v_matrix", "Matrix<T, Major::mn, KEYS - 8> v_matrix"),
    "no fence before the copy out": ("    fence_async_shared();\n", ""),
    "no barrier before the copy out": ("    fence_async_shared();\n    named_barrier(kStore + group, 128);\n",
        "    fence_async_shared();\n"),
    "no barrier before the queries go": ("    named_barrier(kStore + group, 128);\n#pragma unroll", "#pragma unroll"),
    "one warp frees a slot for four": ("t % 32 == 0) mbarrier_arrive(empty + n % kStages);",
        "t == 0) for (int i = 0; i < 4; ++i) mbarrier_arrive(empty + n % kStages);"),
    "the copy out not waited for": ("      bulk_wait_read<0>();\n", ""),
    "no fence of registers": ("        wgmma_fence(o, probabilities);\n        issue_output(n);", "        issue_output(n);"),
    "the diagonal one too far": ("+ p.diagonal + 1) - first - column", "+ p.diagonal + 2) - first - column"),
    "-inf minus -inf": ("highest == -INFINITY ? 0.0f : highest * scale_log2", "highest * scale_log2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_bug(tmp_path_factory):
    unused = r"case FASTLM_FLOAT16: .*|case (64|256): .*"  # bf16, 128 wide
    return planted(SOURCE, BUGS, tmp_path_factory.mktemp("planted"), without=unused)


@needs_compiler
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_seen(name, with_bug):
    torch.manual_seed(0)
    sizes = (1, 200, 420, 2, 1, 128)  # the ring of keys goes round twice
    for order in SOME_ORDERS[:1] + SOME_ORDERS[-1:]:
        with pytest.raises((AssertionError, HostError)) as caught:
            check(with_bug[name], *inputs(*sizes), True, programs=2, orders=[order])
            check(with_bug[name], *inputs(1, 140, 100, 1, 1, 128), True, orders=[order])
        if caught.type is HostError:
            assert re.search(
                r"attention\.cu:\d+: (block \(\d, 0, 0\), thread \d+: |every thread waits)", str(caught.value)
            )


@needs_nvcc
def test_softmax_runs_under_the_products(tmp_path):
    """On sm_90a nothing is spilled, ptxas does not serialise the products (C7508, C7510), and in the loop over keys all of a
    tile's exponentials lie between the wait for the scores and that for the output: the tensor cores work meanwhile."""
    report, cubin = compiled(SOURCE, "sm_90a", tmp_path)
    assert not re.search(r"C75\d\d|[1-9]\d* bytes spill", report), report
    found = set()
    for name, code in instructions(cubin).items():
        width, keys = map(int, re.search(r"kernelI\w+?Li(\d+)ELi(\d+)ELi", name).groups())
        found.add((width, "bfloat16" in name))
        assert any("HGMMA" in i for i in code), name
        loop = next(i for i, text in enumerate(code) if "WARPGROUP.DEPBAR.LE gsb0, 0x1" in text)
        end = next(i for i, text in enumerate(code) if i > loop and "WARPGROUP.DEPBAR.LE gsb0, 0x0" in text)
        assert sum("MUFU.EX2" in i for i in code[loop:end]) == keys // 2 + 2, name
        assert not any("HGMMA" in i for i in code[loop:end]), name
    assert found == {(width, bf16) for width in (64, 128, 256) for bf16 in (False, True)}


# --- the op, through its binding --------------------------------------------------------------------------------------

on_the_host = pytest.mark.usefixtures("cuda_on_the_host")


def both(backend, q, k, v, dout, **options):
    """o, lse and the gradients of o.dout and of the sum of lse."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o, lse = attention(q, k, v, return_lse=True, backend=backend, **options)
    seen = lse.masked_fill(lse == float("-inf"), 0)
    return o, lse, *torch.autograd.grad((o.double() * dout).sum() + seen.sum(), (q, k, v))


@needs_compiler
@on_the_host
@pytest.mark.parametrize(
    "options", ({}, {"causal": True}, {"causal": "top_left", "scale": 0.2}, {"window": (-1, 7)}), ids=str
)
def test_forward_and_gradients(options):
    """The gradients are Triton's, from the kernel's log-sum-exp."""
    q, k, v = inputs(1, 70, 90, 2, 1, 64)
    dout = torch.randn(q.shape)
    found = both("cuda", q, k, v, dout, **options)
    exact = both("reference", q.double(), k.double(), v.double(), dout, **options)
    plain = both("reference", q, k, v, dout, **options)
    for name, f, e, p in zip(("o", "lse", "dq", "dk", "dv"), found, exact, plain):
        assert_accurate(f, e, p, name)


@needs_compiler
@on_the_host
def test_tensors_that_no_tensor_map_describes_are_copied():
    q, k, v = inputs(2, 40, 40, 2, 2, 64, FP16)
    want = attention(q, k, v, backend="cuda")
    apart = torch.zeros(2, 40, 2, 66, dtype=FP16)[..., :64].copy_(k)  # rows at 132 bytes
    late = torch.zeros(v.numel() + 1, dtype=FP16)[1:].view(v.shape).copy_(v)  # at 2 bytes
    assert torch.equal(attention(q, apart, late, backend="cuda"), want)
    swapped = q.transpose(2, 3).contiguous().transpose(2, 3)  # along the width elements do not follow each other
    assert torch.equal(attention(swapped, k, v, backend="cuda"), want)
    shared = k[:, :, :1].expand(-1, -1, 2, -1)
    assert torch.equal(attention(q, shared, v, backend="cuda"), attention(q, shared.contiguous(), v, backend="cuda"))


@needs_compiler
@on_the_host
def test_nothing_to_do():
    for B, S, T in ((0, 5, 5), (1, 0, 5), (2, 5, 0)):
        q, k, v = inputs(B, S, T, 2, 1, 64)
        o, lse = attention(q, k, v, return_lse=True, backend="cuda")
        assert o.shape == q.shape and lse.shape == (B, 2, S) and not o.any() and (lse == float("-inf")).all()


@needs_compiler
@on_the_host
def test_dispatcher_and_compiled_calls():
    q, k, v = (x.requires_grad_() for x in inputs(1, 20, 30, 2, 1, 64))
    torch.library.opcheck(OP.forward, (*call_of(q, k, v, True, None), "cuda"))
    torch._dynamo.reset()
    compiled_call = torch.compile(
        lambda *args: attention(*args, causal=True, backend="cuda"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for T in (30, 41):
        args = [x.requires_grad_() for x in inputs(1, 20, T, 2, 1, 64)]
        found, want = compiled_call(*args), attention(*args, causal=True, backend="cuda")
        dout = torch.randn_like(want)
        for a, b in zip(*(torch.autograd.grad(o, args, dout) for o in (found, want))):
            assert torch.equal(a, b)
        assert torch.equal(found, want)
    with torch.autocast("cpu", dtype=BF16):
        wide = [x.detach().float() for x in (q, k, v)]
        assert torch.equal(attention(*wide, backend="cuda"), attention(q, k, v, backend="cuda"))


@needs_compiler
@on_the_host
def test_what_it_does_not_take(monkeypatch):
    q, k, v = inputs(1, 8, 8, 2, 2, 64)
    for wrong, words in (
        ({"window": (3, 0)}, "no window to the left, softcap or dropout"),
        ({"softcap": 5.0}, "no window to the left, softcap or dropout"),
        ({"dropout_p": 0.5}, "or dropout"),
        ({"key_lengths": torch.tensor([4])}, "it takes no key_lengths"),
        ({"bias": torch.zeros(8, 8)}, "it takes no bias"),
        ({"relative_bias": torch.zeros(2, 5)}, "it takes no relative_bias"),
        ({"sinks": torch.zeros(2)}, "it takes no sinks"),
        ({"key_starts": torch.tensor([4])}, "it takes no alibi_slopes"),
        ({"scale": -1.0}, "scale > 0, from 2.-126 to 2.127, got -1.0"),
        ({"scale": 1e-50}, "got 1e-50"),  # in fp32 it is 0
        ({"scale": 3e38}, "got 3e[+]38"),  # scale * log2(e) would be infinite
        ({"scale": math.nan}, "got nan"),
        ({"v": v[..., :32]}, "64, 128 or 256 wide, those of v like those of q, got 64 and 32"),
        ({"q": q.float(), "k": k.float(), "v": v.float()}, "take bfloat16 and float16, got float32"),
    ):
        with pytest.raises(ValueError, match=words):
            attention(**{"q": q, "k": k, "v": v} | wrong, backend="cuda")
    many = torch.empty(1, 1, 2, 64, dtype=BF16).expand(1, 1 << 29, 2, 64)
    for long, words in (((many, k, v), "got 536870912 and 8"), ((q, many, many), "got 8 and 536870912")):
        assert words in attention_cuda.reason_against(call_of(*long, False, None))
    assert "not measured" in OP._slower("cuda", q) and OP._slower("triton", q) is None  # auto passes over it
    monkeypatch.setattr(attention_cuda, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="its backward is Triton's, which is not installed"):
        attention(q.requires_grad_(), k, v, backend="cuda")
    function = torch.ops.fastlm_host.attention_fwd
    for args, words in (
        ((q, k, v[:, :7]), "q must be"),
        ((q, k.half(), v), "one dtype"),
        ((q[:, :, :1], k, v), "a multiple of"),
    ):
        with pytest.raises(RuntimeError, match=words):
            function(*(x.detach() for x in args), 8, 1.0)
    for scale in (0.0, 1e-50, 3e38, math.inf, math.nan):
        with pytest.raises(RuntimeError, match="scale must be from 2.-126 to 2.127"):
            function(q.detach(), k, v, 8, scale)


@pytest.mark.gpu
def test_on_a_gpu():
    """Many tiles to a block and many blocks, which the host body has no time for; the same bits again, also from a CUDA graph."""
    if reason := _cuda.unavailable():
        pytest.skip(reason)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("it is written for Hopper")
    for width, dtype in ((64, BF16), (128, FP16), (256, BF16)):
        for S, T in ((1, 1000), (777, 777), (2050, 1300), (1300, 2050)):
            for causal in (False, True):
                q, k, v = (x.cuda() for x in inputs(2, S, T, 16, 4, width, dtype))
                found = attention(q, k, v, causal=causal, return_lse=True, backend="cuda")
                exact = attention(*(x.double() for x in (q, k, v)), causal=causal, return_lse=True, backend="reference")
                plain = attention(q, k, v, causal=causal, return_lse=True, backend="reference")
                for name, f, e, p in zip(("o", "lse"), found, exact, plain):
                    assert_accurate(f, e, p, name)
                again = attention(q, k, v, causal=causal, return_lse=True, backend="cuda")
                assert all(torch.equal(a, b) for a, b in zip(found, again))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(q, k, v, causal=True, backend="cuda")
    q.neg_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, attention(q, k, v, causal=True, backend="cuda"))
