"""quantized_linear: the contract, the accuracy against a weight dequantised independently, planted bugs, torch's int8 forms."""

import ast
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.ops import _native, quantized_cpu
from fastlm.ops.quantize import quantize_weight
from fastlm.testing import (
    Case,
    assert_accurate,
    check_accuracy,
    check_guards,
    check_op,
    check_reference,
    check_safety,
    check_strides,
    planted_bug,
)

BACKENDS = ("torch", "triton")
OP = sys.modules["fastlm.ops.quantized_linear"].OP  # the name fastlm.ops.quantized_linear is the function's
# bits, group_size, with zero points, with a bias
FORMATS = {
    "int8": (8, None, False, True),
    "int8-zero": (8, None, True, False),
    "int8-32": (8, 32, False, False),
    "int8-64-zero": (8, 64, True, True),
    "int4-32": (4, 32, False, True),
    "int4-64": (4, 64, False, False),
    "int4-128-zero": (4, 128, True, True),
}
SIZES = {"int8": (19, 45), "int8-zero": (19, 40), "int8-32": (17, 96), "int8-64-zero": (5, 100), "int4-32": (19, 70),
         "int4-64": (16, 128), "int4-128-zero": (18, 140)}  # fmt: skip


def quantized(bits, group, zero, N, K):
    generator = torch.Generator().manual_seed(N + K)
    return quantize_weight(torch.randn(N, K, generator=generator) + 0.3 * zero, bits, group, symmetric=not zero)


