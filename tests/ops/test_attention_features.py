"""What attention's features promise beyond accuracy (test_attention_matrix.py): contract, dead rows, randomness, errors."""

import math

import pytest
import torch

from fastlm import ops
from fastlm.ops.attention_reference import kept
from fastlm.ops.random_bits import philox
from fastlm.testing import Case, check_op, check_reference
from tests.ops import attention_matrix as matrix

BACKENDS = ("reference", "torch", "triton")


def _randn(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


def _qkv(S=17, T=23, B=2, H=2, H_kv=1, D=16, dtype=torch.float32, device="cpu"):
    return [_randn(B, n, heads, D, dtype=dtype, device=device) for n, heads in ((S, H), (T, H_kv), (T, H_kv))]


# --- the whole contract, several features at once -------------------------------------------------------------------


def _rich(q, k, v, bias, table, sinks, backend):
    """Everything with a gradient, a window, a cap, unequal lengths and dropout."""
    B, T = q.shape[0], k.shape[1]
    device = q.device
    out, lse = ops.attention(
        q, k, v, causal=True, window=(T - 2, 0), softcap=3.0, bias=bias, sinks=sinks, dropout_p=0.25, seed=5, return_lse=True,
        relative_bias=ops.RelativeBias(table, False, 8), key_lengths=torch.full((B,), T - 1, device=device),
        key_starts=torch.full((B,), 1, device=device), backend=backend,
    )  # fmt: skip
    return out, lse.masked_fill(lse == float("-inf"), 0)


def _rich_args(S, T, D):
    def make(dtype, device):
        return (*_qkv(S, T, 1, D=D, dtype=dtype, device=device), _randn(1, 2, S, T, dtype=dtype, device=device),
                _randn(8, 2, dtype=dtype, device=device), _randn(2, dtype=dtype, device=device))  # fmt: skip

    return make


def _packed(q, k, v, slopes_and_bias, backend):
    total_q, total_k = q.shape[0], k.shape[0]
    cu_q, cu_k = (torch.tensor([0, 1, 1, n], device=q.device, dtype=torch.int32) for n in (total_q, total_k))
    return ops.attention(
        q, k, v, causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, bias=slopes_and_bias, backend=backend
    )


def _packed_args(S, T, D):
    def make(dtype, device):
        q, k, v = (x[0] for x in _qkv(S, T, 1, D=D, dtype=dtype, device=device))
        return q, k, v, _randn(2, 1, T, dtype=dtype, device=device)

    return make


CASES = {
    "rich": Case("attention", _rich, _rich_args(18, 23, 16), _rich_args(3, 5, 2), autocast="cast"),
    "packed": Case("attention", _packed, _packed_args(20, 27, 16), _packed_args(3, 4, 2), autocast="cast"),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name, device):
    check_op(CASES[name], "triton", device)


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    check_reference(CASES[name])


@pytest.mark.parametrize("names", matrix.pairs()[: len(matrix.FEATURES)], ids=lambda names: names[0])
def test_derivatives_of_the_reference(names):
    """fp64 gradcheck and gradgradcheck along one random direction for each feature."""
    case, args, _ = matrix.case_of(names, sizes={"D": 4, "S": 37, "T": 53})
    if "bf16" in names:
        return
    args = tuple(a.double().requires_grad_() for a in args)

    def fn(*args):
        found = case.fn(*args, backend="reference")
        return tuple(x.masked_fill(x == float("-inf"), 0) for x in (found if isinstance(found, tuple) else (found,)))

    assert torch.autograd.gradcheck(fn, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, args, fast_mode=True)


# --- rows that see nothing ------------------------------------------------------------------------------------------

_BIAS = torch.zeros(1, 2, 17, 23)
_BIAS[:, :, 4] = float("-inf")
_BLOCKS = torch.ones(2, 2, dtype=torch.bool)
_BLOCKS[0] = False
# mask -> (options, whether the first query sees anything in the first sequence): query 4 of it is always dead
DEAD = {
    "window": {"window": (0, 0), "causal": "top_left", "key_starts": torch.tensor([6, 0])},
    "key lengths": {"key_lengths": torch.tensor([0, 23])},
    "left padding": {"key_starts": torch.tensor([23, 3])},
    "bottom right": {"causal": True, "key_lengths": torch.tensor([5, 23])},
    "bias": {"bias": _BIAS},
    "documents": {"document_ids": (torch.arange(34).view(2, 17), torch.full((2, 23), 7))},
    "block mask": {"block_mask": ops.BlockMask.from_blocks(_BLOCKS, 17, 23, block=16)},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DEAD)
def test_dead_rows(name, backend, device):
    """Output 0, lse -inf, gradients exactly 0, and finite ones elsewhere; sinks change nothing of that."""
    options = {key: matrix._moved(value, device) for key, value in DEAD[name].items()}
    q, k, v = (x.requires_grad_() for x in _qkv(device=device))
    extra = [options["bias"].clone().requires_grad_()] if "bias" in options else []
    if extra:
        options["bias"] = extra[0]
    if backend != "torch":
        options["sinks"] = torch.tensor([0.3, -1.0], device=device, requires_grad=True)
        extra.append(options["sinks"])
    found = ops.attention(q, k, v, **options, return_lse=backend != "torch", backend=backend)
    out = found if backend == "torch" else found[0]
    assert torch.equal(out[0, 4], torch.zeros_like(out[0, 4])), "output"
    loss = out.square().sum()
    if backend != "torch":
        lse = found[1]
        dead = (lse == float("-inf")).transpose(1, 2)
        assert dead[0, 4].all() and torch.equal(dead, (out == 0).all(-1))
        loss = loss + lse.masked_fill(lse == float("-inf"), 0).sum()
    dq, *rest = torch.autograd.grad(loss, (q, k, v, *extra))
    assert torch.equal(dq[0, 4], torch.zeros_like(dq[0, 4])), "gradient"
    assert all(torch.isfinite(g).all() for g in (dq, *rest))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_before_the_key_starts_is_never_seen(backend, device):
    q, k, v = _qkv(S=1, device=device)
    starts = torch.tensor([3, 20], device=device)
    want = ops.attention(q, k, v, key_starts=starts, backend="reference")
    for b, start in enumerate(starts.tolist()):
        k[b, :start], v[b, :start] = float("nan"), float("inf")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    got = ops.attention(q, k, v, key_starts=starts, backend=backend)
    torch.testing.assert_close(got, want)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(got.sum(), (q, k, v)))


