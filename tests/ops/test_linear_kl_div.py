import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastlm.kernels import chunked_loss
from fastlm.ops.kl_div import kl_div
from fastlm.ops.linear_kl_div import OP, linear_kl_div
from fastlm.testing import Case, check_accuracy, check_guards, check_op, check_reference, check_strides, planted_bug
from tests.ops.allocations import Allocations, peak_bytes

BACKENDS = ("torch", "triton")
ALL = {"student_scale": 0.7, "teacher_scale": 1.3, "student_softcap": 3.0, "teacher_softcap": 4.0}


def _waves(*shape, like, seed):
    """The same values at every call, without a random generator, which vmap does not allow."""
    n = torch.Size(shape).numel()
    waves = (torch.arange(n, dtype=torch.float64, device=like.device) * (12.9898 + seed)).sin()
    return waves.view(shape).to(like.dtype)


def _teacher(hidden, vocabulary):
    """hidden of another width, weight and bias: constants, so no arguments of a Case."""
    rows = hidden.shape[-2]
    h = _waves(rows, 7, like=hidden, seed=0).expand(*hidden.shape[:-1], 7)
    return h, _waves(vocabulary, 7, like=hidden, seed=1), _waves(vocabulary, like=hidden, seed=2)


def _mask(hidden):
    rows = hidden.shape[:-1]
    return (torch.arange(rows.numel(), device=hidden.device) % 3 != 1).view(rows)


def _options(hidden, masked, weighted):
    mask, weight = _mask(hidden) if masked else None, None
    if weighted:
        weight = _waves(*hidden.shape[:-1], like=hidden, seed=3).abs() + 0.2
    return {"mask": mask, "token_weight": weight}


def _plain(hidden, weight, bias, *, masked=False, weighted=False, reduction="mean", beta=0.0, temperature=1.0,
           student_scale=1.0, teacher_scale=1.0, student_softcap=None, teacher_softcap=None, denominator=None):  # fmt: skip
    """What a user writes, in the inputs' own dtype."""
    teacher_hidden, teacher_weight, teacher_bias = _teacher(hidden, weight.shape[0])
    cap = lambda z, c: z if c is None else c * torch.tanh(z / c)  # noqa: E731
    student = cap(student_scale * F.linear(hidden, weight, bias), student_softcap)
    teacher = cap(teacher_scale * F.linear(teacher_hidden, teacher_weight, teacher_bias), teacher_softcap)
    log_q, log_p = (F.log_softmax(t / temperature, -1) for t in (student, teacher))
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        loss = (p * (log_p - log_q)).sum(-1)
    elif beta == 1:
        loss = (q * (log_q - log_p)).sum(-1)
    else:
        log_m = (beta * p + (1 - beta) * q).log()
        loss = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)
    options = _options(hidden, masked, weighted)
    if weighted:
        loss = loss * options["token_weight"]
    if masked:
        loss = loss.where(options["mask"], 0)
    if reduction == "none":
        return loss
    count = (options["mask"].sum() if masked else loss.numel()) if denominator is None else denominator
    return loss.sum() / count if reduction == "mean" else loss.sum()


def _args(dtype, device, shape=(2, 3, 8), vocabulary=300):
    hidden, weight, bias = (
        torch.randn(s, dtype=torch.float64) for s in (shape, (vocabulary, shape[-1]), (vocabulary,))
    )
    return tuple(t.to(dtype).to(device) for t in (hidden, weight / shape[-1] ** 0.5, bias))


def _case(masked=False, weighted=False, logits_bytes=None, **options):
    def fn(hidden, weight, bias, backend):
        th, tw, tb = _teacher(hidden, weight.shape[0])
        return linear_kl_div(
            hidden, weight, th, tw, student_bias=bias, teacher_bias=tb, logits_bytes=logits_bytes, backend=backend,
            **_options(hidden, masked, weighted), **options
        )  # fmt: skip

    return Case(
        "linear_kl_div",
        fn,
        _args,
        lambda dtype, device: _args(dtype, device, (3, 3), 5),
        plain=partial(_plain, masked=masked, weighted=weighted, **options),
        empty=lambda dtype, device: _args(dtype, device, (0, 8), 5),
    )


CHUNK = 4 * 2 * 300 * 4  # four fp32 rows of both models
CASES = {
    "mean": _case(masked=True, logits_bytes=CHUNK),
    "none": _case(masked=True, weighted=True, reduction="none", beta=0.3, logits_bytes=CHUNK),
    "sum": _case(weighted=True, reduction="sum", beta=1.0, temperature=2.0, **ALL),
}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@EACH
def test_reference(case):
    check_reference(case)


@EACH
@pytest.mark.parametrize("backend", BACKENDS)
def test_contract(case, backend, device):
    check_op(case, backend, device)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(case, backend, dtype, device):
    check_accuracy(case, backend, dtype, device, [case.make(dtype, device) for _ in range(3)])


