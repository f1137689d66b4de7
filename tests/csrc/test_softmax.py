"""csrc/softmax.cu on the host body of the device layer, against the reference of the op."""

from ctypes import c_int32

import pytest
import torch

from fastlm.ops.softmax import _reference
from fastlm.testing import assert_accurate
from tests.csrc.host_library import DTYPES, HostError, In, Out, library, needs_compiler, planted, same_in_all_orders

pytestmark = needs_compiler
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALE = 0.7


@pytest.fixture(scope="module")
def lib():
    return library("csrc/softmax.cu")


def rows_of(x):
    """(inner, outer stride, inner stride) of a tensor [..., N] of two or three dimensions."""
    return (1, x.stride(0), 0) if x.ndim == 2 else (x.shape[1], x.stride(0), x.stride(1))


def launch(lib, x, saved=None, out=None, order="forward", scale=SCALE):
    """y of x, or dx of dy and y."""
    out = torch.full_like(x, float("nan")) if out is None else out
    lib.run("fastlm_softmax_fwd" if saved is None else "fastlm_softmax_bwd", {
        "x": In(x), "saved": In(saved), "y": Out(out), "rows": x.numel() // x.shape[-1], "columns": x.shape[-1],
        "x_rows": rows_of(x), "saved_rows": rows_of(x if saved is None else saved), "y_rows": rows_of(out),
        "dtype": c_int32(DTYPES[x.dtype]), "scale": scale,
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


BUGS = {
    "the tail takes part": ("s[k][i] = column + i < a.columns ? s[k][i] * a.scale : -INFINITY", "s[k][i] *= a.scale"),
    "-inf alone is NaN": ("if (higher == -INFINITY) continue;", ""),
    "the tail is written past its end": ("if (column + i < columns) store_vector(", "store_vector("),
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
