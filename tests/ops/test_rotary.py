import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


def _options(kind, B, S, device="cpu"):
    """What says where tokens stand, and the positions [S], [B, S] (packed: [1, B S]) that it means."""
    total, index = B * S, torch.arange(S, device=device)
    row = torch.tensor([7, 0, 3, 3, 11], device=device).repeat(S // 5 + 1)[:S]
    each = (row + torch.arange(B, device=device)[:, None]) % 12
    starts = torch.tensor([4, 0, 2], device=device)
    cu = [0, total // 3, total // 3, total]  # the second sequence is empty
    packed = torch.cat([torch.arange(b - a, device=device) for a, b in zip(cu, cu[1:])])
    begun = torch.cat([torch.arange(b - a, device=device) + s for a, b, s in zip(cu, cu[1:], (4, 0, 2))])
    return {
        None: ({}, index),
        "S": ({"positions": row}, row),
        "BS": ({"positions": each}, each),
        "offset": ({"offset": 6}, index + 6),
        "starts": ({"offset": starts[:1].expand(B)}, index + 4),
        "start": ({"offset": starts[2]}, index + 2),
        "packed": ({"cu_seqlens": torch.tensor(cu, device=device, dtype=torch.int32)}, packed[None]),
        "packed-start": ({"cu_seqlens": torch.tensor(cu, device=device), "offset": 3}, packed[None] + 3),
        "packed-starts": ({"cu_seqlens": torch.tensor(cu, device=device), "offset": starts}, begun[None]),
        "packed-positions": ({"positions": each.flatten()}, each.flatten()[None]),
    }[kind]


def _tokens(q, k, packed):
    return (q.flatten(0, 1), k.flatten(0, 1)) if packed else (q, k)


def _case(interleaved, share, kind):
    """share: the part of each head that is rotated. kind: how the positions are said; packed ones take all rows as one."""
    packed = kind is not None and kind.startswith("packed")

    def fn(q, k, backend):
        B, S, _, width = q.shape
        tables = _tables(B * S + 12, int(width * share) // 2, q.device)
        options = {"interleaved": interleaved, **_options(kind, B, S, q.device)[0]}
        out = ops.rotary(*_tokens(q, k, packed), *tables, **options, backend=backend)
        return tuple(x.view(y.shape) for x, y in zip(out, (q, k)))

    def plain(q, k):
        B, S, _, width = q.shape
        positions = _options(kind, B, S, q.device)[1]
        cos, sin = (t[positions] for t in _tables(B * S + 12, int(width * share) // 2, q.device))
        tokens = (x[None] if packed else x for x in _tokens(q, k, packed))
        found = (_by_hand(x, cos.to(x.dtype), sin.to(x.dtype), interleaved) for x in tokens)
        return tuple(x.view(y.shape) for x, y in zip(found, (q, k)))

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
    "offset": _case(False, 1.0, "offset"),
    "starts": _case(False, 0.5, "starts"),
    "start": _case(True, 1.0, "start"),
    "packed": _case(False, 1.0, "packed"),
    "packed-start": _case(False, 1.0, "packed-start"),
    "packed-starts": _case(True, 0.75, "packed-starts"),
    "packed-positions": _case(False, 1.0, "packed-positions"),
}
CONTRACT = ["half", "interleaved", "starts", "packed-starts"]  # the last is interleaved and partial
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@ALL
def test_reference(case):
    check_reference(case)


@ALL
def test_reference_is_the_formula(case):
    args = _args(torch.float64, "cpu")
    torch.testing.assert_close(case.fn(*args, backend="reference"), case.plain(*args), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name, backend", [*((name, "triton") for name in CONTRACT), ("half", "torch"), ("packed-starts", "torch")]
)
def test_contract(name, backend, device):
    check_op(CASES[name], backend, device)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(case, backend, dtype, device):
    check_accuracy(case, backend, dtype, device)


def test_offsets_of_their_own(device):
    q, k = _args(torch.float32, device, (3, 5, 3, 2, 16))
    tables, starts = _tables(12, 8, device), torch.tensor([7, 0, 3], device=device)
    want = ops.rotary(q, k, *tables, positions=starts[:, None] + torch.arange(5, device=device), backend="reference")
    for backend in ("reference", *BACKENDS):
        torch.testing.assert_close(ops.rotary(q, k, *tables, offset=starts, backend=backend), want)
    apart = torch.stack((starts, starts), 1)[:, 0]  # strided
    torch.testing.assert_close(ops.rotary(q, k, *tables, offset=apart, backend="triton"), want)


@pytest.mark.parametrize("sequences", [1, 2, 5, 8, 9])
def test_search_of_the_sequence(sequences, device):
    # Every number of steps; sequences of one token, of none, and at both ends of the tokens.
    lengths = torch.randint(0, 4, (sequences,), generator=torch.Generator().manual_seed(sequences))
    lengths[0 if sequences > 2 else -1] = 0 if sequences > 1 else 3
    total = int(lengths.sum()) or 1
    lengths[-1] += total - int(lengths.sum())
    cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(device)
    q, k = (t[0] for t in _args(torch.float32, device, (1, total, 2, 1, 16)))
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(device)
    want = ops.rotary(q, k, *_tables(12, 8, device), positions=positions, backend="reference")
    for backend in ("reference", *BACKENDS):
        torch.testing.assert_close(
            ops.rotary(q, k, *_tables(12, 8, device), cu_seqlens=cu.int(), backend=backend), want
        )


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
    def positioned(q, k, cos, sin, positions, backend):
        return ops.rotary(q, k, cos, sin, positions=positions, backend=backend)

    def packed(q, k, cos, sin, cu_seqlens, starts, backend):
        q, k = _tokens(q, k, True)
        return ops.rotary(q, k, cos, sin, offset=starts, cu_seqlens=cu_seqlens, backend=backend)

    def make(kind):
        places = _options(kind, 2, 5, device)[0].values()
        return lambda dtype, device: (*_args(dtype, device, (2, 5, 3, 2, 12)), *_tables(12, 5, device), *places)

    check_guards(Case("rotary", positioned, make("BS"), _args), "triton", device)
    check_guards(Case("rotary", packed, make("packed-starts"), _args), "triton", device)


class _Count(TorchDispatchMode):
    """The calls that make a tensor with memory of its own."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in before:
                self.made.append(str(function))
        return out


@pytest.mark.parametrize("kind", [None, "BS", "offset", "starts", "packed", "packed-starts"])
def test_nothing_is_allocated_beyond_the_outputs(kind, device, monkeypatch):
    # All but the kernel itself, which can allocate nothing; what the interpreter does on its behalf would be counted too.
    class NoLaunch:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    kernels = pytest.importorskip("fastlm.kernels.rotary")
    monkeypatch.setattr(kernels, "_rotary_kernel", NoLaunch())
    monkeypatch.setattr(
        OP, "forward", lambda *args: kernels.rotary_fwd(*args[:-1])
    )  # the mode sees no further than an op
    B, S, H, H_kv, width = 2, 5, 4, 2, 16
    q, k, _ = torch.randn(B, S, H + 2 * H_kv, width, device=device).split((H, H_kv, H_kv), 2)
    if "packed" in (kind or ""):
        q, k, _ = torch.randn(B * S, H + 2 * H_kv, width, device=device).split((H, H_kv, H_kv), 1)
    tables, (places, _) = _tables(24, width // 2, device), _options(kind, B, S, device)
    monkeypatch.setitem(ops.rotary.__globals__, "_check_values", lambda *args: None)  # on the CPU only
    with _Count() as count:
        ops.rotary(q, k, *tables, **places, backend="triton")
    assert count.made == ["aten.empty.memory_format"] * 2


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
    got = OP.forward(q, k, cos, sin, wild, False, 0, None, None, "triton")
    want = ops.rotary(q, k, cos, sin, positions=wild.clamp(0, 5), backend="reference")
    torch.testing.assert_close(got, want)
    starts = torch.tensor([-2, 1 << 40], device=device)
    got = OP.forward(q, k, cos, sin, None, False, 0, starts, None, "triton")
    places = torch.tensor([[0, 0, 0, 1, 2], [5] * 5], device=device)
    torch.testing.assert_close(got, ops.rotary(q, k, cos, sin, positions=places, backend="reference"))
    for cu in ([3, 4, 5], [0, 9, 2], [0, -7, 90], [0, 0, 0]):  # nonsense stays inside all tensors
        cu = torch.tensor(cu, device=device)
        one = q[:1], k[:1]
        found = (OP.forward(*one, cos, sin, None, False, 0, None, cu, "triton"),
                 OP.plain("reference", *one, cos, sin, False, None, 0, None, cu))  # fmt: skip
        assert all(x.isfinite().all() for pair in found for x in pair)


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
        ("packed", "tl.load(cu_ptr + middle) <= token", "tl.load(cu_ptr + middle) < token"),
        ("packed", "position = position - tl.load(cu_ptr + sequence)", "pass"),
        ("packed-starts", "sequence * stride_start", "batch * stride_start"),
        ("offset", "place + offset, batch", "place, batch"),
    ],
    ids=[
        "inverse",
        "sign",
        "pairs",
        "positions",
        "batch",
        "rest",
        "last_head",
        "tail",
        "begin",
        "packed",
        "starts",
        "offset",
    ],  # fmt: skip
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


def test_errors(device):
    read = ("reference", *BACKENDS) if device == "cpu" else ("reference", "torch")  # a GPU's values are not looked at
    q, k = _args(torch.float32, "cpu")
    cos, sin = _tables(12, 8)
    with pytest.raises(ValueError, match=r"rotary: k must be like q \[2, 5, 5, 16\] in all but the heads"):
        ops.rotary(q, k[:, :4], cos, sin)
    with pytest.raises(TypeError, match="rotary: k must have q's dtype"):
        ops.rotary(q, k.bfloat16(), cos, sin)
    with pytest.raises(ValueError, match=r"rotary: q must be \[B, S, heads, Dh\] or packed \[total, heads, Dh\]"):
        ops.rotary(q[0, 0], k[0, 0], cos, sin)
    with pytest.raises(ValueError, match=r"rotary: k must be \[B, S, heads, Dh\]"):
        ops.rotary(q, k[0], cos, sin)
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
    for backend in read:
        with pytest.raises(ValueError, match=r"rotary: positions must lie in 0..11, .* got 8..12"):
            ops.rotary(q, k, cos, sin, positions=torch.arange(8, 13), backend=backend)
    one, cu = (q[0], k[0]), torch.tensor([0, 2, 5])
    for backend in read:
        for places, match in (
            ({"offset": torch.tensor([7, 8])}, r"positions must lie in 0..11, .* got 7..12"),
            ({"offset": torch.tensor(-1)}, r"positions must lie in 0..11, .* got -1..3"),
            ({"offset": 8}, "12 positions, too few for the 5 of q from offset 8 on"),
            ({"offset": -1}, "from offset -1 on"),
        ):
            with pytest.raises(ValueError, match=f"rotary: .*{match}"):
                ops.rotary(q, k, cos, sin, **places, backend=backend)
        with pytest.raises(ValueError, match=r"positions must lie in 0..11, .* got 0..12"):
            ops.rotary(*one, cos, sin, offset=torch.tensor([0, 10]), cu_seqlens=cu, backend=backend)
        with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to 5, the rows of q, got \[0, 2, 4\]"):
            ops.rotary(*one, cos, sin, cu_seqlens=torch.tensor([0, 2, 4]), backend=backend)
    for places, kind, match in (
        ({"positions": torch.arange(5), "offset": 1}, ValueError, "positions say all"),
        ({"positions": torch.arange(5), "cu_seqlens": cu}, ValueError, "positions say all"),
        ({"positions": torch.zeros(1, 5, dtype=torch.int64)}, ValueError, r"positions must be \[5\], got \[1, 5\]"),
        ({"cu_seqlens": cu.float()}, TypeError, "cu_seqlens must be int32 or int64"),
        ({"cu_seqlens": cu[:1]}, ValueError, r"cu_seqlens must be \[B \+ 1\], .* from 0 to 5, got \[1\]"),
        ({"offset": torch.tensor([1]).int()}, TypeError, "offset must be an int or an int64 tensor, got torch.int32"),
        ({"offset": 1.0}, TypeError, "offset must be an int or an int64 tensor, got float"),
        (
            {"offset": torch.tensor([1, 1])},
            ValueError,
            r"offset must be an int, 0-d or \[1\], one per sequence, got \[2\]",
        ),
    ):
        with pytest.raises(kind, match=f"rotary: {match}"):
            ops.rotary(*one, cos, sin, **places)
    with pytest.raises(ValueError, match=r"rotary: cu_seqlens is for packed q \[total, heads, Dh\]"):
        ops.rotary(q, k, cos, sin, cu_seqlens=cu)
    with pytest.raises(ValueError, match="its kernels take float32, bfloat16, float16, got float64"):
        ops.rotary(q.double(), k.double(), cos, sin, backend="triton")


@pytest.mark.parametrize("tokens", [1, 300], ids=["few", "many"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_what_comes_back_with_gradients_may_be_written_into(tokens, interleaved):
    q, k = (torch.randn(1, tokens, heads, 64).requires_grad_() for heads in (3, 1))
    angles = torch.rand(tokens, 32)
    a, b = ops.rotary(q, k, angles.cos(), angles.sin(), interleaved=interleaved, backend="torch")
    loss = b.square().sum()  # keeps b as it is
    loss = loss + a.mul_(2).sum()
    dq, dk = torch.autograd.grad(loss, (q, k))
    torch.testing.assert_close(dk, 2 * k)  # a rotation keeps lengths
    torch.testing.assert_close(dq.norm(), torch.tensor(2 * (64 * 3 * tokens) ** 0.5))


@pytest.mark.parametrize("tokens", [1, 300], ids=["few", "many"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_torch_form_takes_a_batch_of_cotangents(tokens, interleaved):
    q, k = (torch.randn(1, tokens, heads, 64).requires_grad_() for heads in (3, 1))
    angles, up = torch.rand(tokens, 32), torch.randn(2, 1, tokens, 3, 64)
    a, b = ops.rotary(q, k, angles.cos(), angles.sin(), interleaved=interleaved, backend="torch")
    both = torch.autograd.grad((a, b), (q, k), (up, up[:, :, :, :1]), is_grads_batched=True, retain_graph=True)
    for i, d in enumerate(up):
        one = torch.autograd.grad((a, b), (q, k), (d, d[:, :, :1]), retain_graph=True)
        for got, want in zip(both, one, strict=True):
            torch.testing.assert_close(got[i], want)
