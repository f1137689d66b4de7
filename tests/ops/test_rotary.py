import pytest
import torch

from fastlm import ops
from fastlm.ops.rotary import OP
from fastlm.testing import Case, check_accuracy, check_guards, check_op, check_reference, planted_bug

BACKENDS = ("torch", "triton")


def _tables(positions, half, device="cpu"):
    frequencies = 10.0 ** -torch.linspace(0, 2, half, device=device)
    angles = torch.arange(positions, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _args(dtype, device, shape=(2, 5, 5, 2, 16)):
    B, S, H, H_kv, width = shape
    q, k = (torch.randn(B, S, heads, width, dtype=torch.float64) for heads in (H, H_kv))
    return q.to(dtype).to(device), k.to(dtype).to(device)


def _positions(kind, B, S, device="cpu"):
    if kind is None:
        return None
    row = torch.tensor([7, 0, 3, 3, 11], device=device).repeat(S // 5 + 1)[:S]
    return row if kind == "S" else (row + torch.arange(B, device=device)[:, None]) % 12


def _case(interleaved, share, kind):
    """share: the part of each head that is rotated. kind: the shape of positions."""

    def fn(q, k, backend):
        B, S, _, width = q.shape
        cos, sin = _tables(max(S, 12), int(width * share) // 2, q.device)
        positions = _positions(kind, B, S, q.device)
        return ops.rotary(q, k, cos, sin, interleaved=interleaved, positions=positions, backend=backend)

    def plain(q, k):
        B, S, _, width = q.shape
        half = int(width * share) // 2
        positions = _positions(kind, B, S, q.device)
        cos, sin = (t[:S] if positions is None else t[positions] for t in _tables(max(S, 12), half, q.device))
        return tuple(_by_hand(x, cos.to(x.dtype), sin.to(x.dtype), interleaved) for x in (q, k))

    return Case(
        "rotary",
        fn,
        _args,
        lambda dtype, device: _args(dtype, device, (1, 3, 2, 1, 8)),
        plain=plain,
        empty=lambda dtype, device: _args(dtype, device, (0, 5, 2, 1, 8)),
    )


def _by_hand(x, cos, sin, interleaved):
    # As in Hugging Face's Llama and GPT-J: x cos + rotate(x) sin, with the tables doubled, in x's dtype.
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    half = cos.shape[-1]
    part, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        turned = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        turned = torch.cat((-part[..., half:], part[..., :half]), -1)
    return torch.cat((part * cos + turned * sin, rest), -1)


CASES = {
    "half": _case(False, 1.0, None),
    "interleaved": _case(True, 1.0, "BS"),
    "half-partial": _case(False, 0.5, "S"),
    "interleaved-partial": _case(True, 0.75, None),  # 6 pairs: not a power of two
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@ALL
def test_reference(case):
    check_reference(case)


@ALL
def test_reference_is_the_formula(case):
    args = _args(torch.float64, "cpu")
    torch.testing.assert_close(case.fn(*args, backend="reference"), case.plain(*args), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name, backend", [*((name, "triton") for name in CASES), ("half", "torch"), ("interleaved-partial", "torch")]
)
def test_contract(name, backend, device):
    check_op(CASES[name], backend, device)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(case, backend, dtype, device):
    check_accuracy(case, backend, dtype, device)


# B, S, H, H_kv, Dh: more tokens than a block, one token, heads that fill groups exactly, a wide head.
@pytest.mark.parametrize("shape", [(2, 70, 1, 1, 16), (3, 1, 6, 2, 64), (1, 4, 4, 4, 20), (1, 2, 2, 1, 256)], ids=str)
@pytest.mark.parametrize("name", ["half", "interleaved-partial"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, name, shape, device):
    check_accuracy(CASES[name], backend, torch.float32, device, _args(torch.float32, device, shape))


@ALL
def test_without_gradients_as_in_decoding(case, device):
    # The torch form has a path of its own for a few tokens and one for many.
    for shape in ((2, 1, 5, 2, 16), (2, 300, 5, 2, 16)):
        q, k = _args(torch.float32, device, shape)
        got = case.fn(q, k, backend="torch")
        torch.testing.assert_close(got, case.fn(q, k, backend="reference"))


def test_tables_are_read_within_bounds(device):
    case = Case(
        "rotary",
        lambda q, k, cos, sin, positions, backend: ops.rotary(q, k, cos, sin, positions=positions, backend=backend),
        lambda dtype, device: (
            *_args(dtype, device, (2, 5, 3, 2, 12)),
            *_tables(12, 5, device),
            _positions("BS", 2, 5, device),
        ),
        _args,
    )
    check_guards(case, "triton", device)


@pytest.mark.parametrize("interleaved", [False, True])
def test_views_of_one_product_are_read_in_place(interleaved, device, monkeypatch):
    B, S, H, H_kv, width = 2, 5, 4, 2, 16
    q, k, _ = torch.randn(B, S, (H + 2 * H_kv) * width, device=device).view(B, S, -1, width).split((H, H_kv, H_kv), 2)
    cos, sin = _tables(S, width // 2, device)
    want = ops.rotary(q, k, cos, sin, interleaved=interleaved, backend="reference")
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: pytest.fail("a copy was made"))
    torch.testing.assert_close(ops.rotary(q, k, cos, sin, interleaved=interleaved, backend="triton"), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_tables_are_constants(backend, device):
    q, k = (t.requires_grad_() for t in _args(torch.float32, device))
    cos, sin = (t.requires_grad_() for t in _tables(12, 8, device))
    outs = ops.rotary(q, k, cos, sin, backend=backend)
    grads = torch.autograd.grad([o.sum() for o in outs], (q, k, cos, sin), allow_unused=True)
    assert grads[0] is not None and grads[2] is None and grads[3] is None
    assert not any(o.requires_grad for o in ops.rotary(q.detach(), k.detach(), cos, sin, backend="torch"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_the_two_gradients_alone(backend, device):
    q, k = _args(torch.float32, device)
    q.requires_grad_()
    q_out, _ = CASES["half"].fn(q, k, backend=backend)
    want, _ = CASES["half"].fn(q, k, backend="reference")
    torch.testing.assert_close(*(torch.autograd.grad(o.sin().sum(), q)[0] for o in (q_out, want)))


def test_kernels_clamp_positions(device):
    q, k = _args(torch.float32, device)
    cos, sin = _tables(6, 8, device)
    wild = torch.tensor([-3, 0, 5, 6, 1 << 40], device=device)
    got = OP.forward(q, k, cos, sin, wild, False, "triton")
    want = ops.rotary(q, k, cos, sin, positions=wild.clamp(0, 5), backend="reference")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("half", "sin = -sin", "sin = sin"),  # a backward that turns the wrong way
        ("half", "a * cos - b * sin).to", "a * cos + b * sin).to"),
        (
            "interleaved",
            "tl.join(a * cos - b * sin, b * cos + a * sin)",
            "tl.join(b * cos + a * sin, a * cos - b * sin)",
        ),
        ("half-partial", "position = tl.load(positions_ptr", "_ = tl.load(positions_ptr"),  # positions not heeded
        ("interleaved", "batch * stride_pb + place", "place"),  # the first row's positions for all
        ("half-partial", "tl.store(y + col, tl.load(x + col, mask=mask, other=0.0), mask=mask)", "pass"),
        ("half", "last = tl.minimum(first + GROUP, H + H_kv)", "last = tl.minimum(first + GROUP, H + H_kv - 1)"),
        ("half", "live = (token < tokens)", "live = (token < tokens - 1)"),
    ],
    ids=["inverse", "sign", "pairs", "positions", "batch", "rest", "last_head", "tail"],
)
def test_planted_bug_is_seen(name, old, new, device):
    with planted_bug("rotary", old, new), pytest.raises(AssertionError, match="max error|unwritten|NaN or inf"):
        check_accuracy(CASES[name], "triton", torch.float32, device)
        check_guards(CASES[name], "triton", device)  # an unwritten element may by chance hold what was right


def test_write_outside_a_tensor_is_seen(device):
    # Only under guard bands: without them this bug corrupts the process.
    bug = planted_bug("rotary", "live = (token < tokens)", "live = (token < tokens + 1)")
    case = _case(False, 1.0, None)
    case = Case("rotary", case.fn, lambda d, device: _args(d, device, (2, 5, 2, 1, 16)), case.tiny)
    with bug, pytest.raises(AssertionError, match="wrote outside"):
        check_guards(case, "triton", device)


def test_errors():
    q, k = _args(torch.float32, "cpu")
    cos, sin = _tables(12, 8)
    with pytest.raises(ValueError, match=r"rotary: k must be like q \[2, 5, 5, 16\] in all but the heads"):
        ops.rotary(q, k[:, :4], cos, sin)
    with pytest.raises(TypeError, match="rotary: k must have q's dtype"):
        ops.rotary(q, k.bfloat16(), cos, sin)
    with pytest.raises(ValueError, match=r"rotary: q must be \[B, S, heads, Dh\]"):
        ops.rotary(q[0], k[0], cos, sin)
    with pytest.raises(TypeError, match="rotary: cos must be float32"):
        ops.rotary(q, k, cos.bfloat16(), sin)
    with pytest.raises(ValueError, match=r"rotary: cos must be \[S_max, R/2\] with 0 < R <= Dh = 16"):
        ops.rotary(q, k, *_tables(12, 9))
    with pytest.raises(ValueError, match="rotary: cos and sin have 4 positions, fewer than the 5 of q"):
        ops.rotary(q, k, cos[:4], sin[:4])
    with pytest.raises(TypeError, match="rotary: positions must be int64"):
        ops.rotary(q, k, cos, sin, positions=torch.arange(5, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"rotary: positions must be \[5\] or \[2, 5\], got \[6\]"):
        ops.rotary(q, k, cos, sin, positions=torch.arange(6))
    for backend in ("reference", *BACKENDS):
        with pytest.raises(ValueError, match=r"rotary: positions must lie in 0..11, .* got 8..12"):
            ops.rotary(q, k, cos, sin, positions=torch.arange(8, 13), backend=backend)
    with pytest.raises(ValueError, match="its kernels take float32, bfloat16, float16, got float64"):
        ops.rotary(q.double(), k.double(), cos, sin, backend="triton")
