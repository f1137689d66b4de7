"""nn.MultiheadAttention is torch's; nn.Attention is ops.attention between two products."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from fastlm import nn, ops

INF = float("inf")
N, L, T, E, H = 2, 5, 7, 12, 3


def pair(dtype=torch.float64, **options):
    """(torch's module, ours with the same weights), biases included."""
    theirs = torch.nn.MultiheadAttention(E, H, dtype=dtype, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours = nn.MultiheadAttention(E, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, torch.nn.MultiheadAttention)
    return theirs.eval(), ours.eval()


def inputs(batched=True, batch_first=False, own=False, dtype=torch.float64, kdim=E, vdim=E):
    """(query, key, value); own: one tensor for all three."""
    query = torch.randn(N, L, E, dtype=dtype)
    key, value = torch.randn(N, T, kdim, dtype=dtype), torch.randn(N, T, vdim, dtype=dtype)
    three = (query, query, query) if own else (query, key, value)
    if not batched:
        shown = [x[0] for x in three]
    else:
        shown = [x if batch_first else x.transpose(0, 1) for x in three]
    return [shown[0]] * 3 if own else shown


def equal(pair, args, **options):
    """Outputs, weights and the gradients of all parameters are torch's."""
    theirs, ours = pair
    share = 1e-10 if args[0].dtype == torch.float64 else 4e-6  # of the largest value
    expected, found = theirs(*args, **options), ours(*args, **options)
    for mine, other in zip(found, expected):
        if other is None:
            assert mine is None
        else:
            assert mine.shape == other.shape and (mine - other).abs().max() <= share * other.abs().max()
    for module, (out, _) in ((theirs, expected), (ours, found)):
        module.zero_grad()
        out.square().sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert (mine.grad - other.grad).abs().max() <= share * other.grad.abs().max(), name


def hidden(shape, dtype, share=0.3):
    """A boolean or additive mask that leaves every query a key."""
    mask = torch.rand(shape) < share
    mask[..., 1] = False
    if dtype == torch.bool:
        return mask
    return torch.randn(shape, dtype=dtype).masked_fill(mask, -INF)


@pytest.mark.parametrize(("batched", "batch_first"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch(batched, batch_first, own, bias):
    both = pair(batch_first=batch_first, bias=bias)
    args = inputs(batched, batch_first, own)
    for need, average in ((False, True), (True, True), (True, False)):
        equal(both, args, need_weights=need, average_attn_weights=average)
    theirs, ours = (m.float() for m in both)
    equal((theirs, ours), [args[0].float()] * 3 if own else [x.float() for x in args])


@pytest.mark.parametrize(
    "added", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}]
)
@pytest.mark.parametrize("padding", [None, torch.bool, torch.float64])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float64])
def test_masks(added, padding, mask):
    both = pair(**dict.fromkeys(added, True))
    for batched, rank, need in itertools.product((True, False), (2, 3), (True, False)):
        options = {}
        if padding is not None:
            options["key_padding_mask"] = hidden((N, T) if batched else (T,), padding)
        if mask is not None:
            options["attn_mask"] = hidden((L, T) if rank == 2 else (H * (N if batched else 1), L, T), mask)
        if (
            None not in (padding, mask) and padding != mask
        ):  # torch warns of mixed types and takes the boolean one as additive
            options = {key: _float(x) for key, x in options.items()}
        equal(both, inputs(batched), need_weights=need, **options)


def _float(mask):
    return mask if mask.dtype != torch.bool else torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -INF)


@pytest.mark.parametrize("added", [{}, {"add_zero_attn": True}])
def test_causal(added):
    both = pair(batch_first=True, **added)
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    # torch hides the key that it adds where both is_causal and need_weights=False, and shows it otherwise.
    for need in (True,) if added else (True, False):
        equal(both, inputs(own=True, batch_first=True), attn_mask=mask, is_causal=True, need_weights=need)
    own = inputs(own=True, batch_first=True)
    torch.testing.assert_close(both[1](*own, is_causal=True), both[1](*own, attn_mask=mask))


def test_other_widths_and_state_dict():
    both = pair(kdim=6, vdim=10)
    equal(both, inputs(kdim=6, vdim=10), key_padding_mask=hidden((N, T), torch.bool))
    assert "k_proj_weight" in both[1].state_dict() and both[1].state_dict().keys() == both[0].state_dict().keys()


