"""What the losses have in common at the edges of dtypes and of autograd."""

import pytest
import torch
import torch.nn.functional as F

from fastlm import nn, ops
from fastlm.ops import loss_rows

BACKENDS = ("torch", "triton")
EACH = pytest.mark.parametrize("backend", BACKENDS)
WITH_REFERENCE = pytest.mark.parametrize("backend", ("reference", *BACKENDS))


def _divergences(x, y, backend, **options):
    """The same loss by kl_div and by linear_kl_div, whose products with the identity change nothing."""
    whole = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    yield lambda x: ops.kl_div(x, y, backend=backend, **options)
    yield lambda x: ops.linear_kl_div(x, whole, y, whole, backend=backend, **options)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@EACH
def test_mixtures_of_subnormal_probabilities(backend, beta, device):
    """Halves of the smallest subnormals round to 0."""
    x = torch.tensor([[0.0, -103.9, -103.5, -102.0, -88.0]], device=device).requires_grad_()
    y = torch.tensor([[0.0, -105.0, -104.5, -103.3, -90.0]], device=device)
    for fn in _divergences(x, y, backend, beta=beta):
        loss = fn(x)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.abs() < 1e-30 and gradient.abs().max() < 1e-30, (loss, gradient)
    nothing = torch.full_like(y, float("nan"))
    for fn in _divergences(x, nothing, backend, beta=beta):
        assert fn(x).isnan() and torch.autograd.grad(fn(x), x)[0].isnan().all()


def _linear_losses(hidden, weight, backend, **options):
    """Losses of rows whose target is class 2, and of rows whose teacher is sure of it."""
    target = torch.full(hidden.shape[:-1], 2, device=hidden.device)
    teacher = torch.zeros(weight.shape[0], 1, dtype=hidden.dtype, device=hidden.device)
    teacher[2] = 20
    ones = torch.ones_like(hidden[:, :1])
    yield ops.linear_cross_entropy(hidden, weight, target, z_loss=1e-9, backend=backend, **options)
    yield ops.linear_kl_div(hidden, weight, ones, teacher, backend=backend, **options)


def _like_tokens(backend, device, rows, peak=1.0, share=1.0, logits_bytes=None, far=False, **options):
    """The gradient of `rows` tokens alike, in fp16, against fp64's. peak: every token weight; far: a class is rare."""
    hidden = torch.full((rows, 2), 3.0, device=device).half()
    weight = torch.tensor([[0.1, 0.2], [0.3, 0.1], [-0.2, 0.3], [-1.5, -1.0]], device=device).half()[: 3 + far]
    if peak != 1:
        options["token_weight"] = torch.full((rows,), peak, device=device)
    found = []
    for dtype, name in ((torch.float16, backend), (torch.float64, "reference")):
        w = weight.to(dtype).requires_grad_()
        losses = _linear_losses(hidden.to(dtype), w, name, logits_bytes=logits_bytes, **options)
        found.append([(loss.detach(), *torch.autograd.grad(loss * share, w)) for loss in losses])
    for got, want in zip(*found, strict=True):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.double(), w, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("logits_bytes", [None, 1 << 18])
def test_a_sum_over_like_tokens_stays_in_fp16(logits_bytes, device):
    _like_tokens("torch", device, 100000, logits_bytes=logits_bytes)
    _like_tokens("torch", device, 100000, logits_bytes=logits_bytes, reduction="sum", share=1e-5)


@pytest.mark.parametrize("reduction, share", [("mean", 0.1), ("sum", 1e-5)])
@EACH
def test_large_token_weights_stay_in_fp16(backend, reduction, share, device):
    rows = 4096 if backend == "torch" else 64
    _like_tokens(backend, device, rows, peak=100.0 * 4096 / rows, share=share / 4096 * rows, reduction=reduction)


@EACH
def test_a_large_denominator_costs_no_digits_in_fp16(backend, device):
    """Few rows of a large batch: gradients of 1e-6, times the loss's scale."""
    _like_tokens(backend, device, 8, far=True, denominator=1e6, share=1e5)
    _like_tokens(backend, device, 8, far=True, denominator=torch.tensor(1e6), share=1e5)