def test_every_combination_at_fp64_whatever_the_chunk():
    inputs = [t.requires_grad_() for t in _args(torch.float64, "cpu", (7, 4), 11)]
    for beta, reduction, masked, weighted, capped in itertools.product(
        (0.0, 0.3, 1.0), ("mean", "sum", "none"), (False, True), (False, True), (False, True)
    ):
        options = {"beta": beta, "reduction": reduction, "temperature": 1.7, **(ALL if capped else {})}
        if reduction == "mean" and weighted:
            options["denominator"] = 5
        want = _plain(*inputs, masked=masked, weighted=weighted, **options)
        want = [want, *torch.autograd.grad(want.square().sum(), inputs)]
        for backend, rows in (("reference", 1), ("torch", 100), ("torch", 1), ("torch", 5)):
            fn = _case(masked, weighted, rows * 2 * 11 * 8, **options).fn
            got = fn(*inputs, backend=backend)
            got = [got, *torch.autograd.grad(got.square().sum(), inputs)]
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_padded_rows_as_on_a_gpu(device, monkeypatch):
    monkeypatch.setitem(chunked_loss.ROW_MULTIPLE, "cpu", 16)
    check_guards(CASES["none"], "triton", device)
    for backend in BACKENDS:
        check_accuracy(CASES["mean"], backend, torch.float32, device)


