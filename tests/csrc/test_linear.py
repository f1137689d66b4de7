"""csrc/linear.cu on the host body of the device layer, and the op's backend "cuda" with it."""

from ctypes import c_int32

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.ops import _cuda
from fastlm.ops.linear import _MOST_COLUMNS
from fastlm.testing import assert_accurate, check_accuracy, check_guards, check_op
from tests.csrc.host_library import DTYPES, HostError, In, Out, library, needs_compiler, same_in_all_orders
from tests.ops.test_linear import case_of

pytestmark = needs_compiler
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def lib():
    return library("csrc/linear.cu")


def launch(lib, x, weight, bias=None, splits=1, order="forward"):
    """y of the launcher; Python's side of csrc/bindings/linear.cpp."""
    M, N = x.numel() // x.shape[-1], weight.shape[0]
    y = torch.full((M, N), float("nan"), dtype=x.dtype)
    rows = (1, x.stride(0), 0) if x.ndim == 2 else (x.shape[1], x.stride(0), x.stride(1))
    lib.run("fastlm_linear_fwd", {
        "x": In(x), "weight": In(weight), "scale": None, "zero": None, "bias": In(bias), "y": Out(y),
        "partial": Out(torch.empty(splits, M, N) if splits > 1 else None), "rows": M, "columns": x.shape[-1], "outputs": N,
        "weight_stride": weight.stride(0) * weight.element_size(), "x_rows": rows, "x_dtype": c_int32(DTYPES[x.dtype]),
        "scale_dtype": c_int32(0), "bias_dtype": c_int32(0 if bias is None else DTYPES[bias.dtype]),
        "bits": c_int32(8 * x.element_size()), "group_size": c_int32(0), "splits": c_int32(splits),
    }, order=order)  # fmt: skip
    return (y,)


def check(lib, x, weight, bias=None, splits=1, orders=same_in_all_orders):
    (y,) = orders(lambda order: launch(lib, x, weight, bias, splits, order))
    rows, given = x.reshape(-1, x.shape[-1]), [] if bias is None else [bias]
    exact = F.linear(rows.double(), weight.double(), *(b.double() for b in given))
    assert_accurate(y, exact, F.linear(rows, weight, *(b.to(x.dtype) for b in given)))


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
@pytest.mark.parametrize("rows", range(1, 9))
def test_rows(lib, rows, dtype):
    """Three tiles of outputs, the last of them short, and three steps of columns and part of a fourth."""
    check(lib, torch.randn(rows, 104).to(dtype), torch.randn(37, 104).to(dtype), torch.randn(37).to(dtype))


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
@pytest.mark.parametrize("N, K", ((1, 1), (1, 8), (3, 7), (16, 33), (17, 129), (300, 5)))
def test_shapes(lib, N, K, dtype):
    check(lib, torch.randn(2, K).to(dtype), torch.randn(N, K).to(dtype))


@pytest.mark.parametrize("splits", (2, 3, 7))
def test_columns_divided_among_blocks(lib, splits):
    """A last share that is short, or that has nothing."""
    check(lib, torch.randn(3, 1000).bfloat16(), torch.randn(20, 1000).bfloat16(), torch.randn(20), splits)


def test_x_and_weight_at_strides(lib):
    x, weight = torch.randn(2, 5, 3, 48).bfloat16()[:, 1].transpose(0, 1), torch.randn(20, 96).bfloat16()
    weight[:, 48:] = float("nan")
    check(lib, x, weight[:, :48])  # [3, 2, 48]: heads of one product
    check(lib, torch.randn(3, 51).bfloat16()[:, 1:49], weight[:, :48])  # rows of x that begin at 2 bytes
    check(lib, torch.randn(1, 48).bfloat16().expand(4, -1), torch.randn(1, 48).bfloat16().expand(20, -1))


@pytest.mark.parametrize("dtype", (BF16, FP32))
def test_infinities_and_nan_stay_in_their_rows(lib, dtype):
    x, weight = torch.randn(4, 72).to(dtype), torch.randn(20, 72).to(dtype)
    x[1, 3], weight[5, 7], weight[6, 0] = float("nan"), float("inf"), float("nan")
    (y,) = launch(lib, x, weight)
    want = F.linear(x.float(), weight.float())
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())


