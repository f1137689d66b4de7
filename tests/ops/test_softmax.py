import sys

import pytest
import torch

from fastlm import ops
from fastlm.testing import Case, assert_accurate, check_accuracy, check_guards, check_op, check_reference, planted_bug

BACKENDS = ("torch", "triton")
SHAPE = (2, 3, 4, 20)
MASKS = ("none", "bool", "added", "column")


def _mask(kind, shape, device="cpu"):
    """Of shapes that broadcast to `shape`; some rows are hidden entirely."""

    def draw(*size):  # not random: masks are also made under vmap and torch.compile
        count = 1
        for n in size:
            count = count * n
        return 2 * (torch.arange(count) * 2.4).sin().reshape(size)

    if kind == "none":
        return None
    if kind == "bool":  # keys of each sequence, as padding gives; of the last nothing is left
        mask = draw(shape[0], *[1] * (len(shape) - 2), shape[-1]) > -0.5
        mask[..., :1] = True
        mask[-1:] = False
    elif kind == "added":
        mask = draw(*shape[-2:])
        mask = mask.masked_fill(mask > 0.5, float("-inf"))
        mask[:1] = float("-inf")
    else:  # one for whole rows, the last dimension broadcast
        mask = draw(*shape[:-1], 1) > 0
    return mask.to(device)


def _by_hand(x, mask, scale):
    s = x * scale
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else s + mask.to(x.dtype)
    y = torch.softmax(s, -1)
    return y if mask is None else torch.where((s == float("-inf")).all(-1, keepdim=True), 0.0, y)


def _case(kind, shape=SHAPE, middle=0.0):
    def draw(dtype, device, shape=shape):
        return ((middle + 3 * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device),)

    return Case(
        "softmax",
        lambda x, backend: ops.softmax(x, scale=0.7, mask=_mask(kind, x.shape, x.device), backend=backend),
        draw,
        lambda dtype, device: draw(dtype, device, (2, 2, 5)),
        plain=lambda x: _by_hand(x, _mask(kind, x.shape, x.device), 0.7),
        empty=lambda dtype, device: draw(dtype, device, (0, 3, 8)),
    )


@pytest.mark.parametrize("kind", MASKS)
def test_reference(kind):
    check_reference(_case(kind))
    x = torch.randn(SHAPE, dtype=torch.float64)
    mask = _mask(kind, SHAPE)
    mask = mask.double() if kind == "added" else mask
    torch.testing.assert_close(ops.softmax(x, scale=0.7, mask=mask, backend="reference"), _by_hand(x, mask, 0.7))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_contract(kind, backend, device):
    check_op(_case(kind), backend, device)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(kind, backend, dtype, device):
    check_accuracy(_case(kind), backend, dtype, device)


@pytest.mark.parametrize("n", [1, 2, 16, 123, 1030, 17000, 33000])  # looped over in the backward, in both directions
@pytest.mark.parametrize("kind", ["none", "added"])
def test_widths(n, kind, device):
    case = _case(kind, (2, 3, n))
    check_accuracy(case, "triton", torch.float32, device)
    check_guards(case, "triton", device)


def test_large_scores_keep_their_digits(device):
    for shape in ((5, 100), (1, 33000)):
        check_accuracy(_case("none", shape, middle=1000.0), "triton", torch.float32, device)


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
@pytest.mark.parametrize("n", [20, 33000])
def test_hidden_rows_are_zero_and_get_no_gradient(n, backend, device):
    x = torch.randn(3, n, device=device, requires_grad=True)
    keep = torch.ones(3, n, dtype=torch.bool, device=device)
    keep[1] = False
    for mask in (keep, torch.zeros(3, n, device=device).masked_fill(~keep, float("-inf"))):
        y = ops.softmax(x, mask=mask, backend=backend)
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
        assert (y[1] == 0).all() and (dx[1] == 0).all() and y.isfinite().all() and dx.isfinite().all()
        torch.testing.assert_close(y[::2], torch.softmax(x[::2], -1))


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_other_dimensions(backend, device):
    x = torch.randn(2, 3, 4, device=device)
    for dim in (-3, -2, -1, 0, 1, 2):
        torch.testing.assert_close(ops.softmax(x, dim, backend=backend), torch.softmax(x, dim))
        for shape in ((2, 3, 4), (3, 1), (4,), (2, 1, 1), (1, 3, 4)):
            mask = torch.randn(shape, device=device)
            torch.testing.assert_close(
                ops.softmax(x, dim, scale=2.0, mask=mask, backend=backend), torch.softmax(2 * x + mask, dim)
            )


