"""csrc/softmax.cu on the host body of the device layer, against the reference of the op."""

from ctypes import c_int32

import pytest
import torch

from fastlm import ops
from fastlm.ops import _cuda
from fastlm.ops.softmax import _reference
from fastlm.testing import assert_accurate, check_accuracy, check_guards, check_op
from tests.csrc.host_library import DTYPES, HostError, In, Out, library, needs_compiler, planted, same_in_all_orders
from tests.ops.test_softmax import MASKS, _case

pytestmark = needs_compiler
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALE = 0.7


@pytest.fixture(scope="module")
def lib():
    return library("csrc/softmax.cu")


def rows_of(x):
    """(inner, outer stride, inner stride) of a tensor [..., N] of two or three dimensions."""
    return (1, x.stride(0), 0) if x.ndim == 2 else (x.shape[1], x.stride(0), x.stride(1))


MASK_KINDS = {torch.bool: 1, FP32: 2, BF16: 3, FP16: 4}  # fastlm_mask_kind


def launch(lib, x, saved=None, out=None, order="forward", scale=SCALE, mask=None):
    """y of x, or dx of dy and y. mask: broadcasts to x's two dimensions."""
    out = torch.full_like(x, float("nan")) if out is None else out
    strides = (0, 0, 0, 0) if mask is None else (0, 0, *(s if n > 1 else 0 for n, s in zip(mask.shape, mask.stride())))
    lib.run("fastlm_softmax_fwd" if saved is None else "fastlm_softmax_bwd", {
        "x": In(x), "saved": In(saved), "y": Out(out), "rows": x.numel() // x.shape[-1], "columns": x.shape[-1],
        "x_rows": rows_of(x), "saved_rows": rows_of(x if saved is None else saved), "y_rows": rows_of(out),
        "dtype": c_int32(DTYPES[x.dtype]), "scale": scale,
        "mask": In(mask), "mask_middle": 1, "mask_inner": x.numel() // x.shape[-1], "mask_strides": strides,
        "mask_kind": c_int32(0 if mask is None else MASK_KINDS[mask.dtype]),
    }, order=order)  # fmt: skip
    return (out,)


def gradient(dy, y):
    return SCALE * y * (dy - (dy * y).sum(-1, keepdim=True))