def test_queries_that_see_nothing_give_zero():
    _, ours = pair(batch_first=True)
    args = inputs(batch_first=True)
    padding = torch.zeros(N, T, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(*args, key_padding_mask=padding)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(L, E))
    assert (weights[1] == 0).all() and torch.allclose(weights[0].sum(-1), torch.ones(L).double())
    torch.testing.assert_close(out[:1], ours(*(x[:1] for x in args))[0])


def test_dropout_in_training_only():
    ours = pair(dropout=0.5)[1]
    args = inputs()
    plain = ours(*args)[0]
    assert torch.equal(plain, ours(*args)[0])
    ours.train()
    torch.manual_seed(3)
    first, weights = ours(*args)
    assert not torch.allclose(first, ours(*args)[0])
    torch.manual_seed(3)
    assert torch.equal(first, ours(*args)[0])
    torch.testing.assert_close(weights.sum(-1), torch.ones(N, L).double())
    mean = sum(ours(*args, need_weights=False)[0] for _ in range(400)) / 400
    assert (mean - plain).abs().max() < 0.25 * (first - plain).abs().max()


def test_inside_torchs_encoder_layer():
    layer = torch.nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    twin.self_attn = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    twin.self_attn.load_state_dict(layer.self_attn.state_dict())
    x, mask = torch.randn(N, L, E).double(), torch.ones(L, L, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * L, [False] * 3 + [True] * (L - 3)])
    torch.testing.assert_close(twin(x, mask, padding, is_causal=True), layer(x, mask, padding, is_causal=True))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"attn_mask": torch.zeros(T, L)}, ValueError, r"attn_mask must be \[5, 7\] or \[6, 5, 7\], got \[7, 5\]"),
        ({"key_padding_mask": torch.zeros(T, N)}, ValueError, r"key_padding_mask must be \[2, 7\], got \[7, 2\]"),
        (
            {"key_padding_mask": torch.zeros(N, T, dtype=torch.int64)},
            TypeError,
            "boolean .True hides. or floating point",
        ),
    ],
)
def test_mistakes(options, error, words):
    with pytest.raises(error, match=words):
        pair()[1](*inputs(), **options)
    with pytest.raises(ValueError, match="must be all"):
        pair()[1](torch.zeros(5), torch.zeros(5), torch.zeros(5))
    nested = torch.nested.nested_tensor([torch.zeros(3, E), torch.zeros(4, E)], layout=torch.jagged)
    with pytest.raises(ValueError, match="key_padding_mask"):
        pair()[1](nested, nested, nested)


# --- nn.Attention ---------------------------------------------------------------------------------------------------

D, HEADS, KV, DH = 16, 4, 2, 6


def layer(**options):
    module = nn.Attention(D, HEADS, KV, DH, dtype=torch.float64, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module.eval()


def tables(length):
    angles = torch.arange(length)[:, None] * torch.tensor([1.0, 0.3, 0.1])
    return angles.cos(), angles.sin()


def split(module, x):
    return (F.linear(x, module.qkv.weight, module.qkv.bias)).unflatten(-1, (-1, DH)).split((HEADS, KV, KV), -2)


def test_everything_at_once_equals_the_op():
    module = layer(
        bias=True, qk_norm=True, window=(3, 0), softcap=2.0, sinks=True, relative_bias=(8, 6, False), alibi=True
    )
    x, (cos, sin) = torch.randn(2, 9, D).double(), tables(9)
    q, k, v = split(module, x)
    q, k = (F.rms_norm(t, (DH,), norm.weight, 1e-6) for t, norm in ((q, module.q_norm), (k, module.k_norm)))
    q, k = ops.rotary(q, k, cos, sin)
    out = ops.attention(
        q, k, v, causal=True, window=(3, 0), softcap=2.0, sinks=module.sinks, alibi_slopes=nn.alibi_slopes(HEADS),
        relative_bias=ops.RelativeBias(module.relative_bias.weight, False, 6), key_lengths=torch.tensor([9, 9]),
    )  # fmt: skip
    found = module(x, cos=cos, sin=sin, causal=True, key_lengths=torch.tensor([9, 9]))
    torch.testing.assert_close(found, module.out(out.flatten(2)))
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    assert sorted(module.state_dict()) == [
        "k_norm.weight", "out.bias", "out.weight", "q_norm.weight", "qkv.bias", "qkv.weight", "relative_bias.weight", "sinks",
    ]  # fmt: skip
    wide = module(x, cos=cos, sin=sin, causal=True, window=None)  # the call wins over the layer
    assert not torch.allclose(wide[:, 5:], found[:, 5:])


def test_plain_layer_is_small_and_not_causal_by_default():
    module = layer()
    assert sorted(module.state_dict()) == ["out.weight", "qkv.weight"]
    x = torch.randn(2, 5, D).double()
    q, k, v = (t.transpose(1, 2) for t in split(module, x))
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), module.out(expected))
    first = nn.Attention(24, 4)
    assert first.head_dim == 6 and first.qkv.weight.shape == (72, 24)


