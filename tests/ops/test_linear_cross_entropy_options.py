"""linear_cross_entropy's options: every combination in fp64 against plain torch, pairs of them in the kernels, and memory."""

import itertools
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.ops.linear_cross_entropy import OP
from fastlm.testing import Case, check_accuracy
from tests.ops.allocations import peak_bytes

# name -> values; the flags say whether a tensor is there.
OPTIONS = {
    "bias": (False, True),
    "scale": (1.0, 0.7),
    "softcap": (None, 4.0),
    "label_smoothing": (0.0, 0.1),
    "z_loss": (0.0, 0.02),
    "class_weights": (False, True),
    "token_weights": (False, True),
    "ignored": (False, True),
    "reduction": ("mean", "sum", "none", "mean of 7.5"),
}
COMBINATIONS = [dict(zip(OPTIONS, values)) for values in itertools.product(*OPTIONS.values())]


def _pairs(options):
    return set(itertools.combinations(sorted(options.items(), key=str), 2))


def _covering():
    """A few combinations in which every pair of values of two options occurs: always the one with most pairs not yet seen."""
    left, found = set().union(*map(_pairs, COMBINATIONS)), []
    while left:
        best = max(COMBINATIONS, key=lambda c: len(_pairs(c) & left))
        found.append(best)
        left -= _pairs(best)
    return found


def _tensors(dtype, device="cpu", rows=7, width=3, classes=11):
    """input, weight, bias, target with ignored rows, class weights, token weights."""
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    target = torch.randint(0, classes, (rows,), device=device)
    class_weight = torch.rand(classes, dtype=torch.float64, device=device)
    # Values of the constants are short in binary: the rule judges what is done with them, not how plain torch rounds them.
    short = lambda t: (t * 64).round() / 64  # noqa: E731
    return (make(rows, width), make(classes, width), make(classes), target, short(class_weight + 0.5),
            short(torch.randn(rows, dtype=torch.float64, device=device)))  # fmt: skip


def _chosen(options, target, class_weight, token_weight):
    """The target and keywords of ops.linear_cross_entropy for a combination."""
    reduction = options["reduction"]
    if options["ignored"]:
        target = target.clone()
        target[1::3] = 5  # also a class that rows have
    keywords = {name: options[name] for name in ("scale", "softcap", "label_smoothing", "z_loss")}
    return target, keywords | {
        "ignore_index": 5 if options["ignored"] else -100,
        "weight": class_weight if options["class_weights"] else None,
        "token_weight": token_weight if options["token_weights"] else None,
        "reduction": reduction.split(" ")[0],
        "denominator": 7.5 if "of" in reduction else None,
    }