def test_sequences_of_no_length(device):
    """Packed: no queries, no keys, neither, and a batch of none."""
    q, k, v = (x[0].requires_grad_() for x in _qkv(6, 5, 1, device=device))
    cu_q, cu_k = (torch.tensor(c, device=device) for c in ([0, 0, 2, 2, 6], [0, 3, 3, 3, 5]))
    for backend in ("reference", "torch", "triton"):
        out = ops.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend=backend)
        assert torch.equal(out[:2], torch.zeros_like(out[:2]))
        torch.testing.assert_close(
            out[2:], ops.attention(q[None, 2:], k[None, 3:], v[None, 3:], backend="reference")[0]
        )
        dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert torch.equal(dq[:2], torch.zeros_like(dq[:2])) and torch.equal(dk[:3], torch.zeros_like(dk[:3]))
        none = torch.zeros(1, dtype=torch.int64, device=device)
        empty = ops.attention(q[:0], k[:0], v[:0], cu_seqlens_q=none, backend=backend)
        assert empty.shape == (0, 2, 16)


# --- equal things said in two ways ----------------------------------------------------------------------------------


def _same(device, one, other):
    """Two ways to say the options give the same."""
    q, k, v = _qkv(17, 17, H=4, H_kv=2, device=device)
    for backend in ("reference", "triton"):
        torch.testing.assert_close(*(ops.attention(q, k, v, **said, backend=backend) for said in (one, other)))


def test_documents_that_lie_in_order_are_packed_sequences(device):
    q, k, v = (x[:1] for x in _qkv(17, 17, device=device))
    ids = torch.tensor([[0] * 5 + [1] * 9 + [2] * 3], device=device)
    cu = torch.tensor([0, 5, 14, 17], device=device)
    for backend in ("reference", "triton"):
        packed = ops.attention(q[0], k[0], v[0], causal=True, cu_seqlens_q=cu, backend=backend)
        torch.testing.assert_close(ops.attention(q, k, v, causal=True, document_ids=ids, backend=backend)[0], packed)


def test_alibi_is_a_bias(device):
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)
    i = torch.arange(17, device=device)
    _same(device, {"alibi_slopes": slopes}, {"bias": -slopes[:, None, None] * (i - i[:, None]).abs()})


def test_relative_bias_is_a_bias(device):
    relative = ops.RelativeBias(_randn(12, 4, device=device), True, 7)
    i = torch.arange(17, device=device)
    at = (i - i[:, None]).clamp(-7, 7) + 7
    _same(device, {"relative_bias": relative}, {"bias": relative.by_distance()[:, at]})