@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention(bias):
    module = layer(bias=bias)
    x, context = torch.randn(2, 5, D).double(), torch.randn(2, 8, D).double()
    lengths = torch.tensor([8, 3])
    q, (_, k, v) = split(module, x)[0], split(module, context)
    out = ops.attention(q, k, v, key_lengths=lengths)
    torch.testing.assert_close(module(x, context=context, key_lengths=lengths), module.out(out.flatten(2)))
    torch.testing.assert_close(module(x, context=x), module(x))
    with pytest.raises(ValueError, match="leave them out with a context"):
        module(x, context=context, cos=tables(8)[0], sin=tables(8)[1])


@pytest.mark.parametrize("lengths", [[4, 4], [4, 2]])
def test_cache_continues_the_sequence(lengths):
    module = layer(window=(3, None), qk_norm=True, alibi=True)
    (cos, sin), x = tables(8), torch.randn(2, 8, D).double()
    cache = nn.KVCache(1, KV, DH, 2, 8, dtype=torch.float64)
    with torch.no_grad():
        module(x[:, :4], cos=cos, sin=sin, cache=cache, causal=True)
        cache.advance(4)
        cache.set_lengths(lengths)
        new = x[:, 4:6]
        found = module(new, cos=cos, sin=sin, cache=cache, causal=True)
        for row, length in enumerate(lengths):
            whole = torch.cat((x[row, :length], new[row]))[None]
            alone = module(whole, cos=cos, sin=sin, causal=True)[0, length:]
            torch.testing.assert_close(found[row], alone)


def test_packed_sequences_documents_and_positions():
    module = layer(alibi=True)
    (cos, sin), parts = tables(6), [torch.randn(n, D).double() for n in (4, 6)]
    expected = torch.cat([module(p[None], cos=cos, sin=sin, causal=True)[0] for p in parts])
    positions = torch.cat([torch.arange(4), torch.arange(6)])
    packed = module(
        torch.cat(parts), cos=cos, sin=sin, positions=positions, causal=True, cu_seqlens_q=torch.tensor([0, 4, 10])
    )
    torch.testing.assert_close(packed, expected)
    documents = torch.tensor([[0] * 4 + [1] * 6])
    found = module(torch.cat(parts)[None], cos=cos, sin=sin, positions=positions, causal=True, document_ids=documents)
    torch.testing.assert_close(found[0], expected)


def test_block_mask_and_dropout():
    module = layer(dropout=0.4)
    x = torch.randn(1, 20, D).double()
    mask = torch.rand(20, 20) < 0.4
    expected = torch.zeros(20, 20).double().masked_fill(~mask, -INF)
    torch.testing.assert_close(module(x, block_mask=ops.BlockMask.from_dense(mask, block=16)), module(x, bias=expected))
    module.train()
    assert torch.equal(module(x, seed=5), module(x, seed=5)) and not torch.allclose(
        module(x, seed=5), module(x, seed=6)
    )


def test_alibi_slopes():
    # The figures of the paper, section 3: 8 heads 1/2 ... 1/256, 16 heads the geometric means between; and its rule for 12.
    assert nn.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    torch.testing.assert_close(nn.alibi_slopes(16), torch.tensor([2 ** (-i / 2) for i in range(1, 17)]))
    torch.testing.assert_close(nn.alibi_slopes(12), torch.cat((nn.alibi_slopes(8), nn.alibi_slopes(16)[0:8:2])))
    assert nn.alibi_slopes(1).tolist() == [2.0**-8]
    with pytest.raises(ValueError, match="at least 1"):
        nn.alibi_slopes(0)
    module = nn.Attention(24, 12, alibi=True).bfloat16()
    assert torch.equal(module.alibi_slopes, nn.alibi_slopes(12)) and module.alibi_slopes.dtype == torch.float32
    empty = nn.Attention(24, 12, alibi=True, device="meta").to_empty(device="cpu")
    assert torch.equal(empty.alibi_slopes, nn.alibi_slopes(12))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Attention(16, 4, 3), "n_heads 4 must be a multiple of n_kv_heads 3"),
        (lambda: nn.Attention(18, 4), "d_model 18 must be a multiple of n_heads 4"),
    ],
)
def test_heads_that_do_not_fit(make, words):
    with pytest.raises(ValueError, match=words):
        make()