@EACH
def test_fp16_without_a_row_that_counts(backend, device):
    """Whatever the weights of the rows that do not count."""
    for rows in (0, 5):
        hidden = torch.ones(rows, 2, device=device).half()
        weight = torch.ones(3, 2, device=device).half().requires_grad_()
        bad = torch.full((rows,), float("nan"), device=device)
        target = torch.full((rows,), -100, device=device)
        losses = (
            ops.linear_cross_entropy(hidden, weight, target, token_weight=bad, z_loss=0.1, backend=backend),
            ops.linear_kl_div(hidden, weight, hidden, weight, mask=target != -100, token_weight=bad, backend=backend),
        )
        for loss in losses:
            assert loss == 0 and not torch.autograd.grad(loss, weight)[0].any()


def _every_loss(backend):
    """name -> loss of (hidden, weight, teacher's hidden, teacher's weight, target, options), all 0-d."""
    linear = F.linear
    losses = {
        "cross_entropy": lambda h, w, th, tw, t, **o: ops.cross_entropy(linear(h, w), t, backend=backend, **o),
        "linear_cross_entropy": lambda h, w, th, tw, t, **o: ops.linear_cross_entropy(
            h, w, t, z_loss=0.1, backend=backend, **o
        ),
    }
    for beta in (0.0, 0.5):
        losses[f"kl_div {beta}"] = lambda h, w, th, tw, t, beta=beta, **o: ops.kl_div(
            linear(h, w), linear(th, tw), beta=beta, mask=t >= 0, backend=backend, **o
        )
        losses[f"linear_kl_div {beta}"] = lambda h, w, th, tw, t, beta=beta, **o: ops.linear_kl_div(
            h, w, th, tw, beta=beta, mask=t >= 0, backend=backend, **o
        )
    return losses


def _tensors(device, rows=6, dtype=torch.float32):
    hidden, weight = (torch.randn(n, 4, device=device).to(dtype).requires_grad_() for n in (rows, 19))
    target = torch.randint(0, 19, (rows,), device=device)
    target[1] = -100
    return hidden, weight, torch.randn(rows, 3, device=device), torch.randn(19, 3, device=device), target


@WITH_REFERENCE
def test_a_teacher_in_inference_mode(backend, device):
    hidden, weight, th, tw, target = _tensors(device)
    with torch.inference_mode():
        ith, itw, logits, mask = th * 1, tw * 1, F.linear(th, tw), target >= 0
    for beta in (0.0, 0.5, 1.0):
        for of_mask in (None, mask):
            options = {"beta": beta, "backend": backend}
            plain = {**options, "mask": None if of_mask is None else target >= 0}
            options["mask"] = of_mask
            pairs = [
                (
                    ops.linear_kl_div(hidden, weight, ith, itw, **options),
                    ops.linear_kl_div(hidden, weight, th, tw, **plain),
                ),
                (
                    ops.linear_kl_div(hidden, weight, ith, itw, reduction="none", **options).sum(),
                    ops.linear_kl_div(hidden, weight, th, tw, reduction="none", **plain).sum(),
                ),
                (
                    ops.kl_div(F.linear(hidden, weight), logits, **options),
                    ops.kl_div(F.linear(hidden, weight), F.linear(th, tw), **plain),
                ),
            ]
            for got, want in pairs:
                for graph in (True, False):
                    a, b = (
                        torch.autograd.grad(x, (hidden, weight), retain_graph=True, create_graph=graph)
                        for x in (got, want)
                    )
                    assert all(torch.equal(x, y) for x, y in zip(a, b))


@WITH_REFERENCE
def test_a_denominator_is_a_constant(backend, device):
    for name, loss in _every_loss(backend).items():
        with pytest.raises(
            ValueError, match=f"{name.split()[0]}: denominator must be a number or a 0-d tensor that requires"
        ):
            loss(*_tensors(device), denominator=torch.tensor(3.0, device=device, requires_grad=True))


def test_a_denominator_from_the_cpu(device, monkeypatch):
    """It is moved to the logits' device, as in linear_cross_entropy."""
    seen = []
    real = ops.linear_kl_div.__globals__["checks"].mean_denominator
    monkeypatch.setattr(
        ops.linear_kl_div.__globals__["checks"], "mean_denominator", lambda d, *rest: seen.append(d) or real(d, *rest)
    )
    three = torch.tensor(3.0)
    loss = _every_loss("torch")["linear_kl_div 0.5"]
    tensors = _tensors(device)
    torch.testing.assert_close(loss(*tensors, denominator=three), loss(*tensors, denominator=3))
    assert seen[0] is three


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@WITH_REFERENCE
def test_an_ignored_row_of_cross_entropy_may_hold_anything(backend, reduction, bad, device):
    input = torch.randn(4, 19, device=device)
    input[1, 3:] = bad
    input.requires_grad_()
    target = torch.tensor([3, -100, 0, 18], device=device)
    for options in ({}, {"softcap": 4.0, "scale": 0.7}, {"z_loss": 0.1, "label_smoothing": 0.1}):
        loss = ops.cross_entropy(input, target, reduction=reduction, backend=backend, **options)
        (gradient,) = torch.autograd.grad(loss, input)
        assert loss.isfinite() and gradient.isfinite().all() and not gradient[1].any() and gradient[0].any()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@WITH_REFERENCE
