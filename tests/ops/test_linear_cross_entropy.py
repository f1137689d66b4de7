import importlib.util
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastlm.kernels
from fastlm import ops
from fastlm.kernels import chunked_loss
from fastlm.ops.linear_cross_entropy import OP
from fastlm.ops.loss_gradients import scaled
from fastlm.ops.loss_rows import cross_entropy_rows
from fastlm.testing import Case, check_accuracy, check_guards, check_op, check_reference, planted_bug

BACKENDS = ("torch", "triton")
ALL = {"label_smoothing": 0.1, "z_loss": 0.02, "softcap": 6.0}


def _args(dtype, device, shape=(2, 4, 24), vocabulary=300, bias=True, scale=1.0):
    """hidden, weight, bias and targets of which some are ignored."""
    hidden = torch.randn(shape, dtype=torch.float64)
    weight = scale * torch.randn(vocabulary, shape[-1], dtype=torch.float64) / shape[-1] ** 0.5
    target = torch.randint(0, vocabulary, shape[:-1])
    target.view(-1)[1::3] = -100
    biases = [torch.randn(vocabulary, dtype=torch.float64)] if bias else []
    return *(t.to(dtype).to(device) for t in (hidden, weight, *biases)), target.to(device)


def _plain(hidden, weight, bias, target, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean"):
    """What a user writes, in the inputs' own dtype."""
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    target = target.flatten()
    loss = F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction=reduction)
    if z_loss:
        squares = (logits.logsumexp(-1) ** 2).where(target != -100, 0)
        count = (target != -100).sum() if reduction == "mean" else 1
        loss = loss + z_loss * (squares if reduction == "none" else squares.sum() / count)
    return loss.view(hidden.shape[:-1]) if reduction == "none" else loss


def _case(reduction, **options):
    def fn(hidden, weight, bias, target, backend):
        return ops.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, reduction=reduction, backend=backend, **options
        )

    return Case(
        "linear_cross_entropy",
        fn,
        _args,
        lambda dtype, device: _args(dtype, device, (3, 3), 5),
        plain=partial(_plain, reduction=reduction, **{k: v for k, v in options.items() if k != "logits_bytes"}),
        empty=lambda dtype, device: _args(dtype, device, (0, 8), 5),
    )


MEAN, NONE = _case("mean"), _case("none", **ALL)
CASES = pytest.mark.parametrize("case", [MEAN, NONE, _case("sum", z_loss=0.02)], ids=["mean", "none_all", "sum_z"])


@pytest.fixture(autouse=True)
def chunked(monkeypatch):
    """Chunks for these small shapes too, which the CPU would leave to torch's own calls."""
    monkeypatch.setattr(sys.modules["fastlm.ops.linear_cross_entropy"], "_SMALL", 0)


@pytest.fixture
def small_chunks(monkeypatch):
    """Three rows per chunk, for 300 fp32 logits."""
    monkeypatch.setattr(chunked_loss, "LOGITS_BYTES", dict.fromkeys(("cpu", "cuda"), 3 * 300 * 4))


@CASES
def test_reference(case):
    check_reference(case)