def test_a_block_mask_is_a_causal_mask(device):
    mask = ops.BlockMask.from_rule(lambda b, h, q, k: q >= k, 17, 17, block=16).to(device)
    _same(device, {"block_mask": mask}, {"causal": True})


def test_a_sink_is_a_key_without_value(device):
    q, k, v = _qkv(5, 7, 1, 2, 2, device=device)
    sinks = torch.tensor([0.5, -0.25], device=device)
    zeros = torch.zeros(1, 1, 2, 16, device=device)
    bias = torch.cat((sinks[:, None, None].expand(2, 5, 1), torch.zeros(2, 5, 7, device=device)), -1)
    want, lse = ops.attention(
        q, torch.cat((zeros, k), 1), torch.cat((zeros, v), 1), bias=bias, return_lse=True, backend="reference"
    )
    for backend in ("reference", "triton"):
        out, found = ops.attention(q, k, v, sinks=sinks, return_lse=True, backend=backend)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(found, lse)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, longest", [(32, 128), (16, 20), (6, 9)])
def test_buckets_are_those_of_t5(bidirectional, buckets, longest):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    distance = torch.arange(-longest - 3, longest + 4)
    want = t5._relative_position_bucket(distance, bidirectional, buckets, longest)
    table = torch.arange(buckets, dtype=torch.float32)[:, None]
    found = ops.RelativeBias(table, bidirectional, longest).by_distance()[0]
    assert torch.equal(found[(distance.clamp(-longest, longest) + longest)].long(), want)


# --- dropout --------------------------------------------------------------------------------------------------------


def test_philox_known_answers():
    """The test vectors of the paper's own library (Random123, kat_vectors, philox4x32-10)."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0xA4093822 | (0x299F31D0 << 32),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, want in cases:
        found = philox(torch.tensor(key), *(torch.tensor([c]) for c in counter))
        assert tuple(int(w) for w in found) == want


def test_dropout_drops_what_it_says(device):
    """Identity values show the weights themselves: the kernel drops exactly those that the reference's bits say."""
    q, k, _ = _qkv(17, 23, 2, 2, 2, device=device)
    v = torch.eye(23, device=device).view(1, 23, 1, 23).expand(2, -1, 2, -1)
    seed = torch.tensor([123456789012345, 7], device=device)
    found = ops.attention(q, k, v, dropout_p=0.4, seed=seed, backend="triton")
    keep = kept(matrix.call_of(q, k, v, dropout_p=0.4, seed=seed)).transpose(1, 2)
    assert torch.equal(found != 0, keep)
    whole = ops.attention(q, k, v, backend="triton")
    torch.testing.assert_close(found, whole * keep / 0.6)
    share, n = keep.float().mean().item(), keep.numel()
    assert abs(share - 0.6) < 4 * math.sqrt(0.24 / n)


def test_dropout_seeds(device):
    q, k, v = _qkv(device=device)

    def call(**options):
        return ops.attention(q, k, v, dropout_p=0.5, backend="triton", **options)

    assert torch.equal(call(seed=3), call(seed=3))
    assert torch.equal(call(seed=3), call(seed=torch.tensor([3, 0], device=device)))
    for other in (call(seed=4), call(seed=torch.tensor([3, 1], device=device)), call(seed=3 + 2**32), call()):
        assert not torch.equal(call(seed=3), other)
    torch.manual_seed(1)
    first = call()
    torch.manual_seed(1)
    assert torch.equal(first, call())
    assert torch.equal(ops.attention(q, k, v, seed=3), ops.attention(q, k, v))


# --- torch.compile and torch.export ---------------------------------------------------------------------------------


def test_export(device):
    """A module with several features goes through torch.export, lengths of sequences left open."""

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sinks = torch.nn.Parameter(torch.tensor([0.5, -0.5], device=device))

        def forward(self, q, k, v, lengths):
            return ops.attention(
                q, k, v, causal=True, window=(4, 0), sinks=self.sinks, key_lengths=lengths, backend="triton"
            )

    q, k, v = _qkv(17, 17, device=device)
    lengths = torch.tensor([17, 9], device=device)
    module, length = Module(), torch.export.Dim("length", min=2, max=64)
    shapes = [{1: length}] * 3 + [None]
    program = torch.export.export(module, (q, k, v, lengths), dynamic_shapes=shapes)
    for n in (17, 20):
        q, k, v = _qkv(n, n, device=device)
        torch.testing.assert_close(program.module()(q, k, v, lengths), module(q, k, v, lengths))