def _by_hand(input, linear_weight, bias, target, *, scale, softcap, label_smoothing, z_loss, ignore_index, weight,
             token_weight, reduction, denominator):  # fmt: skip
    """The loss in plain torch, in input's dtype."""
    z = scale * F.linear(input, linear_weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    w = None if weight is None else weight.to(z.dtype)
    live = target != ignore_index
    loss = F.cross_entropy(z, target, w, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    loss = loss + z_loss * (z.logsumexp(-1) ** 2).where(live, 0)
    if token_weight is not None:
        loss = loss * token_weight.to(z.dtype)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (denominator or (live.sum() if w is None else w[target[live]].sum()))


@pytest.fixture(autouse=True)
def chunked(monkeypatch):
    """Chunks for these small shapes too, which the CPU would leave to torch's own calls."""
    monkeypatch.setattr(sys.modules["fastlm.ops.linear_cross_entropy"], "_SMALL", 0)


def _graded(fn, inputs):
    loss = fn(*inputs)
    return [loss, *torch.autograd.grad(loss.square().sum(), [t for t in inputs if t is not None])]


@pytest.mark.parametrize("reduction", OPTIONS["reduction"])
def test_every_combination_in_fp64(reduction, monkeypatch):
    """Reference and torch form against plain torch; chunks of 1, 5 and all rows give the same."""
    for options in (c for c in COMBINATIONS if c["reduction"] == reduction):
        _check_in_fp64(options)


def _check_in_fp64(options):
    input, weight, bias, *others = _tensors(torch.float64)
    inputs = [t.requires_grad_() for t in (input, weight)] + [bias.requires_grad_() if options["bias"] else None]
    target, keywords = _chosen(options, *others)
    want = _graded(lambda h, w, b: _by_hand(h, w, b, target, **keywords), inputs)
    for backend, budget in (("reference", None), ("torch", None), ("torch", 11 * 8), ("torch", 5 * 11 * 8)):
        run = partial(ops.linear_cross_entropy, backend=backend, logits_bytes=budget, **keywords)
        results = _graded(lambda h, w, b, run=run: run(h, w, target, linear_bias=b), inputs)
        for got, expected in zip(results, want, strict=True):
            torch.testing.assert_close(
                got, expected, rtol=1e-12, atol=1e-13, msg=lambda m, at=(backend, budget): f"{at}, {options}: {m}"
            )


@pytest.mark.parametrize("options", _covering(), ids=lambda o: "-".join(str(v) for v in o.values()))
def test_pairs_in_the_kernels(options, device):
    """fp32 and bf16, three rows a chunk, under the accuracy rule; small problems in torch's own calls too."""
    others = _tensors(torch.float64, device, 7, 24, 150)[3:]
    target, keywords = _chosen(options, *others)

    def fn(input, weight, *bias, backend):
        return ops.linear_cross_entropy(input, weight, target, linear_bias=bias[0] if bias else None, backend=backend,
                                        logits_bytes=3 * 150 * 4, **keywords)  # fmt: skip

    def plain(input, weight, *bias):
        return _by_hand(input, weight, bias[0] if bias else None, target, **keywords)

    def make(dtype, device):
        return _tensors(dtype, device, 7, 24, 150)[: 3 if options["bias"] else 2]

    case = Case("linear_cross_entropy", fn, make, make, plain=plain)
    for dtype in (torch.float32, torch.bfloat16):
        draws = [make(dtype, device) for _ in range(3)]
        check_accuracy(case, "triton", dtype, device, draws)
        check_accuracy(case, "torch", dtype, device, draws)


def test_the_covering_has_every_pair():
    seen = set().union(*map(_pairs, _covering()))
    assert len(_covering()) < 16 and seen == set().union(*map(_pairs, COMBINATIONS))


@pytest.mark.parametrize("token_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_problems_are_left_to_torch(dtype, token_weights, monkeypatch):
    """torch's own two calls know the other options too."""
    monkeypatch.setattr(sys.modules["fastlm.ops.linear_cross_entropy"], "_SMALL", 1 << 20)
    monkeypatch.setattr(OP, "forward", None)
    given = {"softcap": None, "z_loss": 0.0, "token_weights": token_weights, "bias": True}
    for options in (c for c in COMBINATIONS if c == c | given):
        target, keywords = _chosen(options, *_tensors(dtype)[3:])
        _check_left_to_torch(dtype, target, keywords)


def _check_left_to_torch(dtype, target, keywords):
    def fn(input, weight, bias, backend):
        return ops.linear_cross_entropy(input, weight, target, linear_bias=bias, backend=backend, **keywords)

    make = lambda dtype, device: _tensors(dtype, device)[:3]  # noqa: E731
    plain = lambda *a: _by_hand(*a, target, **keywords)  # noqa: E731
    draws = [make(dtype, "cpu") for _ in range(3)]
    check_accuracy(Case("linear_cross_entropy", fn, make, make, plain=plain), "torch", dtype, "cpu", draws)


@pytest.mark.parametrize("backend", ("reference", "torch", "triton"))
def test_a_denominator_on_the_device(backend, device):
    input, weight, bias, target, class_weight, token_weight = _tensors(torch.float32, device)
    inputs = [t.requires_grad_() for t in (input, weight)]
    call = lambda d: ops.linear_cross_entropy(input, weight, target, denominator=d, backend=backend)  # noqa: E731
    by_number, by_tensor = (
        [call(d), *torch.autograd.grad(call(d), inputs)] for d in (13, torch.tensor(13, device=device))
    )
    for a, b in zip(by_number, by_tensor):
        assert torch.equal(a, b)
    for zero in (0, torch.tensor(0.0, device=device)):
        loss = call(zero)
        assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("backend", ("reference", "torch", "triton"))
def test_ignored_rows_may_have_any_token_weight(backend, device):
    input, weight, _, target, _, token_weight = _tensors(torch.float32, device)
    target[2], token_weight[2] = -100, float("inf")
    for reduction in ("mean", "sum", "none"):
        inputs = [t.requires_grad_() for t in (input, weight)]
        loss = ops.linear_cross_entropy(
            *inputs, target, token_weight=token_weight, reduction=reduction, backend=backend
        )
        grads = torch.autograd.grad(loss.sum(), inputs)
        assert all(t.isfinite().all() for t in (loss, *grads)) and (grads[0][2] == 0).all()


def test_names_of_torch():
    """Code written for torch.nn.functional.linear_cross_entropy runs unchanged."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch has it from 2.13 on")
    input, weight, bias, target, class_weight, _ = _tensors(torch.float64)
    keywords = {"linear_bias": bias, "weight": class_weight, "reduction": "mean", "ignore_index": None}
    for more in ({}, {"label_smoothing": 0.1}):
        got, want = (
            f(input, weight, target, **keywords, **more) for f in (ops.linear_cross_entropy, F.linear_cross_entropy)
        )
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


# --- memory ---


@pytest.mark.parametrize("sum_dtype, chunks", [(None, 4), (torch.bfloat16, 4), (torch.bfloat16, 64)])
@pytest.mark.parametrize("factor, reduction", [(1, "mean"), (3, "mean"), (3, "none")])
def test_peak_memory(sum_dtype, chunks, factor, reduction):
    """Forward and backward hold no more logits than their budget, the weight's gradient once (in the dtype of its sum), input's,
    and little more. The shape is 8192 x 4096 x 128256 with 16 times fewer of each."""
    rows, width, classes = 512, 256, 8016
    input = torch.randn(rows, width).bfloat16().requires_grad_()
    weight = torch.randn(classes, width).bfloat16().requires_grad_()
    target = torch.randint(0, classes, (rows,))
    logits_bytes = rows * classes * 2 // chunks

    def step():
        loss = ops.linear_cross_entropy(input, weight, target, weight_grad_dtype=sum_dtype, logits_bytes=logits_bytes,
                                        reduction=reduction, backend="torch")  # fmt: skip
        (loss * factor).sum().backward()
        input.grad = weight.grad = None

    step()
    gradients = weight.numel() * (2 if sum_dtype else 4) + input.numel() * 2
    # Scratch: rows in fp32 that fit the cache, parts of a product.
    assert peak_bytes(step) <= logits_bytes + gradients + (3 << 20)
