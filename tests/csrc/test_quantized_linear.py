"""csrc/quantized_linear.cu on the host body of the device layer, against the weight dequantised by the contract in fp64; and the
op's backend "cuda" with it."""

import re
import subprocess
from ctypes import c_int32

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.ops import _cuda
from fastlm.ops.quantize import QuantizedWeight, pack_int4, quantize_weight
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
)
from tests.ops.test_quantized_linear import FORMATS, _case, dequantized
from tests.wheels import build_library

pytestmark = needs_compiler
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def lib():
    return library("csrc/quantized_linear.cu")


def launch(lib, x, q, bias=None, splits=1, order="forward"):
    """y of the launcher; Python's side of csrc/bindings/quantized_linear.cpp."""
    M, N = x.shape[0], q.codes.shape[0]
    y = torch.full((M, N), float("nan"), dtype=x.dtype)
    partial = torch.empty(splits, M, N) if splits > 1 else None
    lib.run("fastlm_quantized_linear_fwd", {
        "x": In(x), "weight": In(q.codes), "scale": In(q.scale), "zero": In(q.zero), "bias": In(bias), "y": Out(y),
        "partial": Out(partial), "rows": M, "columns": x.shape[1], "outputs": N, "weight_stride": q.codes.stride(0),
        "x_rows": (1, x.stride(0), 0), "x_dtype": c_int32(DTYPES[x.dtype]), "scale_dtype": c_int32(DTYPES[q.scale.dtype]),
        "bias_dtype": c_int32(0 if bias is None else DTYPES[bias.dtype]), "bits": c_int32(q.bits),
        "group_size": c_int32(q.group_size or 0), "splits": c_int32(splits),
    }, order=order)  # fmt: skip
    return (y,)