@pytest.mark.parametrize(
    "names", [("packed", "bias"), ("block mask", "causal"), ("documents", "T5 relative bias"), ("dropout",)]
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compile(names, backend, device):
    """fullgraph, with its options as arguments or constants, forward and backward."""
    case, args, _ = matrix.case_of(names, device)
    torch._dynamo.reset()
    fn = torch.compile(lambda *a: case.fn(*a, backend=backend), fullgraph=True, backend="aot_eager")
    args = tuple(a.requires_grad_() for a in args)
    got, want = fn(*args), case.fn(*args, backend=backend)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got.sum(), args), torch.autograd.grad(want.sum(), args)):
        torch.testing.assert_close(g, w)


# --- errors ---------------------------------------------------------------------------------------------------------

_CU = torch.tensor([0, 5, 17])
ERRORS = {
    r"pair \(left, right\)": {"window": "all"},
    "-1 for no limit": {"window": (-2, 0)},
    r"\[0, 1\)": {"dropout_p": 1.0},
    "softcap must be > 0": {"softcap": -1.0},
    r"alibi_slopes must be \[2\]": {"alibi_slopes": torch.ones(3)},
    r"sinks must be \[2\]": {"sinks": torch.ones(1)},
    "sinks must be floating point": {"sinks": torch.ones(2, dtype=torch.int64)},
    r"key_starts must lie in \[0, 23\]": {"key_starts": torch.tensor([0, 24])},
    r"prefix_lengths must be \[2\]": {"prefix_lengths": torch.tensor([1])},
    "prefix_lengths must lie in": {"prefix_lengths": torch.tensor([1, -1])},
    r"document_ids of the keys must be \[2, 23\]": {"document_ids": torch.zeros(2, 17, dtype=torch.int64)},
    r"bias must broadcast to \[2, 2, 17, 23\]": {"bias": torch.zeros(3, 17, 23)},
    "a boolean mask m is": {"bias": torch.zeros(17, 23, dtype=torch.bool)},
    "must be a RelativeBias": {"relative_bias": torch.zeros(32, 2)},
    "must have 2 heads": {"relative_bias": torch.zeros(3, 5)},
    "half the buckets": {"relative_bias": ops.RelativeBias(torch.zeros(32, 2), True, 8)},
    "must be a fastlm.ops.BlockMask": {"block_mask": torch.ones(17, 23, dtype=torch.bool)},
    r"block_mask is for \(16, 23\)": {
        "block_mask": ops.BlockMask.from_blocks(torch.ones(1, 2, dtype=torch.bool), 16, 23, block=16)
    },
    "int or an int64 tensor": {"dropout_p": 0.5, "seed": torch.tensor([1])},
    "belong to packed sequences": {"max_seqlen_q": 17},
    r"must be \[total, H, Dh\]": {"cu_seqlens_q": _CU},
}


@pytest.mark.parametrize("match", ERRORS)
def test_errors(match):
    with pytest.raises((ValueError, TypeError), match=match):
        ops.attention(*_qkv(), **ERRORS[match])


@pytest.mark.parametrize(
    "match, options",
    [
        ("need cu_seqlens_q", {"cu_seqlens_k": _CU}),
        ("need cu_seqlens_k", {"cu_seqlens_q": _CU}),
        (
            "must rise from 0 to 17",
            {"cu_seqlens_q": torch.tensor([0, 9, 5, 17]), "cu_seqlens_k": torch.tensor([0, 9, 9, 23])},
        ),
        ("must rise from 0 to 23", {"cu_seqlens_q": _CU, "cu_seqlens_k": torch.tensor([0, 5, 22])}),
        (r"cu_seqlens_k must be \[3\]", {"cu_seqlens_q": _CU, "cu_seqlens_k": torch.tensor([0, 23])}),
        ("a sequence has 12 rows", {"cu_seqlens_q": _CU, "cu_seqlens_k": torch.tensor([0, 5, 23]), "max_seqlen_q": 11}),
        ("int32 or int64", {"cu_seqlens_q": _CU.float(), "cu_seqlens_k": _CU}),
    ],
)
def test_errors_of_packed_sequences(match, options):
    with pytest.raises((ValueError, TypeError), match=match):
        ops.attention(*(x[0] for x in _qkv()), **options)


def test_slopes_have_no_gradient_in_the_kernels(device):
    q, k, v = _qkv(device=device)
    slopes = torch.ones(2, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient of alibi_slopes"):
        ops.attention(q, k, v, alibi_slopes=slopes, backend="triton")
    out = ops.attention(q, k, v, alibi_slopes=slopes, backend="reference")
    assert torch.autograd.grad(out.sum(), slopes)[0].abs().sum() > 0
