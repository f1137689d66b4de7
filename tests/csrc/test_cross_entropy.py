"""csrc/cross_entropy.cu on the host body of the device layer, against the reference of the op, and the op's backend "cuda"."""

import dataclasses
import math
import re
import subprocess
from contextlib import nullcontext
from ctypes import c_int32

import pytest
import torch

from fastlm import ops
from fastlm.ops import _cuda, _op
from fastlm.ops.cross_entropy import OP, _backward_reference, _reference
from fastlm.testing import assert_accurate, check_accuracy, check_guards, check_op
from tests.csrc.host_library import (
    CSRC,
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
from tests.ops import test_cross_entropy as of_op

pytestmark = needs_compiler
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
IGNORED = -100
NONE = {"smoothing": 0.0, "z_loss": 0.0, "scale": 1.0, "softcap": None}
ALL = {"smoothing": 0.1, "z_loss": 0.02, "scale": 0.7, "softcap": 6.0}


@pytest.fixture(scope="module")
def lib():
    return library("csrc/cross_entropy.cu")


def rows_of(x):
    """(inner, outer stride, inner stride) of a tensor [..., N] of two or three dimensions."""
    return (1, x.stride(0), 0) if x.ndim == 2 else (x.shape[1], x.stride(0), x.stride(1))


def launch(
    lib,
    x,
    target,
    weight=None,
    backward=None,
    dz=None,
    order="forward",
    smoothing=0.0,
    z_loss=0.0,
    scale=1.0,
    softcap=None,
):
    """loss and statistics; or, of backward = (dloss, statistics), the gradient, into dz."""
    if backward is None:
        loss, statistics = torch.full(target.shape, 7.0), torch.full((2, target.numel()), 7.0)
        tensors = {"dloss": In(None), "loss": Out(loss), "statistics": Out(statistics), "dlogits": In(None)}
    else:
        dz = torch.full_like(x, math.nan) if dz is None else dz
        tensors = {"dloss": In(backward[0]), "loss": In(None), "statistics": In(backward[1]), "dlogits": Out(dz)}
    total = None if weight is None or not smoothing else weight.sum().view(1)
    lib.run("fastlm_cross_entropy_fwd" if backward is None else "fastlm_cross_entropy_bwd", {
        "logits": In(x), "target": In(target), "weight": In(weight), "weight_sum": In(total), **tensors,
        "rows": target.numel(), "columns": x.shape[-1], "ignore_index": IGNORED,
        "logits_rows": rows_of(x), "dlogits_rows": rows_of(x if dz is None else dz), "smoothing": smoothing, "z_loss": z_loss,
        "scale": scale, "softcap": softcap or 0.0, "dtype": c_int32(DTYPES[x.dtype]),
    }, order=order)  # fmt: skip
    return (loss, statistics) if backward is None else (dz,)


def targets(rows, columns):
    target = torch.arange(rows) * 7919 % columns
    target[0] = columns - 1
    return target.masked_fill(torch.arange(rows) % 3 == 1, IGNORED)


def check(lib, x, target, weight, options, orders=same_in_all_orders, dz=None):
    """Both directions against the reference in fp64, by the accuracy rule; ignored rows hold NaN."""
    x[target == IGNORED] = math.nan
    exact = x.double(), target, None if weight is None else weight.double(), IGNORED
    by_hand = x, target, weight, IGNORED
    loss, statistics = orders(lambda order: launch(lib, x, target, weight, order=order, **options))
    numbers = tuple(options.values())
    assert_accurate(loss, _reference(*exact, *numbers), _reference(*by_hand, *numbers), "loss")
    dloss = torch.randn(target.shape)
    (found,) = orders(lambda order: launch(lib, x, target, weight, (dloss, statistics), dz, order, **options))
    want = _backward_reference(dloss.double(), *exact[:3], None, IGNORED, *numbers, "reference")
    assert_accurate(
        found, want, _backward_reference(dloss, *by_hand[:3], None, IGNORED, *numbers, "reference"), "dlogits"
    )
    assert (found[target == IGNORED] == 0).all()


# A row to a warp (two blocks of rows), to a block, with and without ends beside its 16-byte accesses; one class.
SHAPES = {
    "one": (3, 1),
    "few": (2, 3),
    "warp": (5, 304),
    "warp_ends": (6, 301),
    "block": (2, 1096),
    "block_ends": (4, 1029),
}


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
@pytest.mark.parametrize("options", (NONE, ALL), ids=("none", "all"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_directions(lib, shape, options, dtype):
    x = (2 * torch.randn(shape)).to(dtype)
    weight = torch.arange(shape[1]).float() % 5 / 4 + 0.25 if options is ALL else None
    check(lib, x, targets(*shape), weight, options)


# Several rounds of a block; of a cluster of 2, 4 and 8 blocks; the gradient in several blocks.
WIDE = {
    "rounds": (3, 9001, FP32, False), "two": (3, 16390, FP32, True), "four": (2, 32800, FP32, True),
    "eight": (1, 65543, FP32, True), "two_bf16": (2, 32777, BF16, True), "no_cluster": (2, 32777, BF16, False),
}  # fmt: skip


@pytest.mark.parametrize("options", ({**NONE, "smoothing": 0.1}, {**NONE, "z_loss": 0.02}), ids=("smooth", "z_loss"))
@pytest.mark.parametrize("name", WIDE)
def test_wide_rows(lib, name, options):
    rows, columns, dtype, clusters = WIDE[name]
    x = (2 * torch.randn(rows, columns)).to(dtype)
    target = targets(rows, columns)
    with nullcontext() if clusters else lib.without_clusters():
        orders = same_in_all_orders if options["smoothing"] else lambda run: run("backward")
        check(lib, x, target, None, options, orders)


def test_a_cluster_and_a_block_agree(lib):
    x, target = torch.randn(2, 16400), torch.tensor([16399, 4])
    clustered = launch(lib, x, target)
    with lib.without_clusters():
        alone = launch(lib, x, target)
    torch.testing.assert_close(clustered, alone, rtol=1e-6, atol=0)
    assert torch.equal(clustered[1][0], x.amax(1)) and torch.equal(alone[1][0], x.amax(1))


# Rows that begin anywhere, padded, at two strides, and a gradient that lies beside them or is dense.
LAYOUTS = {
    "shifted": ((2, 4, 301), lambda z: z[:, :-1]),
    "padded": ((3, 1, 313), lambda z: z[..., :301]),
    "offset": ((3, 1, 313), lambda z: z[..., 3:304]),
    "turned": ((2, 3, 1101), lambda z: z.transpose(0, 1)),
}


@pytest.mark.parametrize("dense", (False, True), ids=("beside", "dense"))
@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_wherever_they_lie(lib, name, dtype, dense):
    shape, view = LAYOUTS[name]
    x = view((2 * torch.randn(shape)).to(dtype))
    dz = torch.full(x.shape, math.nan, dtype=dtype) if dense else view(torch.full(shape, math.nan, dtype=dtype))
    target = targets(x.shape[0] * x.shape[1], x.shape[2]).view(x.shape[:2])
    check(lib, x, target, None, ALL, dz=dz)


@pytest.mark.parametrize("columns", (40, 37, 1500))
def test_infinities_and_nan(lib, columns):
    x = torch.randn(7, columns)
    x[0, : columns // 2] = -math.inf  # classes that are ruled out
    x[1, 3] = math.nan
    x[2, 5] = math.inf
    x[3] = -math.inf
    x[4] *= 1e4
    x[5, 4] = 90.0  # nearly sure
    x[6] += 1e5
    target = torch.tensor([columns - 1, 2, 2, 2, int(x[4].argmax()), 4, 5])
    loss, statistics = launch(lib, x, target)
    assert loss.isnan().tolist() == [False, True, True, True, False, False, False]
    live = [0, 4, 5, 6]
    want = _reference(x[live].double(), target[live], None, IGNORED, 0.0, 0.0, 1.0, None)
    torch.testing.assert_close(loss[live], want.float(), rtol=1e-5, atol=1e-7)
    (dz,) = launch(lib, x, target, backward=(torch.ones(7), statistics))
    p = torch.softmax(x[live].double(), -1)
    p[torch.arange(4), target[live]] -= 1
    torch.testing.assert_close(dz[live], p.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("columns", (4, 1500))
def test_nothing_but_the_lowest_logits(lib, columns, dtype):
    """A row of them is as likely everywhere as any constant row; z_loss 0 times their square is 0."""
    x, target = torch.full((2, columns), torch.finfo(dtype).min, dtype=dtype), torch.tensor([1, 2])
    for options in (NONE, {**NONE, "smoothing": 0.1}):
        loss, statistics = launch(lib, x, target, **options)
        torch.testing.assert_close(loss, torch.full((2,), math.log(columns)))
        (dz,) = launch(lib, x, target, None, (torch.ones(2), statistics), **options)
        share = 1 - options["smoothing"]
        want = torch.full((2, columns), share / columns).scatter_(1, target[:, None], share / columns - share)
        torch.testing.assert_close(dz, want.to(dtype), rtol=1e-5 if dtype == FP32 else 8e-3, atol=1e-8)


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("columns", (301, 1500))
def test_smoothing_of_logits_that_share_an_offset(lib, columns, weighted):
    """In fp32 the sums of logits of 1e5 have no digits for their differences left."""
    x, target = 1e5 + torch.randn(2, columns), torch.tensor([columns - 1, 2])
    weight = torch.arange(columns).float() % 5 / 4 + 0.25 if weighted else None
    loss, _ = launch(lib, x, target, weight, smoothing=0.5)
    want = _reference(x.double(), target, None if weight is None else weight.double(), IGNORED, 0.5, 0.0, 1.0, None)
    torch.testing.assert_close(loss, want.float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("columns", (40, 1500))
def test_smoothing_of_a_class_that_is_ruled_out_is_infinite(lib, columns):
    x, target = torch.randn(2, columns), torch.tensor([1, 2])
    x[0, 1] = x[1, 3] = -math.inf
    loss, _ = launch(lib, x, target, smoothing=0.1)
    assert loss.tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("columns", (37, 1500))
def test_the_slope_of_a_softcap_near_its_bound(lib, columns):
    """4 e / (1 + e)^2 has its digits where 1 - tanh^2 has lost them."""
    x, target = torch.linspace(-32, 32, columns).repeat(2, 1), torch.tensor([0, columns - 1])
    options = {**NONE, "softcap": 4.0}
    _, statistics = launch(lib, x, target, **options)
    (dz,) = launch(lib, x, target, None, (torch.ones(2), statistics), **options)
    want = _backward_reference(
        torch.ones(2).double(), x.double(), target, None, None, IGNORED, 0.0, 0.0, 1.0, 4.0, "cuda"
    )
    torch.testing.assert_close(dz, want.float(), rtol=2e-5, atol=0)


def test_a_target_out_of_range_is_nan_and_reads_nothing_else(lib):
    x, weight = torch.randn(5, 40), torch.ones(40)
    target = torch.tensor([3, 40, -1, 2**40, -(2**62)])
    for options in (NONE, ALL):
        loss, statistics = launch(lib, x, target, weight, **options)
        assert loss.isnan().tolist() == [False, True, True, True, True] and statistics.isfinite().all()
        (dz,) = launch(lib, x, target, weight, (torch.ones(5), statistics), **options)
        assert dz.isfinite().all()


def test_wrong_arguments_are_refused(lib):
    x, target = torch.randn(2, 8), torch.tensor([1, 2])
    with pytest.raises(HostError, match="returned 1: no report"):
        launch(lib, x[:0], target[:0])
    with pytest.raises(HostError, match="out of bounds: write of bytes .* of buffer 'dlogits'"):
        launch(lib, x, target, backward=(torch.ones(2), torch.zeros(2, 2)), dz=torch.empty(1, 8))


BUGS = {
    "vectors run past the end": ("vectors((columns - head) / VEC)", "vectors(columns / VEC)"),
    "the ends are of one side": ("first < head ? first : columns - ends + first", "first"),
    "the sum is not rescaled": ("      sum *= exp_of(peak - higher);\n", ""),
    "parts of other maxima are added": ("warp_sum(mine.sum * exp_of(mine.peak - all.peak))", "warp_sum(mine.sum)"),
    "no barrier before the parts are read": ("      block_barrier();\n", ""),
    "no cluster barrier before the parts are read": ("      cluster_barrier();\n", ""),
    "the first block may not run yet": ("    if (blocks > 1) cluster_wait();  // the first block runs\n", ""),
    "parts go to the wrong block": ("cluster_pointer(parts, 0)", "cluster_pointer(parts, rank)"),
    "the log-sum-exp is rounded": ("exp_of((x - peak) - log_sum)", "exp_of(x - (peak + log_sum))"),
    "the target is beside": ("column == target.column ?", "column + 1 == target.column ?"),
    "smoothing forgets the sum of weights": ("spread * (weight_sum * p", "spread * (p"),
    "z_loss has no gradient": ("    g += pull * p;", "    g += 0.0f * pull;"),
    "the softcap has no gradient": ("    if (r.softcapped()) g *= slope;\n", ""),
    "the softcap's slope cancels": ("slope = t.slope;", "slope = 1.0f - t.value * t.value;"),
    "the softcap's slope is another's": (
        "gradient(x[i], slope[i], column + i)", "gradient(x[i], slope[0], column + i)"
    ),
    "smoothing has no pivot": ("fabsf(picked) <= kLargest ? picked : 0.0f", "0.0f"),
    "the pivot is infinite": ("fabsf(picked) <= kLargest ? picked : 0.0f", "picked"),
    "a maximum begins too high": ("constexpr float kLowest = -kLargest;", "constexpr float kLowest = -3.0e38f;"),
    "every row has the first one's gradient": ("upstream = dloss[row]", "upstream = dloss[0]"),
    "ignored rows are read": ("a.ignore_index) {\n    if (ends)", "1 - a.ignore_index) {\n    if (ends)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_bug(tmp_path_factory):
    return planted("csrc/cross_entropy.cu", BUGS, tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_seen(name, with_bug):
    lib = with_bug[name]
    with pytest.raises((AssertionError, HostError)):
        test_both_directions(lib, (5, 301), ALL, FP32)
        test_both_directions(lib, (2, 1096), ALL, FP32)
        test_infinities_and_nan(lib, 37)
        test_wide_rows(lib, "two", {**NONE, "smoothing": 0.1})
        test_nothing_but_the_lowest_logits(lib, 4, FP32)
        test_smoothing_of_logits_that_share_an_offset(lib, 301, False)
        test_smoothing_of_a_class_that_is_ruled_out_is_infinite(lib, 40)
        test_the_slope_of_a_softcap_near_its_bound(lib, 37)


@needs_nvcc
def test_rows_move_in_16_bytes(tmp_path):
    ptx = tmp_path / "cross_entropy.ptx"
    command = [
        "nvcc",
        "-std=c++20",
        "-O3",
        "-arch=sm_90a",
        "-ptx",
        f"-I{CSRC}",
        str(CSRC / "cross_entropy.cu"),
        "-o",
        str(ptx),
    ]
    subprocess.run(command, check=True, timeout=300)
    kernels = re.split(r"\.entry ", ptx.read_text())[1:]
    assert len(kernels) == 12
    for text in kernels:
        backward = "bwd" in text.split("(")[0]
        assert len(re.findall(r"\bld\.global(?:\.cs)?\.v4\.u32\b", text)) == 4  # all under way at once
        stores = len(re.findall(r"\bst\.global\.v2\.u64\b", text))
        assert stores == (5 if backward else 0)  # and the zeros of an ignored row


# --- through the op ---

through_op = pytest.mark.usefixtures("cuda_on_the_host")


@through_op
@pytest.mark.parametrize("name", of_op.CASES)
def test_it_keeps_the_contract(name):
    check_op(of_op.CASES[name], "cuda", "cpu")


@through_op
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
@pytest.mark.parametrize("name", of_op.CASES)
def test_accuracy(name, dtype):
    case = of_op.CASES[name]
    for shape in ((2, 3, 300), (7, 37), (2, 1301), (50,), (1, 3, 1)):
        check_accuracy(case, "cuda", dtype, "cpu", case.make(dtype, "cpu", shape))


@through_op
@pytest.mark.parametrize("name", of_op.VIEWS)
def test_accuracy_of_views(name):
    case = of_op._view_case(name, of_op.CASES["none_all"])
    for dtype in (FP32, BF16):
        check_accuracy(case, "cuda", dtype, "cpu")
    check_guards(dataclasses.replace(case, make=lambda *a: case.make(*a)), "cuda", "cpu")


@through_op
def test_a_gradient_lies_where_the_fake_says():
    whole = torch.randn(4, 5, 6, 301)
    for x in (whole, whole[:, :, :-1], whole[:, :-2], whole[..., :299], whole.transpose(0, 2), whole[:1, :, 1:3],
              whole[:, :1].expand(4, 5, 6, 301), whole[:0], whole[0, 0, 0], whole[..., :1]):  # fmt: skip
        target, options = torch.zeros(x.shape[:-1], dtype=torch.int64), (-100, 0.0, 0.0, 1.0, None, "cuda")
        loss, statistics = OP.forward(x, target, None, *options)
        args = loss, x, target, None, statistics, *options
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = OP.backward(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        real = OP.backward(*args)
        assert real.shape == fake.shape and real.stride() == fake.stride()


@through_op
def test_class_weights_of_every_dtype():
    x, target = torch.randn(3, 40), torch.tensor([1, 2, 3])
    for dtype in (FP32, BF16, FP16):
        weight = torch.rand(80).to(dtype)[::2]
        options = {"label_smoothing": 0.1, "reduction": "none"}
        found = ops.cross_entropy(x, target, weight, backend="cuda", **options)
        torch.testing.assert_close(found, ops.cross_entropy(x, target, weight.float(), backend="reference", **options))


@through_op
def test_wrong_calls_are_refused_before_memory_is_touched():
    x, target, call = torch.randn(2, 8), torch.tensor([1, 2]), torch.ops.fastlm_host.cross_entropy_fwd
    rest = (-100, 0.0, 0.0, 1.0, None)
    for args, words in (
        ((x.double(), target, None, *rest), "input must be float32, bfloat16 or float16"),
        ((x, target.int(), None, *rest), "target must be int64"),
        ((x, target[:1], None, *rest), r"input must be \[..., V\] and target"),
        ((x, target, torch.ones(7), *rest), r"weight must be \[8\]"),
        ((x.to("meta"), target, None, *rest), "input must be a CPU tensor"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call(*args)
    with pytest.raises(RuntimeError, match="dloss must be"):
        torch.ops.fastlm_host.cross_entropy_bwd(torch.ones(2), x, target, None, torch.ones(2, 1), *rest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", of_op.CASES)
def test_on_a_gpu(name):
    if reason := _cuda.unavailable():
        pytest.skip(reason)
    case = of_op.CASES[name]
    check_op(case, "cuda", "cuda")
    for dtype in (FP32, BF16, FP16):
        for shape in (
            (7, 37),
            (5, 1301),
            (600, 9001),
            (3, 50257),
            (2, 128256),
        ):  # by warps, blocks, rounds of a block, clusters
            check_accuracy(case, "cuda", dtype, "cuda", case.make(dtype, "cuda", shape))


def test_auto_does_not_take_what_was_not_measured(monkeypatch):
    monkeypatch.setattr(_op, "_on_cuda", lambda *_: True)
    found = ops.explain(ops.cross_entropy, torch.ones(4, 8, device="meta"), torch.ones(4, device="meta").long())
    assert found.backend != "cuda" and "not measured" in found.reasons["cuda"]


@through_op
def test_more_rows_than_it_numbers_are_a_reason():
    x, target = torch.empty(2**31, 8, device="meta"), torch.empty(2**31, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"fewer than 2\^31 of each"):
        ops.cross_entropy(x, target, backend="cuda")
