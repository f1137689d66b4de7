import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from fastlm import nn
from fastlm.ops._op import explain
from fastlm.ops.cross_entropy import OP, cross_entropy
from fastlm.testing import Case, check_accuracy, check_guards, check_op, check_reference, planted_bug
from tests.ops.allocations import Allocations, NoLaunch

BACKENDS = ("torch", "triton")
ALL = {"label_smoothing": 0.1, "z_loss": 0.02, "softcap": 6.0, "scale": 0.7}


def _weight(input):
    return (torch.arange(input.shape[-1], device=input.device) % 5 + 1).to(input.dtype) / 4


def _target(input):
    rows = input.shape[:-1]
    target = torch.arange(rows.numel(), device=input.device) * 7919 % input.shape[-1]
    return target.masked_fill(torch.arange(rows.numel(), device=input.device) % 3 == 1, -100).view(rows)


def _plain(input, *, weighted=False, tokens=False, label_smoothing=0.0, z_loss=0.0, softcap=None, scale=1.0, reduction="mean",
           denominator=None):  # fmt: skip
    """The contract's formula, term by term, in the input's own dtype."""
    z = scale * input
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    target, V = _target(input), input.shape[-1]
    live = target != -100
    w = _weight(input) if weighted else torch.ones(V, dtype=z.dtype, device=z.device)
    log_p = F.log_softmax(z, -1)
    y = target.clamp(min=0)
    loss = (1 - label_smoothing) * w[y] * -log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    loss = loss + label_smoothing / V * (w * -log_p).sum(-1) + z_loss * z.logsumexp(-1) ** 2
    if tokens:
        loss = loss * _tokens(input)
    loss = loss.where(live, 0)
    if reduction == "none":
        return loss
    count = w[y].where(live, 0).sum() if denominator is None else denominator
    return loss.sum() / count if reduction == "mean" else loss.sum()


def _tokens(input):
    rows = input.shape[:-1]
    return (0.25 + torch.arange(rows.numel(), device=input.device) % 4).view(rows).to(input.dtype)


def _case(weighted=False, tokens=False, **options):
    def make(dtype, device, shape=(2, 3, 300)):
        return (torch.randn(shape, dtype=torch.float64).to(dtype).to(device),)

    def fn(input, backend):
        weight, token_weight = _weight(input) if weighted else None, _tokens(input) if tokens else None
        return cross_entropy(input, _target(input), weight, token_weight=token_weight, backend=backend, **options)

    return Case(
        "cross_entropy",
        fn,
        make,
        lambda dtype, device: make(dtype, device, (3, 5)),
        plain=lambda z: _plain(z, weighted=weighted, tokens=tokens, **options),
        empty=lambda dtype, device: make(dtype, device, (0, 5)),
    )


