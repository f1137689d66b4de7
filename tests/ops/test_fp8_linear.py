"""fp8_linear: codes bit for bit, the product's accuracy, straight-through gradients, scales given and found, NaN, the contract.

torch's conversion to fp8 on the CPU is the yardstick of the codes. Triton's interpreter converts to fp8 wrongly (it cuts off
where it should round, and knows no NaN), so the kernel makes codes by integer arithmetic; its product of fp8 tiles is
right, but for codes of NaN: rows that have one have a scale of NaN.
"""

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.kernels import fp8_linear as steps
from fastlm.kernels import fp8_product
from fastlm.nn import Fp8Linear
from fastlm.ops.fp8_linear import OP
from fastlm.testing import (
    Case,
    assert_accurate,
    check_accuracy,
    check_autocast,
    check_compile,
    check_dispatcher,
    check_double_backward,
    check_guards,
    check_safety,
    check_strides,
    planted_bug,
)

BACKENDS = ("torch", "triton")
CODES = torch.float8_e4m3fn
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _make(bias, sizes=(2, 24, 18)):
    """x [2, S, D], weight [F, D] and a bias."""

    def make(dtype, device):
        S, D, rows = sizes
        shapes = [(2, S, D), (rows, D), *([(rows,)] if bias else [])]
        return tuple(torch.randn(s, dtype=torch.float64).to(dtype).to(device) for s in shapes)

    return make


def _case(bias, scaling):
    return Case(
        "fp8_linear",
        lambda *args, backend: ops.fp8_linear(*args, scaling=scaling, backend=backend),
        _make(bias),
        _make(bias, (2, 3, 4)),
        autocast="cast",
        empty=_make(bias, (0, 5, 4)),
    )


CASES = {"row": _case(True, "row"), "tensor": _case(False, "tensor")}
each_case = pytest.mark.parametrize("name", CASES)


@each_case
@each_backend
def test_contract(name, backend, device):
    case = CASES[name]
    shared = (check_autocast, check_compile, check_dispatcher, check_double_backward) if name == "row" else ()
    for check in (check_safety, check_guards, check_strides, *shared):
        check(case, backend, device)
    for sizes in ((0, 5, 4), (3, 0, 4), (3, 4, 0)):
        args = _make(name == "row", sizes)(torch.float32, device)
        assert torch.equal(case.fn(*args, backend=backend), case.fn(*args, backend="reference"))


@each_case
@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy(name, backend, dtype, device):
    check_accuracy(CASES[name], backend, dtype, device)


@each_backend
def test_gradients_are_those_of_the_product_that_is_not_rounded(backend, device):
    args = [t.requires_grad_() for t in _make(True)(torch.float32, device)]
    dy = torch.randn(2, 2, 18, device=device)
    for name in ("reference", backend):
        got = torch.autograd.grad(ops.fp8_linear(*args, backend=name), args, dy)
        want = torch.autograd.grad(F.linear(*args), args, dy)
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w)


@each_backend
def test_transforms_see_the_reference(backend, device):
    x, weight, bias = _make(True, (2, 3, 4))(torch.float32, device)
    total = lambda x: ops.fp8_linear(x, weight, bias, backend=backend).sin().sum()  # noqa: E731
    got = torch.func.vmap(torch.func.grad(total))(x)
    torch.testing.assert_close(got, torch.stack([torch.func.grad(total)(one) for one in x]))


def _edges():
    """Every value of e4m3, what lies midway between neighbours and just beside, what is too large or too small, NaN."""
    values = torch.arange(256, dtype=torch.uint8).view(CODES).float()
    known = values[values.isfinite()].unique()
    middle = (known[1:] + known[:-1]) / 2
    least = torch.tensor(2.0**-10)
    far = torch.tensor(
        [449.0, 464.0, 465.0, 1e9, float("inf"), -float("inf"), 1e-30, -1e-30, least, least * 1.01, -0.0]
    )
    return torch.cat([values, middle, middle * (1 + 2e-7), middle * (1 - 2e-7), far, torch.randn(500) * 40])


