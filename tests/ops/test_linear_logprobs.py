from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.kernels import chunked_loss
from fastlm.ops.linear_logprobs import OP
from fastlm.testing import (
    Case,
    assert_accurate,
    check_accuracy,
    check_autocast,
    check_compile,
    check_double_backward,
    check_guards,
    check_op,
    check_reference,
    check_safety,
    check_strides,
    planted_bug,
)
from tests.ops.allocations import peak_bytes

BACKENDS = ("torch", "triton")
RICH = {"scale": 0.7, "softcap": 6.0}


def _args(dtype, device, shape=(2, 4, 24), classes=300, scale=1.0):
    """input, weight, bias and targets of which some are ignored."""
    input = torch.randn(shape, dtype=torch.float64)
    weight = scale * torch.randn(classes, shape[-1], dtype=torch.float64) / shape[-1] ** 0.5
    bias = torch.randn(classes, dtype=torch.float64)
    target = torch.randint(0, classes, shape[:-1])
    target.view(-1)[1::3] = -100
    return *(t.to(dtype).to(device) for t in (input, weight, bias)), target.to(device)


def _plain(input, weight, bias, target, scale=1.0, softcap=None):
    """What a user writes, in the inputs' own dtype."""
    z = scale * F.linear(input, weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp, live = z.log_softmax(-1), target != -100
    picked = logp.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return tuple(t.where(live, 0) for t in (picked, z.logsumexp(-1), -(logp.exp() * logp).sum(-1)))


def _case(logits_bytes=None, **options):
    def fn(input, weight, bias, target, backend):
        found = ops.linear_logprobs(input, weight, target, linear_bias=bias, logits_bytes=logits_bytes, backend=backend,
                                    **options)  # fmt: skip
        return tuple(found[:3])

    return Case(
        "linear_logprobs",
        fn,
        _args,
        lambda dtype, device: _args(dtype, device, (3, 3), 5),
        plain=partial(_plain, **options),
        empty=lambda dtype, device: _args(dtype, device, (0, 8), 5),
    )


BARE, CAPPED = _case(), _case(**RICH)
CASES = pytest.mark.parametrize("case", [BARE, CAPPED], ids=["bare", "capped"])


@pytest.fixture
def small_chunks(monkeypatch):
    """Three rows per chunk, for 300 fp32 logits. So the CPU does not keep the logits."""
    monkeypatch.setattr(chunked_loss, "LOGITS_BYTES", dict.fromkeys(("cpu", "cuda"), 3 * 300 * 4))


@CASES
def test_reference(case):
    check_reference(case)


@pytest.mark.parametrize(
    "case, backend", [(CAPPED, "torch"), (BARE, "triton"), (CAPPED, "triton")], ids=["torch", "bare", "capped"]
)
def test_contract(case, backend, device, small_chunks, monkeypatch):
    if case is BARE:
        monkeypatch.setitem(chunked_loss.ROW_MULTIPLE, "cpu", 16)  # padded rows, as on a GPU
    check_op(case, backend, device)


@CASES
@pytest.mark.parametrize("dtype", BARE.dtypes, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(case, backend, dtype, device, small_chunks):
    check_accuracy(case, backend, dtype, device)


@CASES
def test_logits_that_fit_are_kept_on_the_cpu(case, monkeypatch):
    monkeypatch.setattr(OP, "forward", None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        check_accuracy(case, "torch", dtype, "cpu")
    for check in (check_safety, check_guards, check_strides, check_autocast, check_compile, check_double_backward):
        check(case, "torch", "cpu")
    with pytest.raises(TypeError, match="not callable"):
        case.fn(*_args(torch.float32, "cpu", (1000, 8), 30000), backend="auto")


def test_against_plain_torch_in_fp64():
    """Reference, torch form with kept logits and in chunks of 1, 5 and all rows; every combination of upstream gradients."""
    *inputs, target = _args(torch.float64, "cpu", (13, 6), 37)
    inputs = [t.requires_grad_() for t in inputs]
    up = torch.randn(3, 13, dtype=torch.float64)
    for options in ({}, RICH):
        for used in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
            pick = lambda outs, used=used: sum((outs[i] * up[i]).sum() for i in used)  # noqa: E731
            want = _plain(*inputs, target, **options)
            grads = torch.autograd.grad(pick(want), inputs)
            for backend, rows in (("reference", 99), ("torch", 99), ("torch", 1), ("torch", 5), ("torch", 12)):
                got = ops.linear_logprobs(*inputs[:2], target, linear_bias=inputs[2], backend=backend,
                                          logits_bytes=rows * 37 * 8, **options)  # fmt: skip
                torch.testing.assert_close(tuple(got[:3]), want, rtol=1e-12, atol=1e-13)
                torch.testing.assert_close(torch.autograd.grad(pick(got), inputs), grads, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_hit(backend, device, small_chunks):
    input, weight, bias, target = _args(torch.float32, device)
    best = F.linear(input, weight, bias).argmax(-1)
    target[0] = best[0]
    target[0, 3] = -100
    target[1, 0], target[1, 2] = best[1, 0], (best[1, 2] + 1) % 300
    found = ops.linear_logprobs(input, weight, target, linear_bias=bias, backend=backend)
    assert found.hit.dtype == torch.bool and not found.hit.requires_grad
    assert torch.equal(found.hit, (best == target) & (target != -100)) and found.hit.sum() == 4
    for t in found:
        assert (t[0, 3] == 0).all()


@pytest.mark.parametrize("classes", [1, 16, 123, 4096, 8300])
@pytest.mark.parametrize("backend", BACKENDS)
def test_widths(backend, classes, device):
    args = _args(torch.float32, device, (3, 8), classes)
    case = _case(logits_bytes=1)
    check_accuracy(case, backend, torch.float32, device, args)


def _check_sharp(backend, device):
    """Huge logits, and entropies from 1 down to nothing."""
    for scale in (3.0, 20.0, 3000.0):
        args = _args(torch.float32, device, scale=scale)
        args[3][0] = F.linear(*args[:3])[0].argmax(-1)
        check_accuracy(_case(logits_bytes=1), backend, torch.float32, device, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sharp_distributions(backend, device):
    _check_sharp(backend, device)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_classes_that_are_ruled_out(backend, kept, device):
    """They add nothing: the result of the other classes alone."""
    input, weight, bias, target = _args(torch.float32, device, (6, 8), 8292)
    bias[:8200] = float("-inf")  # more than a whole tile
    target[target >= 0] = 8200 + target[target >= 0] % 92
    few = weight[8200:], bias[8200:], target.where(target < 0, target - 8200)
    budget = None if kept else 1

    def run(weight, bias, target):
        inputs = [t.detach().requires_grad_() for t in (input, weight, bias)]
        found = ops.linear_logprobs(*inputs[:2], target, linear_bias=inputs[2], backend=backend, logits_bytes=budget)
        up = torch.linspace(-1, 1, 18, device=device).view(3, 6)
        grads = torch.autograd.grad(sum((t * u).sum() for t, u in zip(found[:3], up)), inputs)
        return *found[:3], grads[0], grads[1][-92:], grads[2][-92:]

    for got, want in zip(run(weight, bias, target), run(*few)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_nothing_but_ignored_rows(backend, device, small_chunks):
    input, weight, bias, target = _args(torch.float32, device)
    inputs = [t.requires_grad_() for t in (input, weight, bias)]
    input.data[0, 0] = float("inf")  # an ignored row may hold anything
    found = ops.linear_logprobs(*inputs[:2], target.fill_(3), linear_bias=bias, ignore_index=3, backend=backend)
    assert all((t == 0).all() for t in found)
    if backend != "reference":
        grads = torch.autograd.grad(sum(t.sum() for t in found[:3]), inputs)
        assert (grads[0] == 0).all() and (grads[2] == 0).all()


# --- losses written on it, as its docstring shows ---


def _losses(logp, entropy, others):
    """SFT, DPO and GRPO losses of logp [4, S], from logp of other models, a mask, advantages; pairs are rows 0, 1 and 2, 3."""
    old, ref, mask, a = others
    beta, eps, c = 0.3, 0.2, 0.01
    sft = -(logp * mask).sum() / mask.sum()
    score = ((logp - ref) * mask).sum(-1)
    dpo = -F.logsigmoid(beta * (score[0::2] - score[1::2])).mean()
    r = (logp - old).exp()
    grpo = (
        -(torch.minimum(r * a, r.clamp(1 - eps, 1 + eps) * a) * mask).sum() / mask.sum() - c * (entropy * mask).mean()
    )
    return sft, dpo, grpo


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_losses_written_on_it(backend, device):
    *inputs, target = _args(torch.float32, device, (4, 3, 8), 50)
    old, ref = _plain(*inputs, target)[0] + torch.randn(2, 4, 3, device=device) * torch.tensor([[[0.2]], [[1.0]]]).to(
        device
    )
    others = old, ref, (target != -100).float(), torch.randn(4, 1, device=device)

    def ours(input, weight, bias):
        return ops.linear_logprobs(input, weight, target, linear_bias=bias, logits_bytes=5 * 50 * 4, backend=backend)

    def run(fn, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        logp, _, entropy = fn(*leaves)[:3]
        losses = _losses(logp, entropy, [t.to(dtype) for t in others])
        return [(loss, *torch.autograd.grad(loss, leaves, retain_graph=True)) for loss in losses]

    plain = lambda *a: _plain(*a, target)  # noqa: E731
    found = zip(run(ours, torch.float32), run(plain, torch.float64), run(plain, torch.float32))
    for name, results in zip(("sft", "dpo", "grpo"), found):
        for got, exact, base in zip(*results):
            assert_accurate(got, exact, base, name)


def test_logits_are_never_whole():
    rows, width, classes = 512, 32, 4096
    input, weight, _, target = _args(torch.float32, "cpu", (rows, width), classes)
    inputs = input.requires_grad_(), weight.requires_grad_()

    def step():
        found = ops.linear_logprobs(*inputs, target, logits_bytes=rows * classes * 4 // 16, backend="torch")
        torch.autograd.grad((found.logp + found.lse + found.entropy).sum(), inputs)

    step()
    # Whole logits are 8 MiB; a chunk is 0.5, its scratch as much three times, the weight's gradient 0.5 twice.
    assert peak_bytes(step) <= 4 << 20


def test_a_target_out_of_range(device):
    input, weight, bias, target = _args(torch.float32, device, (2, 3, 8), 11)
    for wrong in (11, -1):
        target[1, 2] = wrong
        for backend in BACKENDS:  # where values cannot be read the memory is safe and the result NaN
            logp = OP.forward(input, weight, bias, target, -100, 1.0, None, None, backend)[0]
            assert logp[1, 2].isnan() and logp.isnan().sum() == 1
    with pytest.raises(ValueError, match=r"target must be in \[0, 11\) or ignore_index=-100, got -1"):
        ops.linear_logprobs(input.cpu(), weight.cpu(), target.cpu())


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("loss_rows", "(moments + step * sums) * shrink", "moments * shrink"),  # moments not moved to the new maximum
        ("loss_rows", "x = tl.where(mask, x, float(\"-inf\"))", "x = tl.where(mask, x, 0.0)"),
        (None, "(x - peak) - log_sum", "(x - peak)"),
        (None, "tl.where(col == target, 1.0, 0.0)", "tl.where(col == target, 0.0, 0.0)"),
        (None, "p * (log_p + height)", "p * log_p"),
        (None, "g += everywhere * p", "g += 0.0"),
        (None, "live = target != ignore_index", "live = target != ignore_index - 1"),
        (None, "    if full < V:\n        peak", "    if full < V - BLOCK_V:\n        peak"),
        (None, "    if full < V:\n        _write", "    if full < V - BLOCK_V:\n        _write"),
    ],
    ids=["moments", "mask", "log_sum", "onehot", "entropy", "lse", "ignored", "tail_read", "tail_written"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_planted_bug_is_seen(file, old, new, device, small_chunks):
    with planted_bug("linear_logprobs", old, new, file=file), pytest.raises(AssertionError):
        check_accuracy(BARE, "triton", torch.float32, device)
        args = _args(torch.float32, device, (3, 8), 8300)
        args[2].copy_(torch.linspace(-9, 9, 8300))  # the maximum grows from tile to tile
        check_accuracy(BARE, "triton", torch.float32, device, args)
        check_guards(BARE, "triton", device)


@pytest.mark.parametrize(
    "old, new",
    [("log_sum - moments / sums", "log_sum + moments / sums"), ("-dlogp, dlse", "dlogp, dlse")],
    ids=["entropy", "sign"],
)
def test_planted_bug_in_the_loop_is_seen(old, new, device, small_chunks):
    with planted_bug("linear_logprobs", old, new, file="chunked_loss"), pytest.raises(AssertionError):
        check_accuracy(BARE, "triton", torch.float32, device)


def test_explain_and_errors():
    input, weight, bias, target = _args(torch.float32, "cpu", (2, 3, 8), 11)
    assert ops.explain(ops.linear_logprobs, input, weight, target).backend == "torch"
    fails = lambda error, message, *args, **kw: _fails(error, "linear_logprobs: " + message, args, **kw)  # noqa: E731
    fails(ValueError, r"input must be \[..., 8\]", input[..., :7], weight, target)
    fails(ValueError, r"target must be \[2, 3\] like input's rows, got \[3\]", input, weight, target[0])
    fails(ValueError, r"linear_bias must be \[11\]", input, weight, target, linear_bias=bias[:4])
    fails(TypeError, "target must be int64", input, weight, target.int())
    fails(ValueError, "softcap must be > 0", input, weight, target, softcap=-1.0)
    fails(ValueError, "logits_bytes must be > 0", input, weight, target, logits_bytes=0)
    fails(ValueError, r"target must be in \[0, 11\) or ignore_index=-100, got 11", input, weight, target.fill_(11))
    fails(ValueError, ".*got float64", input.double(), weight, target.fill_(0), backend="triton")


def _fails(error, message, args, **kwargs):
    with pytest.raises(error, match=message):
        ops.linear_logprobs(*args, **kwargs)
