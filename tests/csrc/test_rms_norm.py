"""csrc/rms_norm.cu on the host body of the device layer, against the reference of the op."""

from ctypes import c_float, c_int32, c_uint32

import pytest
import torch

from fastlm.ops.norm_reference import norm_reference
from fastlm.testing import assert_accurate
from tests.csrc.host_library import DTYPES, HostError, In, Out, library, needs_compiler, planted, same_in_all_orders

pytestmark = needs_compiler
SOURCE = "csrc/rms_norm.cu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS, P, SEED = 1e-5, 0.3, (11, 5)


def random(shape, dtype, mean=0.0):
    return (mean + torch.randn(shape, dtype=torch.float64)).to(dtype)


def rows_of(x):
    """(inner, outer stride, inner stride) of a tensor [..., N] of two or three dimensions."""
    return (1, x.stride(0), 0) if x.ndim == 2 else (x.shape[1], x.stride(0), x.stride(1))


def launch(lib, x, weight=None, bias=None, residual=None, *, offset=0.0, llama=False, p=0.0, order="forward"):
    """y, residual_out or None, rstd of the launcher; Python's side of csrc/bindings/rms_norm.cpp."""
    parameter = weight if weight is not None else bias
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=FP32)
    residual_out = None if residual is None else residual.new_empty(x.shape)
    lib.run("fastlm_rms_norm_fwd", {
        "x": In(x), "weight": In(weight), "bias": In(bias), "residual": In(residual),
        "seed": In(torch.tensor(SEED) if p else None), "y": Out(y), "residual_out": Out(residual_out), "rstd": Out(rstd),
        "rows": x.numel() // x.shape[-1], "columns": x.shape[-1],
        "x_rows": rows_of(x), "residual_rows": rows_of(x if residual is None else residual),
        "x_dtype": c_int32(DTYPES[x.dtype]), "parameter_dtype": c_int32(DTYPES[(x if parameter is None else parameter).dtype]),
        "residual_dtype": c_int32(DTYPES[(x if residual is None else residual).dtype]), "round_first": c_int32(llama),
        "eps": EPS, "weight_offset": offset, "threshold": c_uint32(int(p * 2**32)), "grown": c_float(1 / (1 - p)),
    }, order=order)  # fmt: skip
    return y, residual_out, rstd


def reference(x, weight, bias, residual, dtype=None, *, offset=0.0, llama=False, p=0.0):
    """(y, residual_out or None); computed in `dtype`, or as the dtypes of the tensors have it."""
    x, weight, bias, residual = (t if t is None or dtype is None else t.to(dtype) for t in (x, weight, bias, residual))
    out = norm_reference(
        x, weight, bias, residual, torch.tensor(SEED) if p else None, EPS, offset, llama, p, centred=False
    )
    return out if residual is not None else (out, None)


def check(lib, x, weight=None, bias=None, residual=None, orders=False, **options):
    """Runs the launcher and compares all it writes with the reference."""
    args = (x, weight, bias, residual)
    if orders:
        found = same_in_all_orders(
            lambda order: [t for t in launch(lib, *args, order=order, **options) if t is not None]
        )
        y, residual_out, rstd = found if residual is not None else (found[0], None, found[1])
    else:
        y, residual_out, rstd = launch(lib, *args, **options)
    exact, plain = reference(*args, torch.float64, **options), reference(*args, **options)
    assert_accurate(y, exact[0], plain[0], "y")
    total = x.double()
    if residual is not None:
        assert_accurate(residual_out, exact[1], plain[1], "residual_out")
        total = residual_out.double()
    if residual is not None or not options.get("p"):
        want = (total.square().mean(-1) + EPS).rsqrt()
        torch.testing.assert_close(rstd.double(), want, rtol=1e-6, atol=0)


