import pytest
import torch

from fastlm import ops
from fastlm.testing import (
    Case,
    check_accuracy,
    check_double_backward,
    check_guards,
    check_op,
    check_reference,
    planted_bug,
    poison_empty,
)

BACKENDS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _args(dtype, device, B=1, S=17, T=23, H=2, H_kv=1, D=16, DV=16):
    shapes = ((B, S, H, D), (B, T, H_kv, D), (B, T, H_kv, DV))
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype).to(device) for shape in shapes)


def _in_own_dtype(causal):
    """What a user writes: products in the inputs' dtype, the softmax in fp32, its result rounded before the second product."""

    def plain(q, k, v):
        group, S, T = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        if causal:
            seen = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S if causal is True else 0)
            scores = scores.masked_fill(~seen, float("-inf"))
        probs = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        out = (probs @ v).transpose(1, 2)
        return out, torch.logsumexp(scores.to(torch.promote_types(q.dtype, torch.float32)), -1)

    return plain


def _case(causal, lse=False, empty=True, **sizes):
    tiny = {"S": 3, "T": 4, "D": 2, "DV": 2}

    def fn(q, k, v, backend):
        return ops.attention(q, k, v, causal=causal, return_lse=lse, backend=backend)

    plain = _in_own_dtype(causal)
    return Case(
        "attention",
        fn,
        lambda dtype, device: _args(dtype, device, **sizes),
        lambda dtype, device: _args(dtype, device, **tiny),
        plain=plain if lse else lambda *a: plain(*a)[0],
        autocast="cast",
        empty=(lambda dtype, device: _args(dtype, device, S=0, T=0)) if empty else None,
    )


FULL, CAUSAL, LSE = _case(False), _case(True), _case(True, lse=True)
GROUPED_LSE = _case(True, lse=True, H=4, H_kv=2)
CASES = pytest.mark.parametrize("case", [FULL, CAUSAL, LSE], ids=["full", "causal", "lse"])


@CASES
def test_reference(case):
    check_reference(case)


@CASES
@pytest.mark.parametrize("backend", BACKENDS)
def test_contract(case, backend, device):
    if backend == "torch" and case is LSE:
        with pytest.raises(ValueError, match="no differentiable log-sum-exp"):
            case.fn(*case.make(torch.float32, device), backend="torch")
        return
    check_op(case, backend, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASES
def test_accuracy(case, dtype, device):
    check_accuracy(case, "triton", dtype, device)
    if case is not LSE:
        check_accuracy(case, "torch", dtype, device)


@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("S, T, D, DV", [(20, 33, 8, 40), (33, 20, 40, 8), (18, 18, 80, 96), (1, 33, 72, 16)])
def test_shapes(causal, S, T, D, DV, device):
    sizes = {"S": S, "T": T, "D": D, "DV": DV}
    if (S, causal) == (1, "top_left"):
        return  # one visible key: gradients are exactly 0, which no rounding error can be compared with
    args = _args(torch.float32, device, **sizes)
    for backend in BACKENDS:
        check_accuracy(_case_by_reference(causal), backend, torch.float32, device, args)


def _case_by_reference(causal, **options):
    """A case whose yardstick is the reference in the same dtype, for rows that see nothing and for key lengths."""
    fn = lambda q, k, v, backend: ops.attention(q, k, v, causal=causal, backend=backend, **options)  # noqa: E731
    return Case("attention", fn, _args, _args, autocast="cast")


@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_key_lengths(causal, backend, device):
    lengths = torch.tensor([0, 7, 23], device=device)
    case = _case_by_reference(causal, key_lengths=lengths)
    check_accuracy(case, backend, torch.float32, device, _args(torch.float32, device, B=3, S=5))


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_what_lies_past_the_key_lengths_is_never_seen(backend, device):
    q, k, v = _args(torch.float32, device, B=2, S=1)
    lengths = torch.tensor([3, 20], device=device)
    want = ops.attention(q, k, v, key_lengths=lengths, backend="reference")
    for b, length in enumerate(lengths.tolist()):
        k[b, length:], v[b, length:] = float("nan"), float("inf")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    got = ops.attention(q, k, v, key_lengths=lengths, backend=backend)
    torch.testing.assert_close(got, want)
    for grad in torch.autograd.grad(got.sum(), (q, k, v)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_rows_that_see_nothing(backend, device):
    """More queries than keys, aligned at the end: the first queries see no key."""
    q, k, v = (x.requires_grad_() for x in _args(torch.float32, device, S=9, T=4))
    with_lse = backend != "torch"
    out = ops.attention(q, k, v, causal=True, return_lse=with_lse, backend=backend)
    if with_lse:
        out, lse = out
        assert torch.equal(lse[:, :, :5], torch.full_like(lse[:, :, :5], float("-inf")))
    assert torch.equal(out[:, :5], torch.zeros_like(out[:, :5]))
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert torch.equal(dq[:, :5], torch.zeros_like(dq[:, :5]))
    assert all(torch.isfinite(g).all() for g in (dq, dk, dv))


def test_causal_true_is_bottom_right(device):
    q, k, v = _args(torch.float32, device)
    args = (q, k, v)
    for backend in BACKENDS:
        a = ops.attention(*args, causal=True, backend=backend)
        assert torch.equal(a, ops.attention(*args, causal="bottom_right", backend=backend))
        # The last query sees every key, the first of top_left only the first one.
        torch.testing.assert_close(a[:, -1], ops.attention(*args, backend=backend)[:, -1])
        top = ops.attention(*args, causal="top_left", backend=backend)
        torch.testing.assert_close(top[:, 0], v[:, 0].expand(-1, 2, -1))


def _finite_lse(q, k, v, backend, **options):
    out, lse = ops.attention(q, k, v, return_lse=True, backend=backend, **options)
    return out, lse.masked_fill(lse == float("-inf"), 0)


DEAD_ROWS = {
    "more queries than keys": ({"causal": True}, {"S": 4, "T": 2, "D": 2, "DV": 2}),
    "key lengths": ({"key_lengths": torch.tensor([0, 2])}, {"B": 2, "S": 2, "T": 3, "D": 2, "DV": 2}),
    "key lengths, causal": ({"causal": True, "key_lengths": torch.tensor([1, 3])}, {"B": 2, "S": 2, "T": 3, "D": 2}),
}


@pytest.mark.parametrize("name", DEAD_ROWS)
def test_derivatives_where_rows_see_nothing(name, device):
    """fp64 gradcheck and gradgradcheck of the reference, and the kernels' second derivatives, through o and lse."""
    options, sizes = DEAD_ROWS[name]
    options = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    case = Case("attention", lambda q, k, v, backend: _finite_lse(q, k, v, backend, **options), _args,
                lambda dtype, device: _args(dtype, device, **sizes))  # fmt: skip
    if device == "cpu":
        check_reference(case)
    check_double_backward(case, "triton", device)


def test_what_comes_back_through_a_dead_lse_is_dropped(device):
    q, k, v = (x.requires_grad_() for x in _args(torch.float32, device, S=9, T=4))
    for backend in ("reference", "triton"):
        out, lse = ops.attention(q, k, v, causal=True, return_lse=True, backend=backend)
        dead = lse == float("-inf")
        cotangents = torch.ones_like(out), torch.where(dead, torch.full_like(lse, float("nan")), 1.0)
        dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), cotangents)
        assert torch.equal(dq[:, :5], torch.zeros_like(dq[:, :5])), backend
        assert all(torch.isfinite(g).all() for g in (dq, dk, dv)), backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H, H_kv", [(4, 4), (6, 2)])