@pytest.mark.parametrize("case", [MEAN, NONE], ids=["mean", "none_all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_contract(case, backend, device):
    check_op(case, backend, device)


@CASES
@pytest.mark.parametrize("dtype", MEAN.dtypes, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(case, backend, dtype, device):
    check_accuracy(case, backend, dtype, device)


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_over_chunks(case, backend, dtype, device, small_chunks):
    check_accuracy(case, backend, dtype, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_rows_as_on_a_gpu(backend, device, small_chunks, monkeypatch):
    monkeypatch.setitem(chunked_loss.ROW_MULTIPLE, "cpu", 16)
    for case in (MEAN, NONE):
        check_guards(case, backend, device)
        check_accuracy(case, backend, torch.float32, device)


@pytest.mark.parametrize(
    "n, vocabulary, itemsize", [(1, 7, 4), (10_000, 128_256, 2), (1000, 50_257, 4), (5, 1 << 30, 4)]
)
def test_chunks_cover_the_rows_and_keep_the_budget(n, vocabulary, itemsize):
    for device in ("cpu", "cuda"):
        step = chunked_loss.chunk_rows(n, vocabulary, itemsize, torch.device(device))
        assert step == 1 or step * vocabulary * itemsize <= chunked_loss.LOGITS_BYTES[device]
        last = n - (-(-n // step) - 1) * step
        assert 0 < last <= step and (step < 128 or last > step - 128 * -(-n // step))


@pytest.mark.parametrize("vocabulary", [1, 16, 123, 4096, 8300])
@pytest.mark.parametrize("backend", BACKENDS)
def test_widths(backend, vocabulary, device):
    args = _args(torch.float32, device, (3, 8), vocabulary)
    for case in (MEAN, NONE):
        check_accuracy(case, backend, torch.float32, device, args)


def _check_large_logits(backend, device):
    check_accuracy(MEAN, backend, torch.float32, device, _args(torch.float32, device, scale=200.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend, device):
    _check_large_logits(backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_that_are_masked_out(backend, device):
    hidden, weight, bias, target = _args(torch.float32, device, (6, 8), 8292)
    bias[:8200] = float("-inf")  # more than a whole tile
    target[target >= 0] = 8200 + target[target >= 0] % 92
    check_accuracy(MEAN, backend, torch.float32, device, (hidden, weight, bias, target))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_nothing_but_ignored_rows(backend, reduction, device):
    hidden, weight, bias, target = _args(torch.float32, device)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = ops.linear_cross_entropy(hidden, weight, target.fill_(3), linear_bias=bias, ignore_index=3, reduction=reduction,
                                    backend=backend, **ALL)  # fmt: skip
    assert (loss == 0).all() and loss.dtype == torch.float32
    assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_handed_over_and_made_anew(backend, dtype, device, small_chunks, monkeypatch):
    """The first backward returns the forward's buffers, scaled where they are; a later one the same bits in new ones."""
    hidden, weight, bias, target = _args(dtype, device)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    losses = []
    call = lambda: losses.append(ops.linear_cross_entropy(hidden, weight, target, linear_bias=bias, backend=backend))  # noqa: E731
    buffers = _forward_outputs(monkeypatch, call)[1:4]
    first, second, third = (torch.autograd.grad(losses[0] * 3, inputs, retain_graph=True) for _ in range(3))
    for buffer, a, b, c in zip(buffers, first, second, third):
        assert a.data_ptr() == buffer.data_ptr() and torch.equal(a, b) and torch.equal(a, c)
        assert len({a.data_ptr(), b.data_ptr(), c.data_ptr()}) == 3
    plain = torch.compile(lambda *a: MEAN.fn(*a, backend=backend), backend="aot_eager")  # new, scaled copies
    for a, b in zip(first, torch.autograd.grad(plain(hidden, weight, bias, target) * 3, inputs)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dispatcher_with_every_tensor(backend, device):
    """opcheck of both entries as torch.compile uses them, all optional tensors given."""
    hidden, weight, bias, target = _args(torch.float32, device, (2, 3, 8), 21)
    constants = torch.rand(2, 3, device=device), torch.rand(21, device=device), torch.tensor(4.0, device=device)
    tensors = hidden, weight, bias, target, *constants
    options = (-100, 0.1, 0.1, 0.5, 3.0, "mean", False, 4 * 21 * 4, True, True, True, backend)
    loss, *saved = OP.forward(*tensors, *options)
    torch.library.opcheck(OP.forward, (*(t.requires_grad_() for t in tensors[:3]), *tensors[3:], *options))
    torch.library.opcheck(OP.backward, (loss.detach(), *(t.detach() for t in tensors), *saved, *options))


def test_fp16_of_many_tokens():
    """A class that most tokens have: their sum of gradients is beyond fp16's largest number, their mean is not."""
    case = _case("mean", logits_bytes=1 << 20)
    hidden, weight, bias, target = _args(torch.float16, "cpu", (40000, 4), 7)
    target[2::3] = 1
    check_accuracy(case, "torch", torch.float16, "cpu", (hidden + 9, weight, bias, target))


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_the_master_weight_gets_an_fp32_gradient(backend, device, small_chunks):
    hidden, weight, target = _args(torch.float32, device, bias=False)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]

    def run(fn):
        with torch.autocast(device, torch.bfloat16):
            loss = fn()
        return loss, *torch.autograd.grad(loss, inputs)

    got = run(lambda: ops.linear_cross_entropy(hidden, weight, target, backend=backend))
    plain = run(lambda: _plain(hidden, weight, None, target))
    exact = ops.linear_cross_entropy(hidden, weight, target, backend="reference")
    exact = exact, *torch.autograd.grad(exact, inputs)
    for g, p, e in zip(got, plain, exact):
        assert g.dtype == torch.float32
        assert (g - e).abs().max() <= 2 * (p - e).abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_in_another_dtype(backend, device):
    hidden, weight, target = _args(torch.float32, device, bias=False)
    for h, w in ((hidden, weight.bfloat16()), (hidden.bfloat16(), weight)):
        h, w = h.requires_grad_(), w.requires_grad_()
        loss = ops.linear_cross_entropy(h, w, target, backend=backend)
        dh, dw = torch.autograd.grad(loss, (h, w))
        assert (loss.dtype, dh.dtype, dw.dtype) == (torch.float32, h.dtype, w.dtype)
        plain = F.cross_entropy(F.linear(h, w.to(h.dtype)).flatten(0, 1).float(), target.flatten())
        torch.testing.assert_close(loss, plain, rtol=1e-2, atol=1e-2)


def test_what_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(sys.modules["fastlm.ops.linear_cross_entropy"], "_SMALL", 8 * 300)
    monkeypatch.setattr(OP, "forward", None)
    monkeypatch.setattr(OP, "below", None)
    args = _args(torch.bfloat16, "cpu")
    assert MEAN.fn(*args, backend="auto").dtype == torch.float32
    assert (MEAN.fn(*args[:3], torch.full_like(args[3], -100), backend="auto") == 0).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert MEAN.fn(*_args(torch.float32, "cpu"), backend="auto").dtype == torch.float32
    with pytest.raises(TypeError, match="not callable"):
        NONE.fn(*args, backend="auto")


def _forward_outputs(monkeypatch, fn):
    """What the dispatcher entry returned during fn()."""
    seen, real = [], OP.forward
    monkeypatch.setattr(OP, "forward", lambda *args: seen.append(real(*args)) or seen[-1])
    fn()
    monkeypatch.setattr(OP, "forward", real)
    return seen[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_needed_gradients_are_computed(backend, device, monkeypatch):
    hidden, weight, bias, target = _args(torch.float32, device)

    def sizes(grad_of):
        for t in (hidden, weight, bias):
            t.requires_grad_(any(t is g for g in grad_of))
        fn = lambda: ops.linear_cross_entropy(hidden, weight, target, linear_bias=bias, backend=backend)  # noqa: E731
        if grad_of:
            fn().backward()
        return [t.numel() for t in _forward_outputs(monkeypatch, fn)[1:4]]

    assert sizes([]) == [0, 0, 0]
    assert sizes([hidden]) == [hidden.numel(), 0, 0]
    assert sizes([weight]) == [0, weight.numel(), 0]
    assert sizes([weight, bias]) == [0, weight.numel(), bias.numel()]
    with torch.no_grad():
        assert sizes([]) == [0, 0, 0]


def test_a_target_out_of_range(device):
    hidden, weight, target = _args(torch.float32, device, (2, 3, 8), 11, bias=False)
    for wrong in (11, -1):
        target[1, 2] = wrong
        # Where values cannot be read the memory is safe and the loss NaN.
        for backend in BACKENDS:
            options = (-100, 0.0, 0.0, 1.0, None, "none", False, None, True, True, False, backend)
            loss = OP.forward(hidden, weight, None, target, None, None, None, *options)[0]
            assert loss[1, 2].isnan() and loss.isnan().sum() == 1
    with pytest.raises(ValueError, match=r"target must be in \[0, 11\) or ignore_index=-100, got -1"):
        ops.linear_cross_entropy(hidden.cpu(), weight.cpu(), target.cpu())


# --- planted bugs ---


@contextmanager
def planted_in_loop(old, new):
    """The torch backend over a copy of kernels/chunked_loss.py in which `old` became `new`."""
    source = (Path(fastlm.kernels.__path__[0]) / "chunked_loss.py").read_text(encoding="utf-8")
    assert old in source
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_planted_loop", loader=None))
    exec(source.replace(old, new), module.__dict__)
    module.LOGITS_BYTES = chunked_loss.LOGITS_BYTES
    before = dict(OP._loaded)
    OP._loaded["torch", 0] = partial(module.forward, cross_entropy_rows)
    OP._loaded["torch", 1] = partial(module.backward, cross_entropy_rows, scaled)
    try:
        yield
    finally:
        OP._loaded.clear()
        OP._loaded.update(before)
        sys.modules.pop("_planted_loop", None)


def _check_all(backend, device):
    check_accuracy(MEAN, backend, torch.float32, device)
    check_accuracy(NONE, backend, torch.float32, device)
    _check_large_logits(backend, device)


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("loss_rows", "new_peak = tl.maximum(peak, tl.max(x, 0))", "new_peak = tl.maximum(peak, 0.0)"),  # not subtracted
        ("loss_rows", "x = tl.where(mask, x, float(\"-inf\"))", "x = tl.where(mask, x, 0.0)"),  # wrong mask in the tail
        ("loss_rows", "gradient * slope * (factor", "gradient * (factor"),
        (None, "live = target != ignore_index", "live = target != ignore_index - 1"),  # ignored rows counted
        (None, "    if full < V:\n        peak", "    if full < V - BLOCK_V:\n        peak"),  # tail of the vocabulary not read
        (None, "        if full < V:\n            _write", "        if full < V - BLOCK_V:\n            _write"),  # nor written
        (None, "spread * (weight_sum * p - w)", "spread * weight_sum * p"),
        (None, "g += pull * p", "g += 0.0"),
        (None, "factor = tl.load(factor_ptr + row).to(tl.float32)", "factor = 1.0"),
    ],
    ids=["maximum", "mask", "softcap", "ignored", "tail_read", "tail_written", "smoothing", "z_loss", "row_scale"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_planted_bug_is_seen(file, old, new, device):
    with planted_bug("linear_cross_entropy", old, new, file=file), pytest.raises(AssertionError):
        _check_all("triton", device)


@pytest.mark.parametrize(
    "old, new",
    [
        (".reciprocal()", ".clone()"),
        ("return share.expand", "return torch.ones_like(share).expand"),  # in the loss, not in its gradient
        ("dlogits.t(), h, start == 0", "dlogits.t(), h, True"),  # only the last chunk counts
        ("add_product(self.dw, dlogits.t(), h, start == 0)", "add_product(self.dw, dlogits.t(), h, False)"),
        ("self.db += ", "self.db = "),
        ("min(start + self.step, n)", "min(start + self.step, n - 1)"),  # the last row
    ],
    ids=["no_mean", "no_gradient_of_mean", "last_chunk", "uninitialised", "bias", "tail"],
)
def test_planted_bug_in_the_loop_is_seen(old, new, small_chunks):
    with planted_in_loop(old, new), pytest.raises(AssertionError):
        check_accuracy(MEAN, "torch", torch.float32, "cpu")
        check_guards(MEAN, "torch", "cpu")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_write_outside_a_tensor_is_seen(device):
    # Only under guard bands: without them this bug corrupts the process.
    old, new = "_write_tile(z_ptr, tail, tail < stride_z", "_write_tile(z_ptr, tail, tail < stride_z + 8"
    bug = planted_bug("linear_cross_entropy", old, new)
    with bug, pytest.raises(AssertionError, match="wrote outside"):
        check_guards(MEAN, "triton", device)


def test_explain_and_errors():
    hidden, weight, bias, target = _args(torch.float32, "cpu", (2, 3, 8), 11)
    call = partial(ops.linear_cross_entropy, hidden, weight, target)
    assert ops.explain(call.func, *call.args).backend == "torch"
    fails = lambda error, message, *args, **kw: _fails(error, "linear_cross_entropy: " + message, args, **kw)  # noqa: E731
    fails(ValueError, r"input must be \[..., 8\]", hidden[..., :7], weight, target)
    fails(ValueError, r"target must be \[2, 3\] like input's rows, got \[3\]", hidden, weight, target[0])
    fails(ValueError, r"linear_bias must be \[11\]", hidden, weight, target, linear_bias=bias[:4])
    fails(ValueError, r"linear_weight must be \[V, D\]", hidden, weight[0], target)
    fails(TypeError, "target must be int64", hidden, weight, target.int())
    fails(TypeError, "linear_weight must be floating point", hidden, weight.long(), target)
    fails(ValueError, "reduction must be 'mean', 'sum' or 'none', got 'avg'", hidden, weight, target, reduction="avg")
    fails(ValueError, r"label_smoothing must be in \[0, 1\]", hidden, weight, target, label_smoothing=1.5)
    fails(ValueError, "z_loss must be >= 0", hidden, weight, target, z_loss=-1.0)
    fails(ValueError, "softcap must be > 0", hidden, weight, target, softcap=0.0)
    fails(TypeError, "scale must be a number", hidden, weight, target, scale=torch.ones(()))
    fails(ValueError, "logits_bytes must be > 0", hidden, weight, target, logits_bytes=0)
    fails(ValueError, r"weight must be \[11\], got \[8\]", hidden, weight, target, weight=weight[0])
    fails(ValueError, r"token_weight must be \[2, 3\]", hidden, weight, target, token_weight=bias)
    fails(TypeError, "token_weight must be floating point", hidden, weight, target, token_weight=target)
    fails(ValueError, r"weight is a constant .* detach\(\)", hidden, weight, target, weight=bias.requires_grad_())
    fails(ValueError, "denominator is what reduction='mean'", hidden, weight, target, reduction="sum", denominator=3)
    fails(ValueError, "denominator must be a number or a 0-d tensor", hidden, weight, target, denominator=bias)
    fails(ValueError, "denominator must be >= 0", hidden, weight, target, denominator=-1)
    fails(ValueError, "weight_grad_dtype must be None", hidden, weight, target, weight_grad_dtype=torch.float16)
    fails(ValueError, "weight_grad_dtype=bfloat16 needs", hidden, weight, target, weight_grad_dtype=torch.bfloat16)
    fails(ValueError, r"target must be in \[0, 11\) or ignore_index=-100, got 11", hidden, weight, target.fill_(11))
    fails(ValueError, "backend must be 'auto' or one of", hidden, weight, target.fill_(0), backend="cut")
    fails(ValueError, ".*got float64", hidden.double(), weight, target, backend="triton")


def _fails(error, message, args, **kwargs):
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(*args, **kwargs)
