import dataclasses
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from fastlm.nn.distillation_loss import KLDivLoss
from fastlm.ops._op import explain
from fastlm.ops.kl_div import OP, kl_div
from fastlm.testing import Case, check_accuracy, check_guards, check_op, check_reference, check_strides, planted_bug
from tests.ops.allocations import Allocations, NoLaunch

BACKENDS = ("torch", "triton")
BETAS = (0.0, 0.3, 1.0)
INF = float("inf")


def _teacher(student):
    """Logits like student's, the same at every call; constants get no gradient, so they are no argument of a Case."""
    R, V = student.shape[-2:]
    logits = 2.5 * (torch.arange(R * V, dtype=torch.float64, device=student.device) * 12.9898).sin().view(R, V)
    return logits.to(student.dtype).expand(student.shape)


def _mask(student):
    return (torch.arange(student.shape[:-1].numel(), device=student.device) % 3 != 1).view(student.shape[:-1])


def _plain(student, beta, temperature=1.0, masked=False, reduction="mean"):
    """As TRL's trainer has it, in the student's dtype."""
    mask = _mask(student)
    log_q, log_p = (F.log_softmax(t / temperature, -1) for t in (student, _teacher(student)))
    if beta == 0:
        each = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    elif beta == 1:
        each = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    else:
        b = torch.tensor(beta, dtype=student.dtype)
        log_m = torch.logsumexp(torch.stack((log_q + torch.log1p(-b), log_p + torch.log(b))), 0)
        to = lambda t: F.kl_div(log_m, t, reduction="none", log_target=True)  # noqa: E731
        each = b * to(log_p) + (1 - b) * to(log_q)
    loss = each.sum(-1)
    if masked:
        loss = loss.where(mask, 0)
    if reduction == "none":
        return loss
    return loss.sum() / (mask.sum() if masked else mask.numel()) if reduction == "mean" else loss.sum()


def _case(beta, temperature=1.0, masked=False, reduction="none"):
    def make(dtype, device, shape=(2, 3, 300)):
        return (torch.randn(shape, dtype=torch.float64).to(dtype).to(device),)

    def fn(student, backend):
        mask = _mask(student) if masked else None
        options = {"beta": beta, "temperature": temperature, "mask": mask, "reduction": reduction}
        return kl_div(student, _teacher(student), backend=backend, **options)

    return Case(
        "kl_div",
        fn,
        make,
        lambda dtype, device: make(dtype, device, (3, 5)),
        plain=lambda s: _plain(s, beta, temperature, masked, reduction),
        empty=lambda dtype, device: make(dtype, device, (0, 5)),
    )