def test_decoding(dtype, H, H_kv, device):
    """One query against a cache that is longer than what has been written: torch's CPU form has ways of its own here."""
    lengths = torch.tensor([19, 19], device=device)
    for causal in (False, True):
        case = _case_by_plain(causal, lengths)
        args = _args(dtype, device, B=2, S=1, T=30, H=H, H_kv=H_kv)
        for backend in BACKENDS:
            check_accuracy(case, backend, dtype, device, args)


def _case_by_plain(causal, lengths):
    T = int(lengths[0])
    plain = _in_own_dtype(causal)
    return Case(
        "attention",
        lambda q, k, v, backend: ops.attention(q, k, v, causal=causal, key_lengths=lengths, backend=backend),
        _args,
        _args,
        plain=lambda q, k, v: plain(q, k[:, :T], v[:, :T])[0],
    )


@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_key_lengths_the_host_must_not_read(causal, device):
    """Under torch.compile the torch form takes a mask instead of cutting the keys."""
    q, k, v = (x.requires_grad_() for x in _args(torch.float32, device, B=3, S=5, T=7))
    lengths = torch.tensor([0, 3, 7], device=device)

    def fn(q, k, v, lengths):
        return ops.attention(q, k, v, causal=causal, key_lengths=lengths, backend="torch")

    k.data[1, 3:], v.data[1, 3:] = float("nan"), float("nan")
    torch._dynamo.reset()
    got = torch.compile(fn, fullgraph=True, backend="aot_eager")(q, k, v, lengths)
    want = fn(q, k, v, lengths)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v))):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "sequence", "head"])