def test_masks_are_not_copied(device, monkeypatch):
    x = torch.randn(2, 3, 4, 20, device=device)
    shapes = [(2, 1, 1, 20), (4, 20), (2, 3, 1, 1), (2, 1, 4, 20), (1, 3, 1, 20), (20,), (1,)]
    masks = [torch.rand(shape, device=device) > 0.3 for shape in shapes]
    masks.append((torch.rand(20, 4, device=device) > 0.3).t())
    want = [ops.softmax(x, mask=mask, backend="reference") for mask in masks]
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: pytest.fail("a copy was made"))
    for mask, w in zip(masks, want):
        torch.testing.assert_close(ops.softmax(x, mask=mask, backend="triton"), w)


def test_a_mask_that_broadcasts_by_turns(device):
    x = torch.randn(2, 3, 2, 3, 2, 5, device=device)
    mask = torch.randn(2, 1, 2, 1, 2, 5, device=device)
    got, want = (ops.softmax(x, mask=mask, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_are_torchs(backend, device):
    x = torch.randn(5, 20, device=device)
    x[0, 3], x[1, 3], x[2, 3], x[3] = float("nan"), float("inf"), float("-inf"), float("-inf")
    torch.testing.assert_close(ops.softmax(x, backend=backend), torch.softmax(x, -1), equal_nan=True)
    mask = torch.ones(20, dtype=torch.bool, device=device)
    masked = torch.softmax(x, -1)
    masked[3] = 0  # with a mask, a row of nothing but -inf
    torch.testing.assert_close(ops.softmax(x, mask=mask, backend=backend), masked, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bits_under_a_mask_in_fp32(backend, device):
    x = torch.randn(3, 20, device=device).bfloat16()
    mask = torch.randn(3, 20, device=device)
    got, want = (ops.softmax(x, mask=mask, backend=b) for b in (backend, "reference"))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


# The torch form works on few elements at once and on many in blocks of rows; here of 50 elements.
FORMS = pytest.mark.parametrize("form", ["torch", "torch in blocks", "triton"])


def _backend_of(form, monkeypatch):
    if form == "torch in blocks":
        monkeypatch.setattr(sys.modules["fastlm.ops.softmax"], "_FEW", 0)
        monkeypatch.setattr(sys.modules["fastlm.ops.softmax"], "_BLOCK", 50)
    return form.split()[0]


@FORMS
@pytest.mark.parametrize("with_grad", [True, False])
def test_scores_beyond_sixteen_bits(with_grad, form, device, monkeypatch):
    backend = _backend_of(form, monkeypatch)
    low = torch.finfo(torch.float32).min
    for x, scale, mask in (
        (torch.tensor([[1.0, 2.0]]).bfloat16(), 1.0, torch.full((2,), low)),  # finite: it does not hide
        (torch.tensor([[-20.0, -30.0]]).half(), 1.0, torch.full((2,), -65504.0).half()),
        (torch.tensor([[6e4, 6e4, 0.0]]).half(), 2.0, None),
        (torch.tensor([[6e4, 6e4, 0.0]]).half(), 2.0, torch.tensor([True, True, False])),
    ):
        x, mask = x.to(device).requires_grad_(with_grad), mask if mask is None else mask.to(device)
        got, want = (ops.softmax(x, scale=scale, mask=mask, backend=b) for b in (backend, "reference"))
        torch.testing.assert_close(got, want)
        assert got.isfinite().all() and got.sum() > 0.9


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_sixteen_bits_are_computed_in_fp32(kind, dtype, form, device, monkeypatch):
    backend, scale = _backend_of(form, monkeypatch), 3.0
    x = (10 * torch.randn(SHAPE)).to(dtype).to(device)
    mask = _mask(kind, SHAPE, device)
    exact = ops.softmax(x.double(), scale=scale, mask=mask, backend="reference")
    plain = ops.softmax(x, scale=scale, mask=mask, backend="reference")
    for with_grad in (False, True):
        y = ops.softmax(x.detach().requires_grad_(with_grad), scale=scale, mask=mask, backend=backend)
        assert y.dtype == dtype
        assert_accurate(y, exact, plain)
    check_accuracy(_case(kind), backend, dtype, device)  # gradients too


@FORMS
@pytest.mark.parametrize("kind", MASKS)
def test_sixteen_bits_differentiate_twice(kind, form, device, monkeypatch):
    backend, mask = _backend_of(form, monkeypatch), _mask(kind, SHAPE, device)
    x, dy = (torch.randn(SHAPE, device=device).bfloat16() for _ in range(2))

    def second(fn, dtype):
        a, t = (v.to(dtype).requires_grad_() for v in (x, dy))
        (first,) = torch.autograd.grad(fn(a), a, t, create_graph=True)
        return torch.autograd.grad(first.sin().sum(), (a, t))

    found = second(lambda a: ops.softmax(a, scale=0.7, mask=mask, backend=backend), torch.bfloat16)
    exact = second(lambda a: ops.softmax(a, scale=0.7, mask=mask, backend="reference"), torch.float64)
    plain = second(lambda a: _by_hand(a, mask, 0.7), torch.bfloat16)
    for found_one, exact_one, plain_one in zip(found, exact, plain, strict=True):
        assert_accurate(found_one, exact_one, plain_one)


@pytest.mark.parametrize(
    "kind, shape, old, new",
    [
        ("none", SHAPE, "tl.where(live, s, _NEVER)", "s"),  # the padding counted in the sum
        ("bool", SHAPE, "tl.where(total == 0.0, 1.0, total)", "total"),  # a hidden row
        ("added", SHAPE, "tl.load(mask_at, mask=live, other=0.0).to(tl.float32)", "0.0"),
        ("bool", SHAPE, "(rest % middle).to(tl.int64) * stride_middle", "(rest % middle).to(tl.int64)"),
        ("column", SHAPE, "col.to(tl.int64) * stride_mn", "col"),
        ("none", SHAPE, "(dy - tl.sum(dy * y, 1)[:, None])", "dy"),
        ("none", SHAPE, "dx = scale * y", "dx = y"),
        ("none", (2, 33000), "total * _exp(top - shift)", "total"),  # the sum not rescaled to the new maximum
        ("none", (2, 17000), "dots += dy *", "dots = dy *"),
    ],
    ids=["padding", "hidden", "added", "rows", "columns", "projection", "scale", "rescaling", "dots"],
)
def test_planted_bug_is_seen(kind, shape, old, new, device):
    case = _case(kind, shape)
    with planted_bug("softmax", old, new), pytest.raises(AssertionError, match="max error|unwritten|NaN or inf"):
        check_accuracy(case, "triton", torch.float32, device)


def test_write_outside_a_tensor_is_seen(device):
    bug = planted_bug("softmax", "(row < M)[:, None] & (col < N)", "(row < M)[:, None] & (col < N + 8)")
    with bug, pytest.raises(AssertionError, match="wrote outside"):
        check_guards(_case("none"), "triton", device)


def test_errors(device):
    x = torch.randn(2, 8)
    with pytest.raises(TypeError, match="softmax: x must be floating point"):
        ops.softmax(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"softmax: dim must lie in \[-2, 2\) for x \[2, 8\], got 2"):
        ops.softmax(x, 2)
    with pytest.raises(ValueError, match="softmax: x must have at least one dimension"):
        ops.softmax(x[0, 0])
    with pytest.raises(TypeError, match="softmax: mask must be boolean .* got torch.int64"):
        ops.softmax(x, mask=torch.ones(8, dtype=torch.int64))
    for shape in ((7,), (3, 8), (1, 2, 8)):
        with pytest.raises(ValueError, match=r"softmax: mask must broadcast to x \[2, 8\], got"):
            ops.softmax(x, mask=torch.ones(shape))
    with pytest.raises(ValueError, match="softmax: mask gets no gradient"):
        ops.softmax(x, mask=torch.zeros(8, requires_grad=True))
    with pytest.raises(ValueError, match="its rows are at most 262144 wide, got 262145"):
        ops.softmax(torch.empty(1, 262145, device=device), backend="triton")
    with pytest.raises(ValueError, match=r"its rows are numbered in 32 bits: fewer than 2\^31 of them"):
        ops.explain(ops.softmax, torch.empty(1, device=device).expand(2**31, 1), backend="triton")


@pytest.mark.parametrize("kind", MASKS)
def test_torch_form_differentiates_twice(kind):
    case = _case(kind)
    (x,) = case.tiny(torch.float64, "cpu")
    assert torch.autograd.gradgradcheck(lambda a: case.fn(a, backend="torch"), x.requires_grad_())