def _with_teacher():
    def make(dtype, device):
        student, teacher = _args(dtype, device), _args(dtype, device, (2, 3, 5))
        return *student, *teacher

    def fn(h, w, b, th, tw, tb, backend):
        return linear_kl_div(h, w, th, tw, student_bias=b, teacher_bias=tb, reduction="none", backend=backend)

    return Case("linear_kl_div", fn, make, make)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_teacher_is_read_within_bounds_at_any_strides_and_is_a_constant(backend, device):
    case = _with_teacher()
    check_guards(case, backend, device)
    check_strides(case, backend, device)
    args = [t.requires_grad_() for t in case.make(torch.float32, device)]
    grads = torch.autograd.grad(case.fn(*args, backend=backend).sum(), args, allow_unused=True)
    assert [g is None for g in grads] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_kl_div_of_the_logits(backend, device):
    h, w, b, th, tw, tb = _with_teacher().make(torch.float32, device)
    for beta in (0.0, 0.5, 1.0):
        want = kl_div(F.linear(h, w, b), F.linear(th, tw, tb), beta=beta, temperature=2.0)
        got = linear_kl_div(
            h, w, th, tw, student_bias=b, teacher_bias=tb, beta=beta, temperature=2.0, backend=backend
        )  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        mixed = linear_kl_div(h, w, th.bfloat16(), tw, student_bias=b, teacher_bias=tb, beta=beta, backend=backend)
        assert mixed.dtype == torch.float32 and mixed.isfinite()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_no_row_that_counts(backend, reduction, device):
    h, w, b, th, tw, tb = _with_teacher().make(torch.float32, device)
    h.fill_(float("nan"))
    inputs = [t.requires_grad_() for t in (h, w, b)]
    mask = torch.zeros(2, 3, dtype=torch.bool, device=device)
    loss = linear_kl_div(
        h, w, th, tw, student_bias=b, teacher_bias=tb, mask=mask, reduction=reduction, beta=0.5, backend=backend
    )
    assert (loss == 0).all()
    if backend != "reference":  # whose products are 0 times NaN
        dh, dw, db = torch.autograd.grad(loss.sum(), inputs)
        assert (dh == 0).all() and (db == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_weights_get_a_gradient_from_none_only(backend, device):
    h, w, _, th, tw, _ = _with_teacher().make(torch.float32, device)
    weight = torch.rand(2, 3, device=device, requires_grad=True)
    rows = linear_kl_div(h, w, th, tw, reduction="none", backend=backend)
    loss = linear_kl_div(h, w, th, tw, token_weight=weight, reduction="none", backend=backend)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), weight)[0], rows)
    with pytest.raises(ValueError, match="token_weight is a constant"):
        linear_kl_div(h, w, th, tw, token_weight=weight, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_products_are_in_16_bits(backend, device):
    h, w, b, th, tw, tb = _with_teacher().make(torch.float32, device)
    inputs = [t.requires_grad_() for t in (h, w)]
    with torch.autocast(device, torch.bfloat16):
        loss = linear_kl_div(h, w, th, tw, backend=backend)
    grads = torch.autograd.grad(loss, inputs)
    assert loss.dtype == grads[0].dtype == grads[1].dtype == torch.float32
    torch.testing.assert_close(loss, linear_kl_div(h, w, th, tw, backend="reference"), rtol=3e-2, atol=3e-3)


def test_logits_are_never_whole():
    hidden, weight, bias = (t.requires_grad_() for t in _args(torch.float32, "cpu", (64, 4), 500))
    teacher = _teacher(hidden.detach(), 500)
    for reduction in ("mean", "none"):
        options = (0.0, 1.0, 1.0, None, 1.0, None, reduction, 8 * 2 * 500 * 4, True, True, True, "torch")
        count = torch.tensor(64.0) if reduction == "mean" else None
        tensors = (hidden.detach(), weight.detach(), bias.detach(), *teacher, None, None, count)
        with Allocations() as made:
            loss, *saved = OP._load("torch", 0)(*tensors, *options[:-1])
            OP._load("torch", 1)(torch.ones_like(loss), *tensors, *saved, *options[:-1])
        assert max(made.elements) <= 4 * 8 * 500  # the four buffers of the torch form's rows, made at once


@pytest.mark.parametrize("factor, reduction", [(1, "mean"), (3, "mean"), (3, "none")])
def test_peak_memory(factor, reduction):
    """Forward and backward hold no more logits than their budget, the student's gradients once (its weight's in fp32), and little
    more. The shape is that of a GPU with 16 times fewer of each."""
    rows, width, classes = 512, 256, 8016
    hidden = torch.randn(rows, width).bfloat16().requires_grad_()
    weight = torch.randn(classes, width).bfloat16().requires_grad_()
    teacher = torch.randn(rows, 64).bfloat16(), torch.randn(classes, 64).bfloat16()
    logits_bytes = rows * classes * 2 * 2 // 8

    def step():
        loss = linear_kl_div(hidden, weight, *teacher, logits_bytes=logits_bytes, reduction=reduction, backend="torch")
        (loss * factor).sum().backward()
        hidden.grad = weight.grad = None

    step()
    gradients = weight.numel() * 4 + hidden.numel() * 2
    # Scratch: rows in fp32 that fit the cache, parts of a product.
    assert peak_bytes(step) <= logits_bytes + gradients + (3 << 20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_handed_over_once_and_then_made_anew(backend, device):
    case = CASES["mean"]
    inputs = [t.requires_grad_() for t in case.make(torch.float32, device)]
    loss = 3 * case.fn(*inputs, backend=backend)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(2 * loss, inputs, retain_graph=True)
    for a, b, c in zip(first, kept, second):
        assert torch.equal(a, b) and a.data_ptr() != c.data_ptr()
        torch.testing.assert_close(2 * a, c)
    again = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("linear_kl_div", "row_scales(hidden, token_weight, denominator)", "row_scales(hidden, token_weight, None)"),
        ("chunked_loss", "return share.expand(", "return (0 * share + 1).expand("),
        ("linear_kl_div", "for z in (mask, factor))", "for z in (None, factor))"),
        ("linear_kl_div", "gradients.add(a, h[here], w, start)", "gradients.add(a, h[here], w, 0)"),
        ("linear_kl_div", "(scale, teacher_scale), (softcap", "(teacher_scale, scale), (softcap"),
        ("linear_kl_div", "loss = loss * token_weight.reshape(-1).to(loss.dtype)", "pass"),
        ("kl_div", "gradient, slope, factor", "gradient, 1.0, factor"),
        ("kl_div", "_write_zeros(dx_ptr + dx_start, first, begin, full, end, BLOCK_V)", "pass"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_planted_bug_is_seen(file, old, new, device):
    weighted = _case(masked=True, weighted=True)
    with planted_bug("linear_kl_div", old, new, file=file), pytest.raises(AssertionError):
        for case in (*CASES.values(), weighted):
            check_accuracy(case, "triton", torch.float32, device)


def test_errors():
    h, w, b, th, tw, tb = _with_teacher().make(torch.float32, "cpu")

    def fails(error, message, *args, **options):
        with pytest.raises(error, match="linear_kl_div: " + message):
            linear_kl_div(*args, **options)

    fails(ValueError, "student and teacher must have the same classes, got 300 and 299", h, w, th, tw[1:])
    fails(ValueError, r"teacher_hidden must be \[..., 5\]", h, w, h, tw)
    fails(ValueError, r"teacher_hidden must have student_hidden's rows \[2, 3\], got \[3\]", h, w, th[0], tw)
    fails(ValueError, r"student_bias must be \[300\]", h, w, th, tw, student_bias=b[1:])
    fails(TypeError, "teacher_weight must be floating point", h, w, th, tw.long())
    fails(ValueError, r"beta must be in \[0, 1\]", h, w, th, tw, beta=-0.1)
    fails(ValueError, "teacher_softcap must be > 0", h, w, th, tw, teacher_softcap=0.0)
    fails(ValueError, "logits_bytes must be > 0", h, w, th, tw, logits_bytes=0)
    fails(TypeError, "mask must be bool", h, w, th, tw, mask=torch.ones(2, 3))
    fails(ValueError, "denominator is what reduction='mean' divides by", h, w, th, tw, reduction="none", denominator=2)