def test_strides_past_two_to_the_31(axis, device):
    """Offsets are 64-bit: neighbours along one axis lie 2^31 / 3 elements or more apart, the last one past 2^31.

    On the CPU the buffer is address space only: pages that nobody touches cost nothing.
    """
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of GPU memory")
    B, S, H, D = shape = (4, 4, 4, 16)
    try:
        buffer = torch.empty(2**31 + (1 << 20), dtype=torch.float16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    strides = [S * H * D, H * D, D, 1]
    strides[axis] = 2**31 // 3 + 16
    far = buffer.as_strided(shape, strides)
    near = [torch.randn(shape, device=device).half() for _ in range(3)]
    want = ops.attention(*near, causal=True, backend="triton")
    dout = torch.randn(shape, device=device).half()

    def gradients(q, k, v, dout):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(ops.attention(*leaves, causal=True, backend="triton"), leaves, dout)

    want = gradients(*near, dout)
    for place in range(4):
        args = [*near, dout]
        args[place] = far.copy_(args[place])
        for g, w in zip(gradients(*args), want):
            assert torch.equal(g, w)


BUGS = {
    "forward: no scale": ("attention", "factor = scale * LOG2E", "factor = LOG2E"),
    "forward: sum not shrunk": ("attention", "total * shrink + tl.sum(probs, 1)", "total + tl.sum(probs, 1)"),
    "forward: mask forgotten": ("attention", "if MASKED:\n        scores", "if D < 0:\n        scores"),
    "forward: another head's keys": ("attention", "h_kv = place.h // GROUP", "h_kv = place.h % (H // GROUP)"),
    "forward: last query unwritten": ("attention", "lse, mask=m < rest)", "lse, mask=m < rest - 1)"),
    "forward: output tail unwritten": ("attention", "mask=live(m, rest, DV", "mask=live(m, rest - 1, DV"),
    "wrong corner": ("attention_common", "offset = limit - length", "offset = 0"),
    "range of keys too short": ("attention_common", "hi, tl.maximum(last + place", "hi, tl.maximum(first + place"),
    "mask off by one": ("attention_scores", "key <= query + (place", "key < query + (place"),
    "dk: no scale": ("attention_dkdv", "tl.where(seen, dk * scale, 0.0)", "tl.where(seen, dk, 0.0)"),
    "dk dv: tail unwritten": (
        "attention_dkdv",
        "mask=live(n, length - first, D,",
        "mask=live(n, length - first - 1, D,",
    ),
    "dk dv: first head of the group only": (
        "attention_dkdv",
        "GROUP * tl.cdiv(hi - lo, BLOCK_M)",
        "tl.cdiv(hi - lo, BLOCK_M)",
    ),
    "dk dv: mask off by one": (
        "attention_dkdv",
        "(place.offset + rule.right) - start",
        "(place.offset + rule.right) + 1 - start",
    ),
    "dk dv: range of queries too short": (
        "attention_common",
        "lo = tl.maximum(first - place.offset - rule.right, 0)",
        "lo = tl.maximum(first + BLOCK - place.offset - rule.right, 0)",
    ),
    "dq: no scale": ("attention_dq", "(dq * scale)", "(dq)"),
    "dq: tail unwritten": ("attention_dq", "mask=live(m, place.S - first, D,", "mask=live(m, place.S - first - 1, D,"),
    "dq: another head's keys": ("attention_dq", "h_kv = place.h // GROUP", "h_kv = place.h % (H // GROUP)"),
    "dlse dropped": ("attention_bwd", "delta -= tl.load(dlse_ptr", "delta -= 0 * tl.load(dlse_ptr"),
    "delta dropped": ("attention_dq", "(dprobs - delta[:, None])", "dprobs"),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_seen(name, device):
    file, old, new = BUGS[name]
    with planted_bug("attention", old, new, file=file), poison_empty(), pytest.raises(AssertionError):
        check_accuracy(GROUPED_LSE, "triton", torch.float32, device)


def test_write_outside_a_tensor_is_seen(device):
    # Only under guard bands: without them this bug corrupts the process.
    bug = planted_bug("attention", "lse, mask=m < rest)", "lse, mask=m < rest + 3)")
    with bug, pytest.raises(AssertionError, match="wrote outside"):
        check_guards(LSE, "triton", device)


def test_errors():
    q, k, v = _args(torch.float32, "cpu")
    cases = {
        "must be 'auto' or one of": (lambda: ops.attention(q, k, v, backend="flash"), ValueError),
        "causal must be": (lambda: ops.attention(q, k, v, causal="left"), ValueError),
        "multiple of": (
            lambda: ops.attention(q[:, :, :1], k.expand(-1, -1, 2, -1), v.expand(-1, -1, 2, -1)),
            ValueError,
        ),
        "k must be": (lambda: ops.attention(q, k[..., :8], v), ValueError),
        "v must be": (lambda: ops.attention(q, k, v[:, :5]), ValueError),
        "one dtype": (lambda: ops.attention(q, k.double(), v), TypeError),
        "floating point": (lambda: ops.attention(q.long(), k, v), TypeError),
        r"must lie in \[0, 23\]": (lambda: ops.attention(q, k, v, key_lengths=torch.tensor([24])), ValueError),
        "int32 or int64": (lambda: ops.attention(q, k, v, key_lengths=torch.tensor([2.0])), TypeError),
    }
    for match, (call, error) in cases.items():
        with pytest.raises(error, match=match):
            call()
