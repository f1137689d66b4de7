"""attention_weights and received_attention against the softmax written out, for every option of attention."""

import pytest
import torch

from fastlm import ops
from fastlm.ops.attention_maps import OPTIONS

S, T, H, H_KV, D = 37, 53, 4, 2, 8
INF = float("inf")


def heads(S=S, T=T, dtype=torch.float64, B=2):
    return torch.randn(B, S, H, D, dtype=dtype), torch.randn(B, T, H_KV, D, dtype=dtype)


def dense(q, k, seen=True, added=0.0, scale=D**-0.5, softcap=None, sinks=None):
    """The weights as one writes them down; seen and added broadcast to [B, H, S, T]."""
    scores = torch.einsum("bshd,bthd->bhst", q, k.repeat_interleave(H // H_KV, 2)) * scale
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = (scores + added).masked_fill(~torch.as_tensor(seen), -INF)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    return scores.softmax(-1)[..., : k.shape[1]].nan_to_num(0.0)


def cases():
    """name -> (options, the same for `dense`)."""
    i, j = torch.arange(S)[:, None], torch.arange(T)[None]
    diagonal = i + T - S
    lengths, starts, prefix = torch.tensor([T, 20]), torch.tensor([0, 11]), torch.tensor([40, 0])
    bias = torch.randn(2, 1, S, T).double()
    bias[0, 0, 3] = -INF
    slopes, sinks, table = torch.rand(H), torch.randn(H).double(), torch.randn(H, 9).double()
    documents = torch.randint(3, (2, S)), torch.randint(3, (2, T))
    mask = torch.rand(1, H, S, T) < 0.3
    per = lambda x: x.view(2, 1, 1, 1)  # noqa: E731
    return {
        "plain": ({}, {}),
        "scale and softcap": ({"scale": 0.7, "softcap": 1.5}, {"scale": 0.7, "softcap": 1.5}),
        "causal": ({"causal": True}, {"seen": j <= diagonal}),
        "top_left": ({"causal": "top_left"}, {"seen": j <= i}),
        "window": ({"window": (4, 2)}, {"seen": (j >= diagonal - 4) & (j <= diagonal + 2)}),
        "bias": ({"bias": bias}, {"added": bias}),
        "row of bias": ({"bias": bias[:, :, 3:4].clamp(min=-5)}, {"added": bias[:, :, 3:4].clamp(min=-5)}),
        "alibi_slopes": ({"alibi_slopes": slopes}, {"added": -slopes.view(-1, 1, 1).double() * (j - diagonal).abs()}),
        "relative_bias": ({"relative_bias": table}, {"added": table[:, (j - diagonal).clamp(-4, 4) + 4]}),
        "sinks": ({"sinks": sinks}, {"sinks": sinks}),
        "key_lengths": (
            {"key_lengths": lengths, "causal": True},
            {"seen": (j < per(lengths)) & (j <= i + per(lengths) - S)},
        ),
        "key_starts": ({"key_starts": starts}, {"seen": j >= per(starts)}),
        "prefix_lengths": (
            {"prefix_lengths": prefix, "causal": True},
            {"seen": (j <= diagonal) | (j < per(prefix))},
        ),
        "document_ids": (
            {"document_ids": documents},
            {"seen": documents[0][:, None, :, None] == documents[1][:, None, None]},
        ),
        "block_mask": ({"block_mask": ops.BlockMask.from_dense(mask, block=16)}, {"seen": mask}),
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("rows", [7, 256])
def test_equals_a_dense_softmax(name, rows):
    options, same = cases()[name]
    q, k = heads()
    expected = dense(q, k, **same)
    torch.testing.assert_close(ops.attention_weights(q, k, **options), expected)
    torch.testing.assert_close(ops.received_attention(q, k, rows=rows, **options), expected.sum(2))
    for some in (slice(0, 5), slice(13, 35), slice(-3, None), slice(5, 5)):
        torch.testing.assert_close(ops.attention_weights(q, k, queries=some, **options), expected[:, :, some])
    sums = expected.sum(-1)
    if name == "sinks":
        assert (sums < 1).all() and (sums > 0).all()
    else:
        whole = (sums - 1).abs() < 1e-12
        assert (whole | (sums == 0)).all() and whole.any()
    assert (sums == 0).any() == (name in ("bias", "key_lengths")) or name == "block_mask"


def test_every_option_is_covered_and_times_v_gives_the_output():
    assert {key for options, _ in cases().values() for key in options} | {
        "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "check",
    } == OPTIONS  # fmt: skip
    q, k = heads(S=5, T=9)
    v = torch.randn_like(k)
    everything = {
        "causal": True, "window": (6, 0), "softcap": 2.0, "sinks": torch.randn(H).double(), "alibi_slopes": torch.rand(H),
        "bias": torch.randn(1, H, 5, 9).double(), "key_starts": torch.tensor([0, 3]), "key_lengths": torch.tensor([9, 6]),
    }  # fmt: skip
    weights = ops.attention_weights(q, k, **everything).unflatten(1, (H_KV, -1))
    out = torch.einsum("bkgst,btkd->bskgd", weights, v).flatten(2, 3)
    torch.testing.assert_close(out, ops.attention(q, k, v, **everything, backend="reference"))


def test_packed_sequences():
    cu_q, cu_k = torch.tensor([0, 3, 3, 8]), torch.tensor([0, 4, 5, 12])
    q, k = (x[0] for x in heads(S=8, T=12))
    options = {"causal": True, "alibi_slopes": torch.rand(H)}
    expected = torch.zeros(H, 8, 12).double()
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        expected[:, a:b, c:d] = ops.attention_weights(q[None, a:b], k[None, c:d], **options)[0]
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 5, "max_seqlen_k": 7}
    torch.testing.assert_close(ops.attention_weights(q, k, **options, **packed), expected)
    found = ops.attention_weights(q, k, queries=slice(2, 6), **options, **packed)
    torch.testing.assert_close(found, expected[:, 2:6])
    torch.testing.assert_close(ops.received_attention(q, k, rows=3, **options, **packed), expected.sum(1))
    mask = torch.rand(1, H, 5, 7) < 0.5
    blocks = ops.BlockMask.from_dense(torch.nn.functional.pad(mask, (0, 9, 0, 11)), block=16)
    both = ops.attention_weights(q, k, **packed, block_mask=blocks)
    rows = ops.attention_weights(q, k, queries=slice(3, 7), **packed, block_mask=blocks)
    torch.testing.assert_close(rows, both[:, 3:7])
    assert (both[:, :3, :4] > 0).equal(mask[0, :, :3, :4])


def test_gradients_are_those_of_the_dense_weights():
    q, k = (x.requires_grad_() for x in heads(S=5, T=6, B=1))
    bias = torch.randn(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6).double()
    loss = lambda received: (received * weight).square().sum()  # noqa: E731
    expected = torch.autograd.grad(loss(dense(q, k, added=bias).sum(2)), (q, k, bias))
    found = torch.autograd.grad(loss(ops.received_attention(q, k, bias=bias, rows=2)), (q, k, bias))
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda q, k: ops.attention_weights(q, k, causal=True), (q, k))


def test_dtypes_and_autocast():
    q, k = heads(dtype=torch.bfloat16)
    assert ops.attention_weights(q, k).dtype == ops.received_attention(q, k).dtype == torch.float32
    exact = dense(q.double(), k.double())
    torch.testing.assert_close(ops.attention_weights(q, k), exact.float())
    with torch.autocast("cpu"):
        torch.testing.assert_close(ops.attention_weights(q.float(), k.float()), exact.float())


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("blocks", [False, True])
def test_received_attention_never_holds_all_weights(blocks):
    q, k = torch.randn(1, 512, 1, 4), torch.randn(1, 512, 1, 4)
    options = {"block_mask": ops.BlockMask.local(512, before=40, causal=True, block=16)} if blocks else {"causal": True}
    with _Largest() as seen:
        ops.received_attention(q, k, rows=32, **options)
    assert 32 * 512 <= seen.most <= 2 * 32 * 512 < 512 * 512
    with _Largest() as seen:
        ops.attention_weights(q, k, queries=slice(100, 108), **options)
    assert seen.most <= 3 * 16 * 512


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda q, k: ops.attention_weights(q, k, dropout_p=0.1), TypeError, "dropout_p changes no weight"),
        (lambda q, k: ops.received_attention(q, k, casual=True), TypeError, "casual"),
        (lambda q, k: ops.attention_weights(q, k, queries=slice(0, 9, 2)), ValueError, "slice with step 1"),
        (lambda q, k: ops.attention_weights(q, k, queries=3), ValueError, "slice with step 1"),
        (lambda q, k: ops.received_attention(q, k, rows=0), ValueError, "rows must be at least 1"),
        (lambda q, k: ops.attention_weights(q, k, causal="left"), ValueError, "bottom_right"),
    ],
)
def test_mistakes(call, error, words):
    with pytest.raises(error, match=words):
        call(*heads())