CASES = {
    "mean": _case(),
    "none_all": _case(True, True, reduction="none", **ALL),
    "sum_smooth": _case(reduction="sum", label_smoothing=0.1),
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


def test_every_combination_at_fp64():
    input = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    for reduction, weighted, tokens, smoothing, z_loss, softcap, scale in itertools.product(
        ("mean", "sum", "none"), (False, True), (False, True), (0.0, 0.1), (0.0, 0.02), (None, 4.0), (1.0, 0.5)
    ):
        options = {
            "reduction": reduction, "label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap, "scale": scale
        }  # fmt: skip
        if reduction == "mean" and tokens:
            options["denominator"] = 5
        want = _plain(input, weighted=weighted, tokens=tokens, **options)
        want = [want, *torch.autograd.grad(want.square().sum(), input)]
        for backend in ("reference", "torch"):
            got = _case(weighted, tokens, **options).fn(input, backend=backend)
            got = [got, *torch.autograd.grad(got.square().sum(), input)]
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_torchs(backend, device):
    input = torch.randn(6, 40, device=device, requires_grad=True)
    target, weight = _target(input), _weight(input).detach()
    for smoothing, w, reduction in itertools.product((0.0, 0.2), (None, weight), ("mean", "sum", "none")):
        options = {"label_smoothing": smoothing, "reduction": reduction}
        want = F.cross_entropy(input, target, w, **options)
        got = cross_entropy(input, target, w, **options, backend=backend)
        torch.testing.assert_close(got, want)
        module = nn.CrossEntropyLoss(w, **options)
        assert isinstance(module, torch.nn.CrossEntropyLoss)
        torch.testing.assert_close(module(input, target), want)
    module = nn.CrossEntropyLoss(z_loss=0.1, softcap=5.0, scale=0.5)
    want = cross_entropy(input, target, z_loss=0.1, softcap=5.0, scale=0.5, backend=backend)
    torch.testing.assert_close(module(input, target), want)
    with pytest.raises(ValueError, match="z_loss must be >= 0"):
        nn.CrossEntropyLoss(z_loss=-1.0)


# One class, whole tiles, rows between multiples of 16 bytes, with one tile and with several.
@pytest.mark.parametrize("shape", [(3, 1), (2, 16), (2, 4096), (4, 4101), (3, 8300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths(shape, dtype, device):
    for case in (CASES["none_all"], _case(reduction="none")):
        check_accuracy(case, "triton", dtype, device, case.make(dtype, device, shape))


def test_guards_around_rows_of_odd_width(device):
    case = CASES["none_all"]
    check_guards(Case("cross_entropy", case.fn, lambda *a: case.make(*a, (3, 301)), None), "triton", device)


# --- logits without their last position, or of a padded vocabulary ---

# Two strides each: rows at multiples of 16 bytes, rows between them, several tiles, a padded vocabulary, batch after position.
VIEWS = {
    "aligned": ((3, 3, 304), lambda z: z[:, :-1]),
    "odd": ((3, 3, 301), lambda z: z[:, :-1]),
    "tiles": ((2, 3, 4101), lambda z: z[:, :-1]),
    "padded": ((2, 3, 304), lambda z: z[:, :-1, :301]),
    "turned": ((3, 2, 301), lambda z: z.transpose(0, 1)),
}


def _view_case(name, case):
    shape, view = VIEWS[name]
    return dataclasses.replace(
        case,
        fn=lambda z, backend: case.fn(view(z), backend=backend),
        make=lambda dtype, device: case.make(dtype, device, shape),
        plain=lambda z: case.plain(view(z)),
        empty=None,
    )


@pytest.mark.parametrize("name", VIEWS)
def test_accuracy_of_views(name, device):
    for dtype in (torch.float32, torch.bfloat16):
        check_accuracy(_view_case(name, CASES["none_all"]), "triton", dtype, device)


def test_contract_of_shifted_logits(device):
    check_op(_view_case("odd", CASES["mean"]), "triton", device)


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_read_where_they_lie(name, monkeypatch):
    kernels = pytest.importorskip("fastlm.kernels.cross_entropy")
    launches = []
    for kernel in ("_cross_entropy_fwd_kernel", "_cross_entropy_bwd_kernel"):
        monkeypatch.setattr(kernels, kernel, NoLaunch(launches))
    shape, view = VIEWS[name]
    z = view(torch.randn(shape))
    options = -100, 0.0, 0.0, 1.0, None
    with Allocations() as made:
        loss, statistics = kernels.cross_entropy_fwd(z, _target(z), None, *options)
    assert 2 * loss.numel() == max(made.elements) < z.numel()
    with Allocations() as made:
        dz = kernels.cross_entropy_bwd(loss, z, _target(z), None, statistics, *options)
    assert z.numel() <= max(made.elements) < z.numel() + 8 * loss.numel()
    assert sum(n >= z.numel() for n in made.elements) == 1 and dz.shape == z.shape
    assert [launch["PEEL"] for launch in launches] == [name in ("odd", "tiles", "turned")] * 2


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("common", "(row % inner).to(tl.int64) * stride_inner", "0"),
        ("loss_rows", "row_start(row, inner, stride_outer, stride_inner)", "row * stride_inner"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_planted_bug_in_views_is_seen(file, old, new, device):
    with planted_bug("cross_entropy", old, new, file=file), pytest.raises(AssertionError):
        case = _view_case("odd", CASES["mean"])
        check_accuracy(case, "triton", torch.float32, device)


def test_a_gradient_lies_beside_what_it_is_of():
    common = pytest.importorskip("fastlm.kernels.common")
    whole = torch.empty(4, 5, 6, 301)
    for x in (whole, whole[:, :, :-1], whole[:, :-2], whole[..., :299], whole.transpose(0, 2), whole[:1, :, 1:3],
              whole[:, :1].expand(4, 5, 6, 301), whole[:0], whole[0, 0, 0], whole[..., :1]):  # fmt: skip
        y = common.empty_beside(x)
        assert y.shape == x.shape and (y.is_contiguous() or not x.is_contiguous())
        starts = [torch.empty(0) for _ in range(2)]
        for i, t in enumerate((x, y)):
            starts[i] = sum(
                (s * torch.arange(n).view(-1, *(1,) * (t.ndim - 2 - d)) for d, (n, s) in
                 enumerate(zip(t.shape[:-1], t.stride()))), torch.zeros((), dtype=torch.int64),
            )  # fmt: skip
        assert torch.equal(starts[0] % 8, starts[1] % 8)
        assert y.untyped_storage().nbytes() // 4 <= x.numel() + 8 * starts[0].numel() * 2
        apart = starts[1].flatten().sort().values.diff()
        assert (apart >= x.shape[-1]).all()


def _check_extreme(backend, device):
    generator = torch.Generator().manual_seed(2)
    input = torch.randn(4, 4300, generator=generator)
    input[0, :4200] = -float("inf")  # more than a whole tile
    input[1] *= 300
    input[2] += 1e4
    input[3, 7] = 60.0  # nearly sure
    target = torch.tensor([4250, int(input[1].argmax()), 5, 7])
    input, target = input.to(device).requires_grad_(), target.to(device)
    exact = input.detach().double().requires_grad_()
    loss = cross_entropy(input, target, reduction="none", backend=backend)
    want = cross_entropy(exact, target, reduction="none", backend="reference")
    torch.testing.assert_close(loss, want.float(), rtol=1e-5, atol=1e-6)
    got, want = (torch.autograd.grad(o.sum(), i)[0] for o, i in ((loss, input), (want, exact)))
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_extreme_logits(backend, device):
    _check_extreme(backend, device)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_nothing_but_ignored_rows(backend, reduction, device):
    input = torch.randn(2, 3, 40, device=device, requires_grad=True)
    target = torch.full((2, 3), 3, device=device)
    for options in ({}, ALL, {"weight": _weight(input).detach()}):
        loss = cross_entropy(input, target, ignore_index=3, reduction=reduction, backend=backend, **options)
        assert (loss == 0).all() and loss.dtype == torch.float32
        assert (torch.autograd.grad(loss.sum(), input)[0] == 0).all()
    zero = torch.zeros((), device=device)
    assert cross_entropy(input, target, denominator=zero, backend=backend) == 0


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_token_weights_get_a_gradient(backend, device):
    input = torch.randn(4, 40, device=device)
    target = _target(input)
    weight = torch.rand(4, device=device, requires_grad=True)
    rows = cross_entropy(input, target, reduction="none", backend=backend)
    loss = cross_entropy(input, target, token_weight=weight, denominator=7, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], rows / 7)


def test_a_target_out_of_range(device):
    input = torch.randn(2, 40, device=device)
    for wrong in (40, -1):
        target = torch.tensor([3, wrong], device=device)
        # Where values cannot be read the memory is safe and the loss NaN.
        loss = OP.forward(input, target, None, -100, 0.0, 0.0, 1.0, None, "triton")[0]
        assert loss.isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match=r"target must be in \[0, 40\) or ignore_index=-100, got -1"):
        cross_entropy(input.cpu(), target.cpu())


@pytest.mark.parametrize(
    "old, new",
    [
        ("if full < end:\n            state", "if full + BLOCK_V < end:\n            state"),
        ("(lane >= first) & (lane < end), weight_ptr, state", "(lane >= 0) & (lane < end), weight_ptr, state"),
        ("at - first == target", "at == target"),
        ("spread * (weight_sum * p - w)", "spread * (p - w)"),
        ("g += pull * p", "g += 0.0"),
        ("(p - tl.where(", "(0.0 - tl.where("),
        ("if target != ignore_index:\n        _,", "if target > ignore_index - 9:\n        _,"),
        ("share *= tl.load(weight_ptr + index)", "share *= 1.0"),
        ("factor = tl.load(factor_ptr + row)", "factor = tl.load(factor_ptr)"),
    ],
    ids=["tail", "peel", "column", "smoothing", "z_loss", "softmax", "ignored", "class_weight", "factor"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_planted_bug_is_seen(old, new, device):
    with planted_bug("cross_entropy", old, new), pytest.raises(AssertionError):
        for case in (CASES["none_all"], CASES["sum_smooth"]):
            check_accuracy(case, "triton", torch.float32, device)
            for width in (301, 304):
                check_accuracy(case, "triton", torch.float32, device, case.make(torch.float32, device, (4, width)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_rounded_log_sum_exp_is_seen(device):
    with planted_bug("cross_entropy", "(x - peak) - log_sum", "x - (peak + log_sum)"), pytest.raises(AssertionError):
        _check_extreme("triton", device)


def test_explain_and_errors():
    input = torch.randn(2, 3, 11)
    target = torch.zeros(2, 3, dtype=torch.int64)
    assert explain(cross_entropy, input, target).backend == "torch"

    def fails(error, message, *args, **options):
        with pytest.raises(error, match="cross_entropy: " + message):
            cross_entropy(*args, **options)

    fails(ValueError, r"input must be \[..., V\] and target", input.movedim(-1, 1), target)
    fails(TypeError, "target must be int64 class numbers, got .*kl_div", input, torch.rand(2, 3))
    fails(ValueError, r"weight must be \[11\]", input, target, torch.ones(10))
    fails(ValueError, "token_weight must be", input, target, token_weight=torch.ones(3))
    fails(ValueError, "reduction must be", input, target, reduction="avg")
    fails(ValueError, r"label_smoothing must be in \[0, 1\]", input, target, label_smoothing=1.5)
    for softcap in (0.0, 1e-46, 1e39, float("inf")):  # 0, or infinite, in the fp32 of kernels
        fails(ValueError, "softcap must be > 0", input, target, softcap=softcap)
    fails(ValueError, "z_loss must be >= 0", input, target, z_loss=-1.0)
    fails(ValueError, "denominator is what", input, target, reduction="sum", denominator=3)
    fails(ValueError, "denominator must be", input, target, denominator=torch.ones(2))
    fails(ValueError, ".*got float64", input.double(), target, backend="triton")