CASES = {
    "forward": _case(0.0, reduction="mean", masked=True),
    "reverse": _case(1.0, 2.0, masked=True),
    "mixture": _case(0.3, 0.7),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def by_rows(monkeypatch):
    """The row-wise torch form for these small shapes too, which the CPU would leave to torch's own calls."""
    monkeypatch.setattr(sys.modules["fastlm.ops.kl_div"], "_SMALL", 0)


@ALL
def test_reference(case):
    check_reference(case)


@ALL
@pytest.mark.parametrize("backend", BACKENDS)
def test_contract(case, backend, device):
    check_op(case, backend, device)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(case, backend, dtype, device):
    check_accuracy(case, backend, dtype, device, [case.make(dtype, device) for _ in range(2)])


def test_every_combination_at_fp64(monkeypatch):
    """Against TRL's formula, whatever the rows per block of the torch form."""
    student = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    module = sys.modules["fastlm.ops.kl_div"]
    for beta, temperature, masked, reduction in itertools.product(
        (0.0, 0.1, 0.5, 0.9, 1.0), (1.0, 2.5), (False, True), ("mean", "sum", "none")
    ):
        want = _plain(student, beta, temperature, masked, reduction)
        want = [want, *torch.autograd.grad(want.square().sum(), student)]
        case = _case(beta, temperature, masked, reduction)
        for backend, block, small in (("reference", 1, 0), ("torch", 1, 0), ("torch", 5 * 11 * 8, 0), ("torch", 1, 99)):
            monkeypatch.setattr(module, "_SCRATCH_BYTES", block)
            monkeypatch.setattr(module, "_SMALL", small)
            got = case.fn(student, backend=backend)
            got = [got, *torch.autograd.grad(got.square().sum(), student)]
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(3, 1), (2, 16), (2, 2048), (2, 4196)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_widths(backend, shape, device):
    for case in (_case(0.0), _case(0.3)):
        check_accuracy(case, backend, torch.float32, device, case.make(torch.float32, device, shape))


def test_rows_between_multiples_of_16_bytes(device):
    """Contiguous rows of odd width: tiles begin before the row, at a multiple of 16 bytes."""
    for case in (_case(0.0), _case(0.3), _case(1.0, masked=True)):
        for dtype in (torch.float32, torch.bfloat16):
            args = case.make(dtype, device, (4, 2077))
            check_accuracy(case, "triton", dtype, device, args)
    case = Case("kl_div", case.fn, lambda dtype, device: case.make(dtype, device, (4, 2077)), None)
    check_guards(CASES["mixture"], "triton", device)


# Logits without their last position: rows at multiples of 16 bytes, rows between them, several tiles.
SHIFTED = {"aligned": (3, 3, 304), "odd": (3, 3, 301), "tiles": (2, 3, 2077)}


def _shifted(beta, shape, of_teacher):
    def fn(student, backend):
        teacher = 2 * _teacher(student).roll(1, -1)
        return kl_div(student[:, :-1], of_teacher(teacher), beta=beta, reduction="none", backend=backend)

    case = _case(beta)
    make, plain = lambda dtype, device: case.make(dtype, device, shape), lambda s: fn(s, "reference")
    return dataclasses.replace(case, fn=fn, make=make, plain=plain, empty=None)


@pytest.mark.parametrize("name", SHIFTED)
def test_accuracy_of_shifted_logits(name, device):
    """The teacher is shifted too, or of one run or zero stride (student and teacher then lie differently)."""
    shift = lambda t: t[:, :-1]  # noqa: E731
    one_run, spread = lambda t: shift(t).contiguous(), lambda t: shift(t)[:1].expand_as(shift(t))
    for beta, of_teacher in ((0.0, shift), (0.3, one_run), (1.0, spread)):
        case = _shifted(beta, SHIFTED[name], of_teacher)
        for dtype in (torch.float32, torch.bfloat16):
            check_accuracy(case, "triton", dtype, device)


def test_contract_of_shifted_logits(device):
    case = _case(0.0, masked=True)
    view = dataclasses.replace(
        case,
        fn=lambda s, backend: case.fn(s[:, :-1], backend=backend),
        make=lambda dtype, device: case.make(dtype, device, SHIFTED["odd"]),
        empty=None,
    )
    check_op(view, "triton", device)


@pytest.mark.parametrize("name", SHIFTED)
def test_shifted_logits_are_read_where_they_lie(name, monkeypatch):
    kernels = pytest.importorskip("fastlm.kernels.kl_div")
    launches = []
    monkeypatch.setattr(kernels, "_kl_div_rows_kernel", NoLaunch(launches))
    student, teacher = (torch.randn(SHIFTED[name])[:, :-1] for _ in range(2))
    with Allocations() as made:
        loss, statistics = kernels.kl_div_fwd(student, teacher, None, 0.0, 1.0)
    assert 5 * loss.numel() == max(made.elements) < student.numel()
    with Allocations() as made:
        dx = kernels.kl_div_bwd(loss, student, teacher, None, statistics, 0.0, 1.0)
    assert sum(n >= student.numel() for n in made.elements) == 1 and dx.shape == student.shape
    assert max(made.elements) < student.numel() + 8 * loss.numel()
    assert [launch["PEEL"] for launch in launches] == [name != "aligned"] * 2


def _both(beta):
    def make(dtype, device):
        return tuple((torch.randn(2, 3, 301, dtype=torch.float64)).to(dtype).to(device) for _ in range(2))

    return Case("kl_div", lambda s, t, backend: kl_div(s, t, beta=beta, reduction="none", backend=backend), make, make)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_teacher_is_read_within_bounds_and_at_any_strides(backend, device):
    for beta in (0.0, 0.3):
        check_guards(_both(beta), backend, device)
        check_strides(_both(beta), backend, device)


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_the_teacher_is_a_constant(backend, device):
    student, teacher = (t.requires_grad_() for t in _both(0.0).make(torch.float32, device))
    grads = torch.autograd.grad(kl_div(student, teacher, backend=backend), (student, teacher), allow_unused=True)
    assert grads[0] is not None and grads[1] is None


def _extreme(device):
    """Rows with classes ruled out in both, in the student, in the teacher; a whole tile of them; two rows far apart."""
    student, teacher = torch.randn(2, 5, 4196, generator=torch.Generator().manual_seed(1))
    student[0, :2100] = teacher[0, :2100] = -INF
    student[1, 7] = -INF
    teacher[2, 7] = -INF
    student[3] *= 100
    teacher[3] *= 100
    teacher[4], student[4, 2500] = student[4] + 1e4, 40.0
    return student.to(device), teacher.to(device)


def _check_extreme(backend, device):
    student, teacher = _extreme(device)
    want = {beta: kl_div(student.double(), teacher.double(), beta=beta, reduction="none") for beta in BETAS}
    assert want[0.0].isinf().tolist() == [False, True, False, False, False]
    assert want[1.0].isinf().tolist() == [False, False, True, False, False]
    for beta in BETAS:
        student.requires_grad_()
        loss = kl_div(student, teacher, beta=beta, reduction="none", backend=backend)
        torch.testing.assert_close(loss, want[beta].float(), rtol=1e-5, atol=1e-5)
        live = loss.isfinite()
        got, exact = (
            torch.autograd.grad(
                kl_div(s, t, beta=beta, mask=live, reduction="sum", backend=b), s
            )[0] for s, t, b in ((student, teacher, backend), (student.double(), teacher.double(), "reference"))
        )  # fmt: skip
        assert got.isfinite().all()
        torch.testing.assert_close(got, exact.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_classes_ruled_out_and_large_logits(backend, device):
    _check_extreme(backend, device)


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_equal_logits(backend, device):
    student = 10 * torch.randn(4, 300, device=device)
    for beta in BETAS:
        loss = kl_div(student, student.clone(), beta=beta, reduction="none", backend=backend)
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_rows_that_do_not_count_may_hold_anything(backend, device):
    student, teacher = _both(0.0).make(torch.float32, device)
    mask = _mask(student)
    dirty_student, dirty_teacher = student.clone(), teacher.clone()
    dirty_student[~mask], dirty_teacher[~mask] = float("nan"), INF
    weight = torch.rand(mask.shape, device=device)
    for beta, reduction in itertools.product(BETAS, ("mean", "sum", "none")):
        results = []
        for s, t in ((student, teacher), (dirty_student, dirty_teacher)):
            s = s.clone().requires_grad_()
            loss = kl_div(s, t, beta=beta, mask=mask, token_weight=weight, reduction=reduction, backend=backend)
            results.append((loss, *torch.autograd.grad(loss.sum(), s)))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
        assert (results[1][1][~mask] == 0).all()
    none = kl_div(s, t, mask=torch.zeros_like(mask), token_weight=weight, backend=backend)
    assert none == 0 and (torch.autograd.grad(none, s)[0] == 0).all()
    zero = torch.zeros((), device=device)
    assert kl_div(s, t, mask=torch.zeros_like(mask), denominator=zero, backend=backend) == 0


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_weights_and_denominators(backend, device):
    student, teacher = _both(0.0).make(torch.float32, device)
    weight = torch.rand(2, 3, device=device, requires_grad=True)
    rows = kl_div(student, teacher, reduction="none", backend=backend)
    got = kl_div(student, teacher, token_weight=weight, reduction="none", backend=backend)
    torch.testing.assert_close(got, rows * weight)
    for denominator in (None, 5, torch.tensor(5.0, device=device)):
        mean = kl_div(student, teacher, token_weight=weight, denominator=denominator, backend=backend)
        torch.testing.assert_close(mean, (rows * weight).sum() / (6 if denominator is None else 5))
        torch.testing.assert_close(torch.autograd.grad(mean, weight)[0], rows / (6 if denominator is None else 5))


def test_small_problems_are_left_to_torch(monkeypatch):
    module = sys.modules["fastlm.ops.kl_div"]
    monkeypatch.setattr(module, "_SMALL", 1 << 18)
    for beta in (0.0, 1.0):
        case = _case(beta, 2.0)
        for dtype in case.dtypes:
            check_accuracy(case, "torch", dtype, "cpu", [case.make(dtype, "cpu") for _ in range(2)])
    _check_extreme("torch", "cpu")
    student, teacher = (t[:1].requires_grad_() for t in _extreme("cpu"))
    for beta in (0.0, 1.0):  # torch's own calls give NaN where a class is ruled out in both
        got, want = (kl_div(student, teacher, beta=beta, backend=b) for b in ("torch", "reference"))
        torch.testing.assert_close(got, want)
        assert torch.autograd.grad(got, student)[0].isfinite().all()
    monkeypatch.setattr(module._Rows, "apply", None)
    kl_div(*_both(0.0).make(torch.float32, "cpu"))


# --- planted bugs ---


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("mixture", "weight = tl.where(mask, weight, 0.0)", "pass"),  # the tail's padding
        ("forward", "(new_a - old_a) - (new_b - old_b)", "(new_b - old_b) - (new_a - old_a)"),
        ("forward", "gradient = q - tl.exp(log_p)", "gradient = q"),
        ("reverse", "q * (log_q - log_p - row[4])", "q * (log_q - log_p)"),  # no mean
        ("mixture", "(1.0 - beta) * q * (log_q", "q * (log_q"),
        ("reverse", "factor * options[4], True", "factor, True"),  # the temperature missing from the gradient
        ("reverse", "live = tl.load(mask_ptr + n) != 0", "live = True"),
        ("forward", "factor = tl.load(factor_ptr + n).to(tl.float32)", "pass"),
        ("mixture", "if full < end:", "if full + BLOCK_V < end:"),  # the tail
    ],
    ids=["padding", "rescale", "teacher", "mean", "beta", "temperature", "mask", "factor", "tail"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_planted_bug_is_seen(name, old, new, device):
    cases = [CASES[name], _case(0.0)]
    wide = torch.randn(2, 2400, device=device)
    wide[:, 2300] = 9.0  # the maximum grows from one tile to the next
    with planted_bug("kl_div", old, new), pytest.raises(AssertionError):
        for case in cases:
            check_accuracy(case, "triton", torch.float32, device)
            check_accuracy(case, "triton", torch.float32, device, (wide,))
            check_guards(case, "triton", device)


@pytest.mark.parametrize(
    "old, new",
    [
        ("tl.where(weight == 0, 0.0, weight * ((b - new_b) - (a - new_a)))", "weight * ((b - new_b) - (a - new_a))"),
        ("of_q = tl.where(q == 0, 0.0, q * (log_q - log_m))", "of_q = q * (log_q - log_m)"),
        ("(y * options[4] - row[1]) - row[3]", "y * options[4] - (row[1] + row[3])"),  # a rounded log-sum-exp
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_planted_bug_at_the_extremes_is_seen(old, new, device):
    with planted_bug("kl_div", old, new), pytest.raises(AssertionError):
        _check_extreme("triton", device)


def test_explain_and_errors():
    student, teacher = _both(0.0).make(torch.float32, "cpu")
    assert explain(kl_div, student, teacher).backend == "torch"

    def fails(error, message, *args, **options):
        with pytest.raises(error, match="kl_div: " + message):
            kl_div(*args, **options)

    fails(ValueError, r"teacher_logits must have student_logits' shape .*; cut both", student, teacher[..., 1:])
    fails(ValueError, r"student_logits must be \[..., V\] with at least one class", student[..., :0], teacher)
    fails(TypeError, "teacher_logits must be floating point", student, teacher.long())
    fails(ValueError, r"beta must be in \[0, 1\], got 1.5", student, teacher, beta=1.5)
    fails(ValueError, "temperature must be > 0", student, teacher, temperature=0.0)
    fails(TypeError, "mask must be bool", student, teacher, mask=torch.ones(2, 3))
    fails(ValueError, r"mask must be \[2, 3\]", student, teacher, mask=torch.ones(2, dtype=torch.bool))
    fails(ValueError, r"token_weight must be \[2, 3\]", student, teacher, token_weight=torch.ones(3))
    fails(ValueError, "reduction must be", student, teacher, reduction="batchmean")
    fails(
        ValueError, "denominator is what reduction='mean' divides by", student, teacher, reduction="sum", denominator=3
    )
    fails(ValueError, "denominator must be > 0", student, teacher, denominator=0)
    fails(ValueError, ".*got float64", student.double(), teacher.double(), backend="triton")
    assert OP.backends == ("triton", "torch", "reference")


def test_the_module():
    student, teacher = _both(0.0).make(torch.float32, "cpu")
    mask = _mask(student)
    module = KLDivLoss(beta=0.5, temperature=2.0, reduction="sum")
    want = kl_div(student, teacher, beta=0.5, temperature=2.0, mask=mask, reduction="sum")
    assert torch.equal(module(student, teacher, mask=mask), want)
    assert "beta=0.5, temperature=2.0, reduction='sum'" in repr(module)
    with pytest.raises(ValueError, match="beta must be"):
        KLDivLoss(beta=2.0)