# A warp and a block to a row, rows too wide for registers, single elements: five rows make two blocks of the first.
SHAPES = {"warp": (5, 40), "block": (2, 1032), "wide": (1, 16392), "odd": (5, 37), "one": (3, 1), "odd_block": (2, 131)}


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_widths(dtype, shape):
    x, weight = random(shape, dtype), random(shape[-1:], dtype, 1.0)
    check(library(SOURCE), x, weight, orders=shape[1] < 200)


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
@pytest.mark.parametrize("shape", ((5, 40), (5, 37), (2, 1032)))
def test_features(dtype, shape):
    lib, x = library(SOURCE), random(shape, dtype)
    own, other = random(shape[-1:], dtype, 1.0), random(shape[-1:], dtype)
    residual = random(shape, dtype)
    check(lib, x)
    check(lib, x, own, other, offset=1.0)
    check(lib, x, own, llama=True)
    check(lib, x, own, None, residual)
    check(lib, x, own.float(), other.float(), residual, offset=1.0, llama=True)
    check(lib, x, None, other, residual.float())
    check(lib, x, own, p=P)
    check(lib, x, own.float(), None, residual.float(), p=P)


@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_rows_lie_anywhere(dtype):
    lib = library(SOURCE)
    weight = random((40,), dtype, 1.0)
    fused = random((3, 4, 120), dtype)
    check(
        lib, fused[:, 1:3, 40:80], weight, None, fused[:, :2, 80:], orders=True
    )  # heads of one product, at two strides
    check(lib, fused[:, 0, 1:41], weight, None, fused[:, 1, 3:43])  # no row begins at 16 bytes
    check(lib, fused[:1, 0, :40].expand(6, 40), weight)  # the same row again and again
    check(lib, random((3, 43), dtype)[:, :40], weight)  # only the first row begins at 16 bytes
    check(lib, fused[0, :, :40], random((41,), dtype, 1.0)[1:])  # the weight does not


def test_small_and_large_numbers():
    lib = library(SOURCE)
    y, _, rstd = launch(lib, torch.full((1, 64), 1e-30))
    assert rstd.item() == pytest.approx(EPS**-0.5) and y[0, 0].item() == pytest.approx(1e-30 * EPS**-0.5)
    y, _, _ = launch(lib, torch.full((1, 64), 300.0, dtype=FP16))  # squares are above fp16's range
    assert torch.equal(y, torch.ones_like(y))


def test_what_it_cannot_run_is_refused():
    lib = library(SOURCE)
    for x, residual in ((random((2, 8), FP32), random((2, 8), BF16)), (random((2, 8), BF16), random((2, 8), FP16))):
        with pytest.raises(HostError, match="returned 1"):
            launch(lib, x, None, None, residual)


BUGS = {
    "mean": ("sum / static_cast<float>(a.columns)", "sum / static_cast<float>(a.columns + VEC)"),
    "strides": ("row / at.inner * at.outer_stride", "row / at.inner * at.inner_stride"),
    "dropped rows": ("static_cast<uint32_t>(row), 0,", "0, 0,"),
    "tail": ("if (first + k * step < a.columns) r.result_at", "if (first + k * step + VEC < a.columns) r.result_at"),
    "reread": ("read<VEC, R>(Global<const R>(r.residual_out) + column, s)", "read<VEC, R>(r.residual + column, s)"),
    "alignment": ("aligned(a.x_rows, VEC)", "true"),
}


@pytest.fixture(scope="module")
def with_bug(tmp_path_factory):
    return planted(SOURCE, BUGS, tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_seen(name, with_bug):
    lib = with_bug[name]
    x, fused = random((5, 40), FP32), random((3, 4, 80), FP32)
    with pytest.raises((AssertionError, HostError)):
        check(lib, x)
        check(lib, fused[:, :2, :40])
        check(lib, x, p=P)
        check(lib, random((1, 8196), FP32), None, None, random((1, 8196), FP32))
        check(lib, random((3, 43), FP32)[:, :40])