# A row per warp (five: two blocks), per block, too wide for registers; with and without a tail; one element.
SHAPES = {
    "warp": (5, 64), "warp_tail": (5, 75), "one": (3, 1), "block": (2, 1032), "block_tail": (2, 1051), "wide": (1, 16400)
}  # fmt: skip


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_directions(lib, shape, dtype):
    rows, columns = shape
    pitch = -(-columns // 8) * 8  # rows begin at 16 bytes: between them lies NaN that must not be read as an element
    x, dy, y, dx = (torch.full((rows, pitch), float("nan"), dtype=dtype)[:, :columns] for _ in range(4))
    x.copy_(4 * torch.randn(shape))
    dy.copy_(torch.randn(shape))
    orders = same_in_all_orders if columns < 16000 else lambda run: run("backward")
    orders(lambda order: launch(lib, x, out=y, order=order))
    assert_accurate(y, _reference(x.double(), None, SCALE), _reference(x, None, SCALE), "y")
    orders(lambda order: launch(lib, dy, y, out=dx, order=order))
    assert_accurate(dx, gradient(dy.double(), y.double()), gradient(dy, y), "dx")


def mask_for(kind, shape):
    """Some rows are hidden entirely; -inf and False hide an element."""
    if kind == "column":
        return (torch.arange(shape[0]) % 2 == 0)[:, None]
    mask = torch.randn(shape if kind in ("bool", "added") else (1, shape[1]))
    mask = mask.masked_fill(mask > 0.7, float("-inf"))
    mask[0] = float("-inf") if len(mask) > 1 else mask[0]
    return (
        mask > float("-inf") if kind in ("bool", "row") else mask.to({"added": FP32, "low": BF16, "half": FP16}[kind])
    )


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
@pytest.mark.parametrize("kind", ("bool", "row", "column", "added", "low", "half"))
def test_masks(lib, kind, dtype):
    """Read with x's rows, where each begins at 16 bytes, or element by element; by a warp, a block, twice."""
    for shape in ((5, 72), (5, 75), (2, 1032)) + ((2, 16408),) * (kind == "bool"):
        pitch = -(-shape[1] // 8) * 8
        mask = mask_for(kind, shape)
        lies = torch.zeros(len(mask), pitch + 8, dtype=mask.dtype)[:, : mask.shape[1]]
        x, y = (torch.full((shape[0], pitch), float("nan"), dtype=dtype)[:, : shape[1]] for _ in range(2))
        x.copy_(4 * torch.randn(shape))
        orders = same_in_all_orders if shape[1] == 75 else lambda run: run("backward")
        for m in (lies.copy_(mask), mask.t().contiguous().t()):
            orders(lambda order, x=x, y=y, m=m: launch(lib, x, out=y, order=order, mask=m))
            assert_accurate(y, _reference(x.double(), mask, SCALE), _reference(x, mask, SCALE), f"y of {shape}")
    (y,) = launch(lib, x[:, 1:], mask=mask[:, 1:] if mask.shape[1] > 1 else mask)  # not at 16 bytes
    want = [_reference(t[:, 1:], mask[:, 1:] if mask.shape[1] > 1 else mask, SCALE) for t in (x.double(), x)]
    assert_accurate(y, *want)


def test_a_hidden_element_may_be_anything(lib):
    x, mask = torch.randn(2, 40), torch.ones(2, 40, dtype=torch.bool)
    x[0, 3], x[1, 5], mask[0, 3], mask[1, 5] = float("nan"), float("inf"), False, False
    (y,) = launch(lib, x, mask=mask)
    torch.testing.assert_close(y, _reference(x, mask, SCALE))
    x = torch.full((1, 40), float("-inf"))
    assert not launch(lib, x, mask=mask[:1])[0].any()  # nothing but -inf: 0 under a mask, NaN without one
    assert launch(lib, x)[0].isnan().all()


def test_rows_that_are_not_aligned_are_read_element_by_element(lib):
    x = torch.randn(3, 37).bfloat16()  # 74 bytes to a row
    (y,) = launch(lib, x)
    assert_accurate(y, _reference(x.double(), None, SCALE), _reference(x, None, SCALE), "y")
    (dx,) = launch(lib, x, y)
    assert_accurate(dx, gradient(x.double(), y.double()), gradient(x, y), "dx")


def test_rows_at_two_strides(lib):
    x = torch.randn(2, 8, 3, 24).bfloat16()[:, 0].transpose(0, 1)  # [3, 2, 24]: heads of one product
    y = torch.empty(3, 2, 24, dtype=BF16)
    launch(lib, x, out=y)
    assert_accurate(y, _reference(x.double(), None, SCALE), _reference(x, None, SCALE), "y")


@pytest.mark.parametrize("columns", (40, 37, 16400))
def test_infinities_and_nan_are_torchs(lib, columns):
    """-inf in a row is a probability of 0, also where a thread meets nothing else; NaN, inf and nothing but -inf give NaN."""
    x = torch.randn(5, columns)
    x[0, : columns // 2] = float("-inf")
    x[1, 3] = float("nan")
    x[2, 5] = float("inf")
    x[3] = float("-inf")
    x[4] = 3e38
    (y,) = launch(lib, x, scale=1.0)
    torch.testing.assert_close(y, torch.softmax(x, -1), equal_nan=True, rtol=2e-6, atol=1e-8)


def test_wrong_arguments_are_refused(lib):
    x = torch.randn(2, 8)
    with pytest.raises(HostError, match="returned 1: no report"):
        launch(lib, x[:0])
    with pytest.raises(HostError, match="out of bounds: write of bytes 32 to 47 of buffer 'y'"):
        launch(lib, x, out=torch.empty(1, 8))


# --- the op, through its binding --------------------------------------------------------------------------------------

on_the_host = pytest.mark.usefixtures("cuda_on_the_host")


@on_the_host
@pytest.mark.parametrize("kind", MASKS[1:])
def test_masks_keep_the_contract(kind):
    check_op(_case(kind), "cuda", "cpu")
    for dtype in (BF16, FP16):
        check_accuracy(_case(kind), "cuda", dtype, "cpu")
    check_guards(_case(kind, (2, 3, 1030)), "cuda", "cpu")


@on_the_host
def test_masks_are_read_where_they_lie():
    x = torch.randn(2, 3, 4, 20)
    shapes = [(2, 1, 1, 20), (4, 20), (2, 3, 1, 1), (2, 1, 4, 20), (1, 3, 1, 20), (2, 3, 4, 20), (20,), (1,), ()]
    masks = [torch.rand(shape) > 0.3 for shape in shapes]
    masks += [
        (torch.rand(20, 4) > 0.3).t(),
        torch.randn(3, 2, 20, 4).permute(1, 0, 3, 2),
        torch.randn(2, 3, 8, 20)[:, :, ::2],
    ]
    for mask in masks:
        for one in (x, x.transpose(0, 2).contiguous().transpose(0, 2)):
            got, want = (ops.softmax(one, mask=mask, backend=b) for b in ("cuda", "reference"))
            torch.testing.assert_close(got, want)
    x, mask = torch.randn(2, 3, 2, 3, 2, 5), torch.randn(2, 1, 2, 1, 2, 5)  # broadcasts by turns
    got, want = (ops.softmax(x, mask=mask, backend=b) for b in ("cuda", "reference"))
    torch.testing.assert_close(got, want)
    got, want = (ops.softmax(x, 1, mask=mask, backend=b) for b in ("cuda", "reference"))
    torch.testing.assert_close(got, want)


@on_the_host
def test_rows_at_three_strides_are_copied_once():
    x = torch.randn(5, 4, 3, 16)[:, :3, :2, :8]
    with torch.profiler.profile() as profile:
        y = torch.ops.fastlm_host.softmax_fwd(x, None, 1.0)
    assert sum(event.name == "aten::clone" for event in profile.events()) == 1
    torch.testing.assert_close(y, torch.softmax(x, -1))


@on_the_host
def test_wrong_masks_are_refused():
    x, call = torch.randn(2, 8), torch.ops.fastlm_host.softmax_fwd
    for mask, words in (
        (torch.ones(3, 8), "mask must broadcast to x"),
        (torch.ones(1, 2, 8), "mask must broadcast to x"),
        (torch.ones(8).double(), "mask must be bool, float32, bfloat16 or float16"),
        (torch.ones(8, device="meta"), "mask must be a CPU tensor"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call(x, mask, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MASKS)
def test_on_a_gpu(kind):
    if reason := _cuda.unavailable():
        pytest.skip(reason)
    check_op(_case(kind), "cuda", "cuda")
    for dtype in (FP32, BF16, FP16):
        for shape in ((2, 3, 4, 20), (2, 3, 123), (2, 7, 1032), (2, 3, 40000)):
            check_accuracy(_case(kind, shape), "cuda", dtype, "cuda")


BUGS = {
    "the tail takes part": ("s[k][i] = column + i < a.columns ? s[k][i] * a.scale : -INFINITY", "s[k][i] *= a.scale"),
    "-inf alone is NaN": ("if (higher == -INFINITY) continue;", ""),
    "the tail is written past its end": ("if (column + i < columns) store_vector(", "store_vector("),
    "a mask past its end": ("if (column + i < a.columns) s[i] = f(", "s[i] = f("),
    "a mask's columns swapped": ("mask + i * a.mask_strides[3]", "mask + i"),
    "a hidden row": ("MASKED && top == -INFINITY ? 0.0f : top", "top"),
    "all of a mask from its first row": ("number % inner * a.mask_strides[2];", "0;"),
}


@pytest.fixture(scope="module")
def with_bug(tmp_path_factory):
    return planted("csrc/softmax.cu", BUGS, tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_seen(name, with_bug):
    lib = with_bug[name]
    with pytest.raises((AssertionError, HostError)):
        test_both_directions(lib, (5, 75), FP32)
        test_infinities_and_nan_are_torchs(lib, 37)
        test_masks(lib, "added", FP32)