def check(lib, M, N, K, bits, group, zero, dtype, bias=None, splits=1, scale_dtype=FP32):
    q = quantize_weight(torch.randn(N, K) + 0.3 * zero, bits, group, symmetric=not zero, scale_dtype=scale_dtype)
    x, bias = torch.randn(M, K).to(dtype), None if bias is None else torch.randn(N).to(bias)
    (y,) = same_in_all_orders(lambda order: launch(lib, x, q, bias, splits, order))
    exact = F.linear(x.double(), dequantized(q, torch.float64), None if bias is None else bias.double())
    assert_accurate(y, exact, F.linear(x, dequantized(q, dtype), None if bias is None else bias.to(dtype)))


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("zero", (False, True))
@pytest.mark.parametrize("bits, group", ((8, None), (8, 32), (8, 64), (8, 128), (4, 32), (4, 64), (4, 128)))
def test_formats(lib, bits, group, zero, dtype):
    """Three tiles of outputs, the last of them short; three steps of columns and part of a fourth."""
    check(lib, 3, 37, 3 * 512 // bits + 16, bits, group, zero, dtype, bias=FP32 if zero else None)


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("bits, group", ((8, None), (4, 32), (4, 128)))
def test_rows(lib, bits, group, rows):
    """Each has its own arrangement of a block's warps."""
    check(lib, rows, 150, 150 if bits == 4 else 160, bits, group, rows % 2 == 0, BF16, bias=BF16)


@pytest.mark.parametrize("bits, group, N, K", ((8, None, 1, 1), (8, None, 5, 45), (8, 32, 19, 45), (8, 128, 3, 300),
                                               (4, 32, 5, 1), (4, 64, 19, 70), (4, 128, 9, 129)))  # fmt: skip
@pytest.mark.parametrize("dtype", (BF16, FP32))
def test_odd_sizes(lib, bits, group, N, K, dtype):
    """int8 rows that are not whole vectors, and last groups that are short; fp32 has no tensor cores."""
    check(lib, 2, N, K, bits, group, True, dtype)
    check(lib, 5, N, K, bits, group, False, dtype, bias=FP32)


@pytest.mark.parametrize("rows", (1, 4, 8))
@pytest.mark.parametrize("bits, group", ((8, None), (8, 64), (4, 32)))
def test_fp32(lib, bits, group, rows):
    check(lib, rows, 19, 160, bits, group, rows == 4, FP32, bias=FP32)


@pytest.mark.parametrize("splits", (2, 3, 7))
@pytest.mark.parametrize("bits, group", ((8, None), (4, 64)))
def test_columns_divided_among_blocks(lib, bits, group, splits):
    """A last share that is short, or that has nothing."""
    check(lib, 3, 20, 1024, bits, group, True, BF16, FP32, splits)


@pytest.mark.parametrize("scale_dtype", (BF16, FP32))
@pytest.mark.parametrize("bias", (BF16, FP16, FP32))
def test_dtypes_of_scales_and_bias(lib, scale_dtype, bias):
    check(lib, 2, 17, 96, 4, 32, True, FP16, bias, scale_dtype=scale_dtype)
    check(lib, 2, 17, 96, 8, None, True, BF16, bias, splits=2, scale_dtype=scale_dtype)


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("bits, group", ((8, None), (8, 32), (4, 32), (4, 128)))
def test_codes_less_their_zero_points_are_exact(lib, bits, group, dtype):
    """Every zero point there is, against every code: rows of x with a single 1 take weights out one by one."""
    N, K = 256, 256
    low = -128 if bits == 8 else 0
    kind, generator = torch.int8 if bits == 8 else torch.uint8, torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randperm(K, generator=generator) % (1 << bits) + low for _ in range(N)]).to(kind)
    zero = (torch.arange(N) + low).to(kind)
    scale = torch.ones(N) if group is None else torch.ones(N, K // group)
    q = QuantizedWeight(codes if bits == 8 else pack_int4(codes, group), scale,
                        zero if group is None else zero[:, None].expand(N, K // group).contiguous(), bits, group, K)  # fmt: skip
    for first in (0, 40, 120, 248):
        x = torch.zeros(8, K, dtype=dtype)
        x[torch.arange(8), torch.arange(first, first + 8)] = 1
        (y,) = launch(lib, x, q)
        assert torch.equal(y.t().int(), codes[:, first : first + 8].int() - zero.int()[:, None])


def test_wrong_arguments_are_refused(lib):
    q, x = quantize_weight(torch.randn(8, 64), 4, 32), torch.randn(2, 64).bfloat16()
    for wrong in (
        lambda: launch(lib, torch.randn(9, 64).bfloat16(), q),
        lambda: launch(lib, x, q._replace(group_size=16)),
        lambda: launch(lib, x, q._replace(group_size=None)),
        lambda: launch(lib, x, q._replace(bits=16)),
        lambda: launch(lib, x.float(), q, splits=2),
    ):
        with pytest.raises(HostError, match="returned 1: no report"):
            wrong()
    with pytest.raises(HostError, match="out of bounds: read of bytes 56 to 59 of buffer 'scale'"):
        launch(lib, x, q._replace(scale=q.scale[:7]))


# --- mistakes ---------------------------------------------------------------------------------------------------------

HEADERS = ("few_rows.h", *(f"few_rows_{part}.h" for part in ("plain", "mma", "operands", "numbers")))
# A way of scaling and bits -> mistake -> the text in one of these and what stands in its place.
BUGS = {
    ("small", 4, 32): {
        "a shuffle that half of the warp leaves out": ("odd ? w[i] : w[i + 1], 1)", "odd ? w[i] : w[i + 1], 1, 0x0000ffff)"),
        "a shuffle with another neighbour": ("upper ? w[i] : w[i + 2], 2)", "upper ? w[i] : w[i + 2], 1)"),
        "the scale of the next group": ("(minimum(unit, units - 1) >> g", "(minimum(unit + 1, units - 1) >> g"),
        "the zero point of the first group": ("shuffle(zero[0], word, kAllLanes, 4)", "shuffle(zero[0], 0, kAllLanes, 4)"),
        "halves of bytes exchanged": ("(word >> 4 * half, 0x000f000f", "(word >> (4 - 4 * half), 0x000f000f"),
        "x as if pairs were neighbours": ("BITS == 4 ? j / 4 * 4 + j % 4 / 2 + j % 2 * 2 : j", "j"),
    },
    ("wide", 8, 64): {
        "no barrier after x": ("  block_barrier();\n  const Shared<const X> mine", "  const Shared<const X> mine"),
        "no barrier before the sums are read": ("  block_barrier();\n  const int width", "  const int width"),
        "a step too far": ("w.fetch(step + d + kDepth, end", "w.fetch(step + d + kDepth + 1, end"),
        "the scale of lanes past the end": ("if (step < end) {", "if (live) {"),
        "rows past the end are stored": ("if (n >= a.outputs) continue;", ""),
        "the last share is left out": ("s < a.splits; ++s", "s < a.splits - 1; ++s"),
        "x past its end": ("if (column + j < a.columns) v", "v"),
    },
    ("none", 8, None): {
        "codes without their sign": ("bitwise<kTake>(low, 0x00800080, kMagic)", "kMagic"),
        "the weight past its end": ("step < end && unit < units", "step < end"),
        "another row's zero point": ("load_zero<BITS>(a, row[r])", "load_zero<BITS>(a, row[0])"),
    },
}  # fmt: skip
LAUNCHER = """#include "few_rows.h"

extern "C" int fastlm_quantized_linear_fwd(const fastlm_linear* args, void* stream) {
  return few_rows::start_tiles<device::bf16, %d, few_rows::Groups::%s>(*args, stream);
}
"""


@pytest.fixture(scope="module")
def with_bug(tmp_path_factory):
    found = {}
    for (scaling, bits, _), bugs in BUGS.items():
        folder = tmp_path_factory.mktemp(scaling)
        (folder / "one.cu").write_text(LAUNCHER % (bits, scaling), encoding="utf-8")
        found |= planted(str(folder / "one.cu"), bugs, folder, HEADERS)
    return found


@pytest.mark.parametrize("form, name", [(form, name) for form, bugs in BUGS.items() for name in bugs])
def test_planted_bug_is_seen(form, name, with_bug):
    scaling, bits, group = form
    with pytest.raises((AssertionError, HostError)):
        check(with_bug[name], 3, 37, 1040, bits, group, True, BF16)
        check(with_bug[name], 3, 37, 1040, bits, group, False, BF16, splits=2)


# --- the op -----------------------------------------------------------------------------------------------------------


def small(name):
    """Of so few outputs that the second derivatives of the reference in fp32 are known to better than what is asked of ours."""
    return _case(name, sizes=(5, 100))


@pytest.mark.usefixtures("cuda_on_the_host")
@pytest.mark.parametrize("name", ("int8", "int4-32"))
def test_contract(name):
    check_op(small(name), "cuda", "cpu")


@pytest.mark.usefixtures("cuda_on_the_host")
@pytest.mark.parametrize("name", FORMATS)
def test_accuracy(name):
    for dtype in (BF16, FP16, FP32):
        check_accuracy(_case(name, 1), "cuda", dtype, "cpu")
        check_accuracy(_case(name, 8, sizes=(40, 544)), "cuda", dtype, "cpu")  # columns divided among blocks
    check_guards(_case(name, 2), "cuda", "cpu")


@pytest.mark.usefixtures("cuda_on_the_host")
@pytest.mark.parametrize("dtype", (BF16, FP32))
def test_tensors_at_any_strides(dtype):
    q, x = quantize_weight(torch.randn(20, 70), 4, 32, symmetric=False), torch.randn(3, 70).to(dtype)

    def run(x, *parts):
        return ops.quantized_linear(x, *parts, bits=4, group_size=32, backend="cuda")

    want = run(x, q.codes, q.scale, q.zero)
    for turn in (lambda t: t.t().contiguous().t(), lambda t: torch.cat((t, t), 1)[:, : t.shape[1]]):
        torch.testing.assert_close(run(turn(x), turn(q.codes), turn(q.scale), turn(q.zero)), want)
    torch.testing.assert_close(run(x[None, :, None], q.codes, q.scale, q.zero), want[None, :, None])


@pytest.mark.usefixtures("cuda_on_the_host")
def test_wrong_calls_are_refused_before_memory_is_touched():
    q, x, call = quantize_weight(torch.randn(6, 40), 8), torch.randn(2, 40), torch.ops.fastlm_host.quantized_linear_fwd
    for args, words in (
        ((x, q.codes, q.scale, None, None, 8, 16), "bits must be 8 or 4 and group_size"),
        ((x, q.codes[:, :39], q.scale, None, None, 8, 0), "codes do not fit"),
        ((x, q.codes.byte(), q.scale, None, None, 8, 0), "codes must be int8"),
        ((x, q.codes, q.scale[:5], None, None, 8, 0), "scale must have one number for each row"),
        ((x, q.codes, q.scale, q.codes[:5, 0], None, 8, 0), "zero must be like scale"),
        ((x, q.codes, q.scale.double(), None, None, 8, 0), "scale must be float32"),
        ((torch.randn(9, 40), q.codes, q.scale, None, None, 8, 0), "at most 8 rows"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call(*args)


def test_more_rows_are_a_reason_and_auto_takes_what_was_measured(monkeypatch):
    monkeypatch.setattr(_cuda, "_asked", {"reason": None})
    meta = [t.to("meta") for t in quantize_weight(torch.randn(6, 40), 8)[:2]]
    with pytest.raises(ValueError, match="backend 'cuda' cannot serve this call: it takes at most 8 rows of x, got 9"):
        ops.quantized_linear(torch.empty(3, 3, 40, device="meta"), *meta, backend="cuda")
    few = ops.explain(ops.quantized_linear, torch.empty(2, 4, 40, device="meta"), *meta, backend="cuda")
    assert few.backend == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu(name):
    """As for decoding, with columns divided among blocks and not."""
    if reason := _cuda.unavailable():
        pytest.skip(reason)
    check_op(small(name), "cuda", "cuda")
    for rows, sizes in ((1, (4096, 4096)), (8, (1000, 4096)), (5, (14336, 544)), (3, (19, 45))):
        for dtype in (BF16, FP16, FP32):
            check_accuracy(_case(name, rows, sizes=sizes), "cuda", dtype, "cuda")


@needs_nvcc
def test_weights_are_read_in_16_bytes_four_steps_ahead(tmp_path):
    """Two rows of a step in each load; four steps before the loop, and four in it. x goes to shared memory in 16 bytes, by
    instructions of shared memory."""
    ptx = tmp_path / "quantized_linear.ptx"
    subprocess.run([build_library.find_nvcc(), "-std=c++20", "-O3", "-I", CSRC, "-arch=sm_80", "-ptx",
                    CSRC / "quantized_linear.cu", "-o", ptx], check=True, capture_output=True)  # fmt: skip
    kernels = [text for text in re.split(r"\.entry ", ptx.read_text())[1:] if "few_rows_kernel" in text.split("(")[0]]
    assert len(kernels) == 10
    for text in kernels:
        assert re.findall(r"\bld\.global\.cs(\S*)", text) == [".v4.u32"] * 16
        assert len(re.findall(r"\bmma\.sync", text)) in (16, 32)
        assert re.findall(r"\bst(\S*\.v\d\S*)", text) == [".shared.v2.u64"] * 5
