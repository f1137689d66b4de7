"""record_attention shows what the layers of a model read, and changes nothing."""

import pytest
import torch

import fastlm
from fastlm import nn, ops
from fastlm.models import TransformerConfig


def transformer():
    config = TransformerConfig(
        vocab_size=31, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, max_positions=32
    )
    model = fastlm.Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def reads(model, layer, tokens):
    """The attention weights of one layer of the Transformer, from a hook on its qkv product."""
    attention, kept = model.blocks[layer].attention, []
    handle = attention.qkv.register_forward_hook(lambda module, args, out: kept.append(out))
    model(tokens)
    handle.remove()
    q, k, _ = kept[0].unflatten(-1, (-1, attention.head_dim)).split((4, 2, 2), -2)
    S = tokens.shape[1]
    q, k = (t.transpose(1, 2) for t in ops.rotary(q, k, model.cos[:S], model.sin[:S]))
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * attention.head_dim**-0.5
    return scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)


def test_the_transformer():
    model, tokens = transformer(), torch.randint(31, (2, 9))
    plain = model(tokens)
    with nn.record_attention(model, weights=True, rows=4) as maps:
        found = model(tokens)
    assert torch.equal(found, plain)
    assert sorted(maps) == ["blocks.0.attention", "blocks.1.attention"]
    for layer in range(2):
        expected = reads(model, layer, tokens)
        read = maps[f"blocks.{layer}.attention"]
        torch.testing.assert_close(read["weights"], expected)
        torch.testing.assert_close(read["received"], expected.sum(2))
        assert not read["weights"].requires_grad
    maps.clear()
    model(tokens)
    assert maps == {} and not any("attention_listener" in m.__dict__ for m in model.modules())


def test_chosen_layers_and_queries():
    model, tokens = transformer(), torch.randint(31, (2, 9))
    with nn.record_attention(model, ["blocks.1"], weights=True, queries=slice(7, 9)) as maps:
        model(tokens)
    assert list(maps) == ["blocks.1.attention"] and maps["blocks.1.attention"]["weights"].shape == (2, 4, 2, 9)
    torch.testing.assert_close(maps["blocks.1.attention"]["weights"], reads(model, 1, tokens)[:, :, 7:])
    with nn.record_attention(model, []) as maps:
        model(tokens)
    assert maps == {}
    with pytest.raises(ValueError, match="no layers .'block.1'."), nn.record_attention(model, ["block.1"]):
        pass


def test_nested_blocks_and_errors_leave_no_trace():
    model, tokens = transformer(), torch.randint(31, (1, 5))
    with nn.record_attention(model) as outer:
        with pytest.raises(RuntimeError, match="planned"), nn.record_attention(model) as inner:
            model(tokens)
            raise RuntimeError("planned")
        assert len(inner) == 2 and outer == {}
        model(tokens)
        assert len(outer) == 2
    assert not any("attention_listener" in m.__dict__ for m in model.modules())


def test_decoding_with_a_cache_of_unequal_rows():
    model, tokens = transformer().eval(), torch.randint(31, (2, 6))
    with torch.no_grad():
        cache = model.make_cache(2, 12)
        model(tokens, cache=cache)
        cache.set_lengths([6, 3])
        with nn.record_attention(model, weights=True) as maps:
            model(torch.tensor([[1], [2]]), cache=cache)
        weights = maps["blocks.0.attention"]["weights"]
        assert weights.shape == (2, 4, 1, 7) and (weights[1, :, :, 4:] == 0).all()
        whole = reads(model, 0, torch.cat((tokens[1, :3], torch.tensor([2])))[None])
        torch.testing.assert_close(weights[1, :, 0, :4], whole[0, :, 3])


def test_our_layers_with_their_own_options():
    x = torch.randn(2, 7, 16)
    layer = nn.Attention(16, 4, sinks=True, alibi=True, window=(2, 0), dropout=0.5)
    with nn.record_attention(layer, weights=True) as maps:
        layer(x, causal=True, seed=1)
    weights = maps[""]["weights"]
    assert (weights.sum(-1) < 1).all() and (weights.tril(-3) == 0).all() and (weights.triu(1) == 0).all()
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 4:] = True
    with nn.record_attention(layer, weights=True) as maps:
        _, average = layer(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(maps[""]["weights"].mean(1), average)
    assert (maps[""]["received"][0, :, 4:] == 0).all()


def test_training_and_compiled_models():
    model, tokens = transformer(), torch.randint(31, (2, 9))
    model.activation_checkpointing = True
    with nn.record_attention(model) as maps:
        model.loss(tokens, tokens).backward()
    assert len(maps) == 2 and model.embed.weight.grad is not None
    layer = nn.Attention(16, 4, alibi=True)
    x = torch.randn(1, 5, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, causal=True), layer(x, causal=True))
    with nn.record_attention(layer) as maps:
        compiled(x, causal=True)
    torch.testing.assert_close(maps[""]["received"].sum(-1), torch.full((1, 4), 5.0))
    maps.clear()
    compiled(x, causal=True)
    assert maps == {}