def test_wrong_arguments_are_refused(lib):
    x, weight = torch.randn(2, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    for wrong in (
        lambda: launch(lib, torch.randn(9, 64).bfloat16(), weight),
        lambda: launch(lib, x, weight[:0]),
        lambda: launch(lib, x.float(), weight.float(), splits=2),  # only tensor cores divide columns
        lambda: launch(lib, torch.randn(8, 1 << 13).bfloat16(), torch.randn(1, 1 << 13).bfloat16()),  # more x than fits
    ):
        with pytest.raises(HostError, match="returned 1: no report"):
            wrong()


@pytest.mark.parametrize("multiprocessors", (1, 132))
@pytest.mark.parametrize("rows", (1, 8))
def test_the_widest_x_is_divided_among_blocks_that_a_grid_has_and_fits_into_each(lib, rows, multiprocessors):
    x, weight = torch.empty(rows, _MOST_COLUMNS, dtype=BF16, device="meta"), torch.empty(1, dtype=BF16)
    args = lib._argument("args", {
        "x": None, "weight": In(weight), "scale": None, "zero": None, "bias": None, "y": None, "partial": None, "rows": rows,
        "columns": x.shape[1], "outputs": 17, "weight_stride": 2 * x.shape[1], "x_rows": (1, x.shape[1], 0),
        "x_dtype": c_int32(DTYPES[BF16]), "scale_dtype": c_int32(0), "bias_dtype": c_int32(0), "bits": c_int32(16),
        "group_size": c_int32(0), "splits": c_int32(0),
    })  # fmt: skip
    splits = lib._dll.fastlm_linear_splits(args, c_int32(multiprocessors))
    assert 1 < splits <= 65535 and -(-x.shape[1] // splits) * 2 * rows < 96 << 10


@pytest.mark.usefixtures("cuda_on_the_host")
def test_other_dtypes_are_a_reason():
    x = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="its kernels take float32, bfloat16, float16, got float64"):
        ops.linear(x, x, backend="cuda")


@pytest.mark.usefixtures("cuda_on_the_host")
def test_wider_x_is_a_reason():
    x = torch.empty(1, _MOST_COLUMNS + 1, device="meta")
    with pytest.raises(ValueError, match=r"1 to 2\^28 columns"):
        ops.linear(x, x, backend="cuda")


@pytest.mark.usefixtures("cuda_on_the_host")
def test_contract():
    check_op(case_of(), "cuda", "cpu")


@pytest.mark.usefixtures("cuda_on_the_host")
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
@pytest.mark.parametrize("N, K", ((19, 45), (19, 1600)))
def test_accuracy(N, K, dtype):
    """1600 columns: divided among blocks."""
    check_accuracy(case_of(5, N, K), "cuda", dtype, "cpu")
    check_guards(case_of(5, N, K), "cuda", "cpu")


@pytest.mark.usefixtures("cuda_on_the_host")
def test_x_that_is_larger_than_shared_memory_is_divided():
    """Eight rows of 272 kB in all: among four blocks, of which each has as much as it may."""
    x, weight = torch.randn(8, 17000).bfloat16(), torch.randn(3, 17000).bfloat16()
    assert_accurate(ops.linear(x, weight, backend="cuda"), F.linear(x.double(), weight.double()), F.linear(x, weight))


@pytest.mark.usefixtures("cuda_on_the_host")
def test_wrong_calls_are_refused_before_memory_is_touched():
    x, call = torch.randn(2, 8), torch.ops.fastlm_host.linear_fwd
    for args, words in (
        ((x, torch.randn(4, 7), None), r"x must be \[..., K\] and weight \[N, K\]"),
        ((x, torch.randn(4, 8).half(), None), "weight must have x's dtype"),
        ((x, torch.randn(4, 8), torch.randn(3)), r"bias must be \[4\]"),
        ((torch.randn(9, 8), torch.randn(4, 8), None), "at most 8 rows"),
        ((x.double(), torch.randn(4, 8).double(), None), "x must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call(*args)
    assert ops.linear(torch.randn(0, 8), torch.randn(4, 8), backend="cuda").shape == (0, 4)


@pytest.mark.gpu
def test_on_a_gpu():
    """As for decoding, with columns divided among blocks and not."""
    if reason := _cuda.unavailable():
        pytest.skip(reason)
    check_op(case_of(), "cuda", "cuda")
    for rows, N, K in ((1, 4096, 4096), (8, 1000, 4096), (5, 14336, 520), (3, 19, 45)):
        for dtype in (BF16, FP16, FP32):
            check_accuracy(case_of(rows, N, K), "cuda", dtype, "cuda")