def dequantized(q, dtype):
    """The weight in dtype, element by element from the contract, with no function of ours."""
    if q.bits == 4:
        half = q.group_size // 2
        parts = [p for g in q.codes.split(half, 1) for p in (g % 16, g // 16)]
        codes, middle = torch.cat(parts, 1)[:, : q.columns].double(), 8.0
    else:
        codes, middle = q.codes.double(), 0.0
    group = torch.arange(q.columns) // (q.group_size or max(1, q.columns))
    if q.zero is not None:
        middle = q.zero.double().reshape(len(codes), -1)[:, group]
    return (q.scale.double().reshape(len(codes), -1)[:, group] * (codes - middle)).to(dtype)


def _case(name, rows=5, sizes=None):
    """x [rows, K] and a bias; the weight is a constant of the case."""
    bits, group, zero, bias = FORMATS[name]
    N, K = sizes or SIZES[name]

    def case_of(N, K):
        q = quantized(bits, group, zero, N, K)

        def fn(x, b=None, backend="auto"):
            q_ = [None if t is None else t.to(x.device) for t in (q.codes, q.scale, q.zero)]
            return ops.quantized_linear(x, *q_, b, bits=bits, group_size=group, backend=backend)

        def plain(x, b=None):
            return F.linear(x, dequantized(q, x.dtype).to(x.device), b)

        return fn, plain

    def make(lead, N, K):
        def args(dtype, device):
            shapes = [(*lead, K), *([(N,)] if bias else [])]
            return tuple(torch.randn(s, dtype=torch.float64).to(dtype).to(device) for s in shapes)

        return args

    fn, plain = case_of(N, K)
    return Case(
        "quantized_linear",
        fn,
        make((rows,), N, K),
        make((1,), N, K),
        plain=plain,
        autocast="cast",
        empty=make((0,), N, K),
    )


ALL = pytest.mark.parametrize("name", FORMATS)


@ALL
def test_reference(name):
    check_reference(_case(name))


@pytest.mark.parametrize(
    "backend, name", [("torch", "int8"), ("triton", "int8"), ("triton", "int8-64-zero"), ("triton", "int4-32")]
)
def test_contract(name, backend, device):
    check_op(_case(name), backend, device)


@ALL
@pytest.mark.parametrize("rows", [1, 3, 17, 65])
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(name, backend, rows, device):
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if rows == 3 or backend == "torch" else (torch.bfloat16,)
    for dtype in dtypes:
        check_accuracy(_case(name, rows), backend, dtype, device)


@pytest.mark.parametrize("name, rows", [("int8", 1), ("int8-32", 3), ("int4-32", 1), ("int4-64", 3)])
def test_columns_divided_among_programs(name, rows, device):
    """Long rows of few outputs: partial sums and the second pass."""
    kernels = pytest.importorskip("fastlm.kernels.quantized_linear")
    assert kernels._splits(2, 4, torch.device("cpu")) == 2
    case = _case(name, rows, sizes=(9, 520))
    check_accuracy(case, "triton", torch.float32, device)
    check_guards(case, "triton", device)
    check_safety(case, "triton", device)
    check_accuracy(_case(name, rows, sizes=(9, 512)), "triton", torch.float32, device)


def test_whole_blocks_of_partial_sums(device):
    check_accuracy(_case("int8-32", 4, sizes=(256, 256)), "triton", torch.float32, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_scales_and_zeros_at_any_strides(backend, device):
    q = quantized(4, 32, True, 20, 70)
    x = torch.randn(3, 70, device=device)
    codes, scale, zero = (t.to(device) for t in (q.codes, q.scale, q.zero))
    want = ops.quantized_linear(x, codes, scale, zero, bits=4, group_size=32, backend="reference")
    for turn in (lambda t: t.t().contiguous().t(), lambda t: torch.cat((t, t), 1)[:, : t.shape[1]]):
        got = ops.quantized_linear(x, turn(codes), turn(scale), turn(zero), bits=4, group_size=32, backend=backend)
        torch.testing.assert_close(got, want)
    rows = torch.randn(6, 70, device=device)[::2]
    got = ops.quantized_linear(rows, codes, scale, zero, bits=4, group_size=32, backend=backend)
    torch.testing.assert_close(got, ops.quantized_linear(rows.clone(), codes, scale, zero, bits=4, group_size=32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weight_is_a_constant_and_x_is_not_kept(backend, device):
    q = quantized(8, None, False, 12, 40)
    x, bias = torch.randn(4, 40, device=device, requires_grad=True), torch.randn(12, device=device, requires_grad=True)
    scale = q.scale.to(device).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.quantized_linear(x, q.codes.to(device), scale, None, bias, backend=backend)
    assert all(t.data_ptr() != x.data_ptr() for t in saved)
    grads = torch.autograd.grad(y.sum(), (x, bias, scale), allow_unused=True)
    assert grads[0].shape == x.shape and grads[2] is None
    torch.testing.assert_close(grads[1], torch.full_like(bias, 4.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend, device):
    q = quantized(8, None, False, 12, 40)
    x, bias = torch.randn(4, 40, device=device), torch.randn(12, device=device, requires_grad=True)
    args = q.codes.to(device), q.scale.to(device), None
    y = ops.quantized_linear(x, *args, bias, backend=backend)
    (db,) = torch.autograd.grad(y.sum(), bias)
    torch.testing.assert_close(db, torch.full_like(bias, 4.0))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(ops.quantized_linear(x, *args, bias.detach(), backend=backend).sum(), x)
    torch.testing.assert_close(dx, dequantized(q, torch.float32).sum(0).expand(4, 40).to(device))


@pytest.fixture
def _digits(monkeypatch):
    if not _native.int8_products_are_exact():
        pytest.skip("this CPU's int8 products saturate")
    monkeypatch.setattr(quantized_cpu, "_SMALL", 0)


@pytest.mark.usefixtures("_digits")
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_digits_are_as_accurate_as_a_product_in_the_dtype(rows, dtype):
    case = _case("int8", rows, sizes=(96, 200))
    with torch.no_grad():
        check_accuracy(case, "torch", dtype, "cpu")
    check_safety(case, "torch", "cpu")
    check_strides(case, "torch", "cpu")
    check_guards(case, "torch", "cpu")


@pytest.mark.parametrize("columns", [32, 40, 45, 64])
@pytest.mark.parametrize("rows", [1, 3, 16, 17])
def test_bf16_products_stay_inside_their_tensors(rows, columns):
    case = _case("int8", rows, sizes=(19, columns))
    with torch.no_grad():
        check_accuracy(case, "torch", torch.bfloat16, "cpu")


@pytest.mark.usefixtures("_digits")
@pytest.mark.parametrize("large", [0, 1 << 40])
def test_digits_row_by_row_and_at_once_are_the_same_bits(large, monkeypatch):
    monkeypatch.setattr(quantized_cpu, "_LARGE", large)
    q = quantized(8, None, False, 50, 64)
    x = torch.randn(3, 64)
    got = quantized_cpu.few_rows_product(x, q.codes, q.scale, None, None, 8, 0)
    alone = [quantized_cpu.few_rows_product(row, q.codes, q.scale, None, None, 8, 0) for row in x]
    torch.testing.assert_close(got, torch.stack(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_digits")
def test_digits_of_rows_of_all_magnitudes():
    """Outliers, zeros, the smallest and largest numbers: each row is scaled to its own."""
    q = quantized(8, None, False, 40, 128)
    x = torch.randn(8, 128)
    x[1] = 0
    x[2] *= 1e-30
    x[3] *= 1e33
    x[4, 7] = 3e4
    x[5] *= 1e-38
    x[6] = x[6].sign() * 127
    weight = dequantized(q, torch.float64)
    got = quantized_cpu.few_rows_product(x, q.codes, q.scale, None, None, 8, 0)
    for i in range(8):
        assert_accurate(got[i], x[i].double() @ weight.t(), x[i] @ weight.float().t(), f"row {i}")
    x[0, 3] = torch.nan
    x[7, 3] = torch.inf
    got = quantized_cpu.few_rows_product(x, q.codes, q.scale, None, None, 8, 0)
    assert got[0].isnan().all() and torch.equal(got[7], (x[7:] @ weight.float().t())[0]) and got[1:7].isfinite().all()


@pytest.mark.usefixtures("_digits")
@pytest.mark.parametrize("small", [0, 1 << 30], ids=["digits", "by_codes"])
@pytest.mark.parametrize("bias", [False, True])
def test_sums_of_codes_beyond_fp32_and_infinite_inputs(bias, small, monkeypatch):
    monkeypatch.setattr(quantized_cpu, "_SMALL", small)
    q, x, b = quantized(8, None, False, 40, 64), torch.randn(3, 64), torch.randn(40) if bias else None
    scale, weight = torch.full((40,), 1e-5), 1e-5 * q.codes.double()
    x[1] = 1e37
    x[2, 5] = torch.inf
    q.codes[:3, 5] = 0
    weight[:3, 5] = 0
    with torch.no_grad():
        got = ops.quantized_linear(x, q.codes, scale, None, b)
    want = F.linear(x.double(), weight, None if b is None else b.double())
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf()) and want[2].isinf().any()
    torch.testing.assert_close(got[:2].double(), want[:2], rtol=1e-5, atol=1e-6 * 1e37 * 1e-5 * 127 * 8)


@pytest.mark.usefixtures("_digits")
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_codes_of_zero_strides_and_single_columns(rows):
    generator = torch.Generator().manual_seed(0)
    repeated = torch.randint(1, 100, (512,), dtype=torch.int8, generator=generator).expand(512, -1)
    overlapping = repeated[0].as_strided((200, 300), (1, 1))
    column, row = repeated[0].view(512, 1), repeated[:1]
    for codes in (repeated, repeated.t(), overlapping, column, row, column.as_strided((512, 1), (1, 1))):
        x, scale = torch.randn(rows, codes.shape[1]), torch.rand(len(codes))
        want = F.linear(x.double(), scale.double()[:, None] * codes.double())
        with torch.no_grad():
            got = ops.quantized_linear(x, codes, scale)
        assert_accurate(got, want, F.linear(x, scale[:, None] * codes.float()))


@pytest.mark.parametrize("small", [0, 1 << 30], ids=["digits", "by_codes"])
@pytest.mark.parametrize("rows", [1, 17])
def test_a_bias_that_cancels_a_bf16_sum(rows, small, monkeypatch):
    """W x = 8128 + 127 / 128; bf16 has steps of 32 there."""
    monkeypatch.setattr(quantized_cpu, "_SMALL", small)
    x = torch.ones(rows, 64, dtype=torch.bfloat16)
    x[:, 0] += 2**-7
    codes, bias = torch.full((32, 64), 127, dtype=torch.int8), torch.full((32,), -8128, dtype=torch.bfloat16)
    with torch.no_grad():
        y = ops.quantized_linear(x, codes, torch.ones(32), None, bias)
    assert (y == 127 / 128).all(), y


@pytest.mark.usefixtures("_digits")
def test_a_digit_less_is_seen(monkeypatch):
    monkeypatch.setattr(quantized_cpu, "_PLACES", quantized_cpu._PLACES * torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(AssertionError, match="max error"), torch.no_grad():
        check_accuracy(_case("int8", 4, sizes=(96, 200)), "torch", torch.float32, "cpu")


def test_cpus_whose_int8_products_saturate_dequantise(monkeypatch):
    monkeypatch.setattr(quantized_cpu, "_SMALL", 0)
    monkeypatch.setattr(quantized_cpu._native, "int8_products_are_exact", lambda: False)
    monkeypatch.setattr(quantized_cpu._native, "int8_product", lambda *a, **k: pytest.fail("called all the same"))
    with torch.no_grad():
        check_accuracy(_case("int8", 4), "torch", torch.float32, "cpu")


BUGS = {
    "nibble_order": ("int4-32", 3, "low = (codes & 15).to(tl.float32) - centre[None, :]",
                     "low = (codes >> 4).to(tl.float32) - centre[None, :]"),
    "nibble_order_of_one_row": ("int4-32", 1, "((codes & 15).to(tl.float32) * scale", "((codes >> 4).to(tl.float32) * scale"),
    "zero_sign": ("int8-64-zero", 3, "w -= centre[None, :]", "w += centre[None, :]"),
    "zero_sign_of_one_row": ("int8-zero", 1, "(codes.to(tl.float32) * scale - centre)",
                             "(codes.to(tl.float32) * scale + centre)"),
    "group": ("int8-32", 3, "where = row * groups + group\n            scale", "where = row * groups\n            scale"),
    "group_of_one_row": ("int4-32", 1, "group = block * COUNT + g\n", "group = block * COUNT + 0 * g\n"),
    "scale_of_wrong_row": ("int8", 3, "acc *= tl.load(scale_ptr + row)", "acc *= tl.load(scale_ptr + row // 2)"),
    "scale_of_wrong_row_of_one": ("int8", 1, "y *= tl.load(scale_ptr + row)", "y *= tl.load(scale_ptr + row // 2)"),
    "middle": ("int4-64", 3, "(8.0 if BITS == 4 else 0.0)", "0.0"),
    "gradient_group": ("int4-128-zero", 3, "k2 = k + GROUP // 2", "k2 = k + WIDTH"),
    "gradient_scale": ("int8", 3, "w = (codes.to(tl.float32) - centre) * scale", "w = codes.to(tl.float32) - centre"),
    "gradient_tail": ("int8", 3, "mask=n[None, :] < N, other=0.0)", "mask=n[None, :] < N - 1, other=0.0)"),
    "columns_tail": ("int8", 3, "mask=k[None, :] < K, other=0.0", "mask=k[None, :] < K - 1, other=0.0"),
    "output_tail": ("int8", 1, "tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)",
                    "tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N - 1)"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(bug, device):
    name, rows, old, new = BUGS[bug]
    case = _case(name, rows)
    wrong = pytest.raises(AssertionError, match="max error|unwritten|NaN or inf")
    with planted_bug("quantized_linear", old, new), wrong:
        check_accuracy(case, "triton", torch.float32, device)
        check_guards(case, "triton", device)  # an unwritten element may by chance hold what was right


def test_a_share_that_is_left_out_is_seen(device):
    bug = planted_bug("quantized_linear", "for split in range(splits):", "for split in range(splits - 1):")
    with bug, pytest.raises(AssertionError, match="max error"):
        check_accuracy(_case("int8", 1, sizes=(9, 520)), "triton", torch.float32, device)


def _parameters(path):
    """kernel -> (names of its parameters, those that Triton does not look at the values of), from the source."""
    found = {}
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list and "jit(" in ast.unparse(node.decorator_list[0]):
            (ignored,) = (ast.literal_eval(k.value) for k in node.decorator_list[0].keywords)
            found[node.name] = [a.arg for a in node.args.args], set(ignored)
    return found


def test_more_rows_compile_nothing_new(monkeypatch):
    kernels = pytest.importorskip("fastlm.kernels.quantized_linear")
    seen = defaultdict(set)

    def recorded(name, names, ignored):
        def launch(*args, **constants):
            numbers = [(n, a) for n, a in zip(names, args) if isinstance(a, int) and n not in ignored]
            key = [(n, a == 1, a % 16 == 0) for n, a in numbers]  # what Triton compiles anew for
            seen[name].add((*key, *sorted(constants.items())))

        return defaultdict(lambda: launch)

    for name, (names, ignored) in _parameters(kernels.__file__).items():
        monkeypatch.setattr(kernels, name, recorded(name, names, ignored))
    for bits, group in ((8, 0), (4, 32)):
        q = quantized(bits, group or None, False, 64, 512)
        seen.clear()
        for rows in (2, 3, 7, 8, 13, 16):
            kernels.quantized_linear_fwd(torch.randn(rows, 512), q.codes, q.scale, None, None, bits, group)
            kernels.quantized_linear_bwd(torch.randn(rows, 64), q.codes, q.scale, None, bits, group, 512)
        assert len(seen["_rows_kernel"]) == len(seen["_grad_kernel"]) == 1, seen
        assert len(seen["_combine_kernel"]) == 2  # whole blocks of sums, and not
        for rows in (17, 33, 48):
            kernels.quantized_linear_fwd(torch.randn(rows, 512), q.codes, q.scale, None, None, bits, group)
        assert len(seen["_rows_kernel"]) == 2, seen["_rows_kernel"]


def test_auto_takes_the_kernel_for_few_rows_only():
    few, many = torch.empty(4, 4, 64, device="meta"), torch.empty(17, 64, device="meta")
    assert OP._slower("triton", few) is None
    assert "more than 16 rows" in OP._slower("triton", many)


def test_errors():
    q, x = quantized(8, None, False, 6, 40), torch.randn(3, 40)
    with pytest.raises(ValueError, match=r"codes must be \[N, 41\] for x's last dimension 41 with bits=8"):
        ops.quantized_linear(torch.randn(3, 41), q.codes, q.scale)
    with pytest.raises(ValueError, match=r"scale must be \[6\], got \[5\]"):
        ops.quantized_linear(x, q.codes, q.scale[:5])
    with pytest.raises(ValueError, match=r"zero must be \[6\], got \[6, 1\]"):
        ops.quantized_linear(x, q.codes, q.scale, torch.zeros(6, 1, dtype=torch.int8))
    with pytest.raises(TypeError, match="zero must be torch.int8 for bits=8, got torch.uint8"):
        ops.quantized_linear(x, q.codes, q.scale, torch.zeros(6, dtype=torch.uint8))
    with pytest.raises(TypeError, match="codes must be torch.uint8 for bits=4, got torch.int8"):
        ops.quantized_linear(x, q.codes, q.scale, bits=4, group_size=32)
    with pytest.raises(
        ValueError, match="bits must be 8 or 4 and group_size 32, 64 or 128 .* got bits=4, group_size=None"
    ):
        ops.quantized_linear(x, q.codes, q.scale, bits=4)
    with pytest.raises(ValueError, match=r"bias must be \[6\] like the rows of codes, got \[7\]"):
        ops.quantized_linear(x, q.codes, q.scale, None, torch.randn(7))
    with pytest.raises(TypeError, match="x must be floating point, got torch.int64"):
        ops.quantized_linear(torch.ones(3, 40, dtype=torch.int64), q.codes, q.scale)
    with pytest.raises(TypeError, match="scale must be floating point"):
        ops.quantized_linear(x, q.codes, q.codes[:, 0])
    with pytest.raises(ValueError, match=r"x must be \[..., K\] and codes \[N, .\]"):
        ops.quantized_linear(x, q.codes[0], q.scale)
    with pytest.raises(ValueError, match="its kernels take float32, bfloat16, float16, got float64"):
        ops.quantized_linear(x.double(), q.codes, q.scale, backend="triton")