@each_backend
def test_codes_are_torchs_bit_for_bit(backend, device):
    module = steps if backend == "torch" else pytest.importorskip("fastlm.kernels.fp8_product")
    x = _edges()[None].to(device)
    codes, _ = module.quantize(x, False, torch.ones((), device=device))
    want = x.masked_fill(x.isinf(), torch.nan).clamp(-448, 448).to(CODES)
    assert torch.equal(codes[:, : x.shape[1]].view(torch.uint8), want.view(torch.uint8))
    values = torch.randn(5, 300, device=device) * torch.tensor([1e-20, 1e-3, 1.0, 1e4, 1e30], device=device)[:, None]
    values[1, 7:] = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        for by_row in (True, False):
            rows = values.to(dtype)
            codes, scale = module.quantize(rows, by_row)
            amax = rows.float().abs().amax(1 if by_row else None, keepdim=True).view(-1, 1).clamp(min=1e-12)
            assert torch.equal(scale, amax / torch.full_like(amax, 448))  # on a GPU torch does not divide by a number
            want = (rows.float() * (amax.reciprocal() * 448)).clamp(-448, 448).to(CODES)
            assert torch.equal(codes[:, :300].view(torch.uint8), want.view(torch.uint8))


def test_decoding_is_exact():
    codes = torch.arange(256, dtype=torch.uint8).view(CODES)
    for chosen in (codes, codes[~codes.float().isnan()], codes.view(16, 16).t()):  # with NaN, without, and strided
        for dtype in (torch.float32, torch.float64):
            got = steps.decoded(chosen, dtype)
            assert got.dtype == dtype
            torch.testing.assert_close(got, chosen.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_the_largest_of_each_row_is_448():
    codes, scale = ops.fp8_quantize(torch.randn(6, 30))
    assert (codes.float().abs().amax(1) == 448).all() and scale.shape == (6,)
    codes, scale = ops.fp8_quantize(torch.randn(6, 30), scaling="tensor")
    assert codes.float().abs().max() == 448 and scale.shape == ()
    assert torch.equal(ops.fp8_quantize(torch.zeros(2, 3))[0].float(), torch.zeros(2, 3))


@each_backend
@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_a_weight_in_codes(backend, scaling, device):
    x, weight, bias = _make(True)(torch.float32, device)
    codes, scale = ops.fp8_quantize(weight, scaling=scaling)
    want = ops.fp8_linear(x, weight, bias, scaling=scaling, backend=backend)
    for given in (codes, codes.t().contiguous().t()):
        x.requires_grad_()
        got = ops.fp8_linear(x, given, bias, scaling=scaling, weight_scale=scale, backend=backend)
        assert torch.equal(got, want)
        dy = torch.randn_like(got)
        dx = torch.autograd.grad(got, x, dy)[0]
        torch.testing.assert_close(dx, dy @ (codes.float() * scale.reshape(-1, 1)), rtol=1e-5, atol=1e-5)
    if scaling == "row":
        column = ops.fp8_linear(x, codes, bias, weight_scale=scale[:, None], backend=backend)
        assert torch.equal(column, want)


@each_backend
def test_a_scale_known_beforehand(backend, device):
    x, weight = _make(False)(torch.float32, device)
    amax = x.abs().max()
    same = ops.fp8_linear(x, weight, scaling="tensor", input_scale=amax / 448, backend=backend)
    want = ops.fp8_linear(x, weight, scaling="tensor", backend=backend)
    torch.testing.assert_close(
        same, want, rtol=1e-1, atol=2e-1
    )  # one ulp of the scale moves values over a rounding edge
    small = torch.tensor([amax.item() / 448 / 4], device=device)
    got = ops.fp8_linear(x, weight, scaling="tensor", input_scale=small, backend=backend)
    cut = ops.fp8_linear(x.clamp(-amax / 4, amax / 4), weight, scaling="tensor", input_scale=small, backend="reference")
    torch.testing.assert_close(got, cut, rtol=1e-5, atol=1e-5)


@each_backend
def test_nan_infinity_and_zeros(backend, device):
    x, weight, bias = _make(True)(torch.float32, device)
    clean = ops.fp8_linear(x, weight, bias, backend=backend)
    x[0, 0, 3], x[1, 1, 5], x[0, 1] = float("nan"), float("inf"), 0.0
    got = ops.fp8_linear(x, weight, bias, backend=backend)
    assert got[0, 0].isnan().all() and got[1, 1].isnan().all()
    torch.testing.assert_close(got[0, 1], bias, rtol=0, atol=0)
    assert torch.equal(got[1, 0], clean[1, 0])
    assert ops.fp8_linear(x, weight, bias, scaling="tensor", backend=backend).isnan().all()
    assert ops.fp8_linear(x, weight, bias, backend="reference").isnan().equal(got.isnan())


@each_backend
def test_infinity_beside_a_given_scale(backend, device):
    """It must not become 448: its row is NaN. Triton's interpreter cannot multiply codes of NaN, so there the codes are seen."""
    x, weight, bias = _make(True)(torch.float32, device)
    given = {"scaling": "tensor", "input_scale": torch.tensor([0.01], device=device)}
    x[1, 0, 4] = 3e38  # times 1 / 0.01 it is infinite, but it is not
    clean = ops.fp8_linear(x, weight, bias, **given, backend="reference")
    assert clean.isfinite().all()
    x[0, 0, 3], x[1, 1, 5], x[0, 1, 6] = float("inf"), -float("inf"), float("nan")
    rows = torch.tensor([[True, True], [False, True]], device=device)
    module = steps if backend == "torch" else fp8_product
    codes, _ = module.quantize(x.view(4, 24), False, given["input_scale"])
    assert codes[:, :24].float().isnan().equal(~x.view(4, 24).isfinite())
    for name in ("reference", backend) if backend == "torch" or device == "cuda" else ("reference",):
        got = ops.fp8_linear(x, weight, bias, **given, backend=name)
        assert got.isnan().equal(rows[..., None].expand_as(got)), name
        torch.testing.assert_close(got[~rows], clean[~rows], rtol=1e-5, atol=1e-3)


@each_backend
@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_gradients_beside_infinity(scaling, backend, device):
    x, weight, bias = (t.requires_grad_() for t in _make(True)(torch.float32, device))
    with torch.no_grad():
        x[0, 0, 3], x[1, 1, 5] = float("inf"), float("nan")
    dy, col = torch.randn(2, 2, 18, device=device), torch.arange(24, device=device)
    for name in ("reference", backend):
        y = ops.fp8_linear(x, weight, bias, scaling=scaling, backend=name)
        dx, dw, db = torch.autograd.grad(y, (x, weight, bias), dy)
        torch.testing.assert_close(dx, dy @ weight)
        assert dw.isfinite().all(0).equal(col.ne(3) & col.ne(5))
        torch.testing.assert_close(db, dy.sum((0, 1)))


def test_rows_below_1e_12_lose_their_codes(device):
    x = torch.full((3, 16), 1.0, device=device) * torch.tensor([[1e-12], [1e-17], [1e-18]], device=device)
    codes, scale = ops.fp8_quantize(x)
    error = (codes.float() * scale[:, None] / x - 1).abs().amax(1)
    assert error[0] < 1 / 16 < error[1] < 1 and error[2] == 1


@each_backend
def test_error_beside_bf16(backend, device):
    """The docstring's figures: 3.7 % of the root mean square for fp8, 0.3 % at most for bf16."""
    x, weight = torch.randn(32, 256, device=device), torch.randn(40, 256, device=device)
    exact = (x.double() @ weight.double().t()).float()
    rms = exact.square().mean().sqrt()
    for scaling in ("row", "tensor"):
        error = (ops.fp8_linear(x, weight, scaling=scaling, backend=backend) - exact).square().mean().sqrt() / rms
        assert 0.03 < error < 0.042
    bf16 = ((x.bfloat16() @ weight.bfloat16().t()).float() - exact).square().mean().sqrt() / rms
    assert bf16 < 0.0035


@each_backend
def test_rows_of_many_blocks_and_several_tiles(backend, device):
    x, weight = torch.randn(33, 300, device=device), torch.randn(40, 300, device=device)
    got = ops.fp8_linear(x, weight, backend=backend)
    exact = ops.fp8_linear(x.double(), weight.double(), backend="reference")
    assert_accurate(got, exact, ops.fp8_linear(x, weight, backend="reference"))


def test_module(device):
    linear = torch.nn.Linear(24, 16, device=device)
    module = Fp8Linear(24, 16, device=device)
    module.load_state_dict(linear.state_dict())
    x = torch.randn(5, 24, device=device)
    torch.testing.assert_close(module(x), ops.fp8_linear(x, linear.weight, linear.bias))
    assert (module(x) - linear(x)).abs().max() < 0.2
    assert "scaling='tensor'" in repr(Fp8Linear(3, 4, bias=False, scaling="tensor"))


@pytest.mark.parametrize(
    "old, new",
    [
        ("acc *= tl.load(scale_a_ptr", "_ = tl.load(scale_a_ptr"),
        ("acc *= tl.load(scale_b_ptr", "_ = tl.load(scale_b_ptr"),
        ("acc += tl.load(bias_ptr", "acc -= tl.load(bias_ptr"),
        ("0x7FFFF + ((magnitude >> 20) & 1)", "0x80000"),  # ties away from even
        ("tl.minimum(normal, 126)", "normal"),
        ("magnitude < 0x3C800000", "magnitude < 0"),  # no small numbers
        ("tl.div_rn(1.0, amax) * LARGEST", "tl.div_rn(1.0, amax) * 300.0"),
        ("live = (row < M)", "live = (row < M - 1)"),
        ("b_tile += BLOCK_K", "pass"),
        ("mask=whole + col < D, other=0.0)\n", "mask=whole + col < D - 1, other=0.0)\n"),
    ],
)
def test_planted_bug_is_seen(old, new, device):
    case = _case(True, "row")
    case = Case("fp8_linear", case.fn, _make(True, (9, 200, 37)), case.tiny)
    with planted_bug("fp8_linear", old, new, file="fp8_product"), pytest.raises(AssertionError):
        check_accuracy(case, "triton", torch.float32, device)
        check_guards(case, "triton", device)
        module = __import__("sys").modules["_planted_kernels.fp8_product"]
        x = _edges()[None].to(device)
        codes, _ = module.quantize(x, False, torch.ones((), device=device))
        want = x.masked_fill(x.isinf(), torch.nan).clamp(-448, 448).to(CODES)
        assert torch.equal(codes[:, : x.shape[1]].view(torch.uint8), want.view(torch.uint8))


def test_errors():
    x, weight = torch.randn(3, 8), torch.randn(6, 8)
    codes, scale = ops.fp8_quantize(weight)
    for args, options, kind, text in (
        ((x, weight[:, :7]), {}, ValueError, r"weight \[F, 8\] like x's last dimension, got \[3, 8\] and \[6, 7\]"),
        ((x, weight, torch.randn(5)), {}, ValueError, r"bias must be \[6\] like weight's rows, got \[5\]"),
        ((x, weight), {"scaling": "block"}, ValueError, "scaling must be 'row' or 'tensor', got 'block'"),
        ((x, codes), {}, ValueError, r"weight_scale belongs to a weight in codes .* without one"),
        ((x, weight), {"weight_scale": scale}, ValueError, "weight_scale belongs to a weight in codes .* with one"),
        ((x, codes), {"weight_scale": scale[:5]}, ValueError, r"weight_scale must be \[6\] or one element, got \[5\]"),
        ((x, weight), {"input_scale": scale}, ValueError, r"input_scale must have one element, got \[6\]"),
        ((x.long(), weight), {}, TypeError, "x must be floating point, got torch.int64"),
        ((x, weight.to(torch.float8_e5m2)), {}, TypeError, "x must not be fp8 and weight codes torch.float8_e4m3fn"),
        ((x.double(), weight), {"backend": "triton"}, ValueError, "its kernels take .* got float64"),
    ):
        with pytest.raises(kind, match=f"fp8_linear: .*{text}"):
            ops.fp8_linear(*args, **options)
    with pytest.raises(ValueError, match=r"fp8_quantize: matrix must be floating point \[N, D\]"):
        ops.fp8_quantize(torch.randn(3))
    assert OP.backends == ("triton", "torch", "reference")