def test_logits_of_an_ignored_row_may_overflow(backend, z_loss, device):
    hidden, weight, _, _, target = _tensors(device, dtype=torch.float16)
    hidden.data[1] = 60000
    loss = ops.linear_cross_entropy(hidden, weight, target, z_loss=z_loss, backend=backend)
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert gradient.isfinite().all()


def test_a_target_out_of_range_under_compile():
    """Values are not looked at there, nor on a GPU."""
    input = torch.randn(3, 7, requires_grad=True)
    fn = torch.compile(lambda x, t: ops.cross_entropy(x, t, backend="torch"), backend="aot_eager", fullgraph=True)
    assert fn(input, torch.tensor([1, -100, 6])).isfinite()
    assert fn(input, torch.tensor([1, -100, 7])).isnan()


@EACH
def test_a_batch_of_cotangents(backend, device):
    """autograd.grad(is_grads_batched=True), as torch.autograd.functional.jacobian(vectorize=True) calls it."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = _tensors(device, dtype=dtype)
        for name, loss in _every_loss(backend).items():
            if not name.startswith("linear"):
                continue
            each = loss(*tensors)
            up = torch.tensor([1.0, -2.0], device=device)
            both = torch.autograd.grad(each, tensors[:2], up, is_grads_batched=True, retain_graph=True)
            one = torch.autograd.grad(each, tensors[:2])
            for got, want in zip(both, one, strict=True):
                assert torch.equal(got, torch.stack((want, -2 * want))), name


def test_the_careful_path_alone_where_a_look_would_wait(monkeypatch):
    """torch_rows off the CPU: no host sync. A meta tensor stands for any device, and has no values to look at."""
    from fastlm.ops.kl_div import torch_rows

    x = torch.empty(3, 7, device="meta")
    for beta in (0.0, 0.5, 1.0):
        torch_rows(x, x, None, None, x.new_empty(3), torch.empty_like(x), beta, 1.0)


@WITH_REFERENCE
def test_hidden_states_of_no_width(backend, device):
    """All logits are 0."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = (
            torch.zeros(3, 0, device=device, dtype=dtype),
            torch.zeros(5, 0, device=device, requires_grad=True),
        )
        target = torch.tensor([0, 1, 4], device=device)
        losses = (
            (ops.linear_cross_entropy(hidden, weight, target, z_loss=1e-9, backend=backend), 1.6094379),
            (ops.linear_logprobs(hidden, weight, target, logits_bytes=20, backend=backend).logp.mean(), -1.6094379),
            (ops.linear_kl_div(hidden, weight, hidden, weight, backend=backend), 0.0),
        )
        for loss, want in losses:
            torch.testing.assert_close(loss.item(), want, rtol=1e-6, atol=1e-6)
            assert torch.autograd.grad(loss, weight)[0].shape == (5, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_softcap_far_above_the_logits(dtype, device):
    """It changes nothing: tanh keeps its digits near 0."""
    input, target = torch.randn(3, 40, device=device).to(dtype), torch.tensor([1, 5, 39], device=device)
    got = ops.cross_entropy(input, target, softcap=1e6, backend="triton")
    torch.testing.assert_close(got, ops.cross_entropy(input, target, backend="triton"), rtol=1e-6, atol=1e-6)


def test_kernels_of_a_group_run_on_the_tensors_device(monkeypatch):
    """A device that is not the current one: both ops over a group make it so while their kernels run."""
    from contextlib import contextmanager

    from fastlm.ops import vocab_parallel

    current = []

    @contextmanager
    def device_of(t):
        current.append(t.device)
        yield
        current.pop()

    def below_guard(*args):
        assert current, "no device was made current"
        raise InterruptedError

    class Part:
        def __init__(self, *args):
            self.classes = 19

    monkeypatch.setattr(vocab_parallel, "_device_of", device_of)
    monkeypatch.setattr(vocab_parallel, "_Part", Part)
    monkeypatch.setattr(vocab_parallel._CrossEntropy, "apply", below_guard)
    monkeypatch.setattr(vocab_parallel._Logprobs, "apply", below_guard)
    hidden, weight, _, _, target = _tensors("cpu")
    with pytest.raises(InterruptedError):
        ops.linear_cross_entropy(hidden, weight, target, group=object(), backend="torch")
    with pytest.raises(InterruptedError):
        ops.linear_logprobs(hidden, weight, target, group=object(), backend="torch")


def test_cross_entropy_as_torch_is_called():
    """Positions and None as in torch.nn.CrossEntropyLoss."""
    input, target = torch.randn(3, 7), torch.tensor([1, -100, 6])
    arguments = torch.rand(7), None, -100, None, "sum", 0.1
    got, want = (module(*arguments)(input, target) for module in (nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ops.cross_entropy(input, target, ignore_index=None), ops.cross_entropy(input, target))
    for keywords in ({"size_average": True}, {"reduce": False}):
        with pytest.raises(ValueError, match="size_average and reduce must be None"):
            nn.CrossEntropyLoss(**keywords)


# --- large logits of cross entropy ---


def _cross_entropies(x, target, backend, **options):
    """The same losses by cross_entropy and by linear_cross_entropy, whose product with the identity changes nothing."""
    yield ops.cross_entropy(x, target, backend=backend, reduction="none", **options)
    whole = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    yield ops.linear_cross_entropy(x, whole, target, backend=backend, reduction="none", **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@WITH_REFERENCE
def test_rows_of_the_lowest_logits(backend, dtype, smoothing, device):
    """As likely everywhere as any constant row; z_loss 0 times the square of their log-sum-exp is 0."""
    x = torch.full((2, 4), torch.finfo(dtype).min, dtype=dtype, device=device).requires_grad_()
    target = torch.tensor([1, 2], device=device)
    loss = ops.cross_entropy(x, target, backend=backend, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss, torch.full((2,), 4.0, device=device).log())
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    want = 0.25 - smoothing / 4 - (1 - smoothing) * F.one_hot(target, 4)
    torch.testing.assert_close(gradient, want.to(dtype))
    hidden, weight = torch.ones(2, 1, dtype=dtype, device=device), x.detach()[0, :, None]
    loss = ops.linear_cross_entropy(
        hidden, weight, target, backend=backend, reduction="none", label_smoothing=smoothing
    )
    torch.testing.assert_close(loss, torch.full((2,), 4.0, device=device).log())
    found = ops.linear_logprobs(hidden, weight, target, backend=backend)[0]
    torch.testing.assert_close(found, -torch.full((2,), 4.0, device=device).log())


def test_statistics_of_the_lowest_logits():
    x, stats = torch.full((2, 4), torch.finfo(torch.float32).min), torch.empty(5, 2)
    loss_rows.statistics(x, torch.tensor([1, 2]), stats, False, 1.0, None)
    assert torch.equal(stats[:2], torch.stack((x[:, 0], torch.full((2,), 4.0))))


@WITH_REFERENCE
def test_smoothing_of_logits_that_share_an_offset(backend, device):
    """In fp32 the sums of logits of 1e5 have no digits for their differences left."""
    x, target = 1e5 + torch.randn(3, 300, device=device), torch.tensor([1, 2, 299], device=device)
    for weight in (None, torch.rand(300, device=device)):
        exact = F.cross_entropy(
            x.double(), target, None if weight is None else weight.double(), reduction="none", label_smoothing=0.5
        )
        for found in _cross_entropies(x, target, backend, label_smoothing=0.5, weight=weight, z_loss=1e-20):
            torch.testing.assert_close(found, exact.float(), rtol=2e-6 if backend != "torch" else 1e-5, atol=0)


@WITH_REFERENCE
def test_smoothing_of_classes_that_are_ruled_out(backend, device):
    """The target, or another."""
    x, target = torch.randn(2, 300, device=device), torch.tensor([1, 2], device=device)
    x[0, 1] = x[1, 3] = float("-inf")
    loss = ops.cross_entropy(x, target, backend=backend, reduction="none", label_smoothing=0.1)
    assert loss.tolist() == [float("inf")] * 2
