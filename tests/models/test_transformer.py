"""The model on its own: cache, checkpointing, compile, autocast, meta device, initial weights, bad input."""

import dataclasses
import math

import pytest
import torch

from fastlm.errors import UserError
from fastlm.models import PRESETS, Transformer, TransformerConfig, preset
from fastlm.nn import LoRALinear
from tests.models.families import tokens

GPT2 = preset("gpt2-4x128", vocab_size=61, d_model=32, n_layers=2, max_positions=48)
LLAMA = preset("llama-4x192", vocab_size=61, d_model=48, n_layers=2, max_positions=48, rope_theta=100.0)
BOTH = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])


def make(config, seed=0):
    torch.manual_seed(seed)
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model


def batch_and_labels(rows=2, length=24):
    text = tokens(rows, length + 1)
    labels = text[:, 1:].clone()
    labels[:, 3] = -100
    return text[:, :-1], labels


@BOTH
def test_cache_gives_the_full_forward(config):
    model, text = make(config), tokens(3, 40)
    with torch.no_grad():
        full = model(text)
        cache = model.make_cache(3, 44)
        parts = [model(part, cache=cache) for part in text.split([17, 1, 1, 20, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-5)
    assert cache.lengths.tolist() == [40, 40, 40]
    assert cache.length == 40


@BOTH
def test_cache_with_unequal_rows(config):
    model, text, lengths = make(config), tokens(3, 40), [17, 4, 11]
    with torch.no_grad():
        full = model(text)
        prompts = text[:, :17].clone()
        for row, length in enumerate(lengths):
            prompts[row, length:] = 0  # padding
        cache = model.make_cache(3, 44)
        prefill = model(prompts, cache=cache)
        cache.set_lengths(lengths)
        assert cache.length is None
        at = list(lengths)
        steps = []
        for count in (1, 5, 1):  # one token, a chunk, one token
            part = torch.stack([text[row, a : a + count] for row, a in enumerate(at)])
            steps.append(model(part, cache=cache))
            at = [a + count for a in at]
    for row, length in enumerate(lengths):
        torch.testing.assert_close(prefill[row, :length], full[row, :length], rtol=1e-4, atol=1e-5)
        got = torch.cat([step[row] for step in steps])
        torch.testing.assert_close(got, full[row, length : length + 7], rtol=1e-4, atol=1e-5)
    assert cache.lengths.tolist() == [24, 11, 18]


@BOTH
def test_checkpointing_gives_equal_gradients(config):
    model = make(config)
    text, labels = batch_and_labels()
    model.loss(text, labels).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    kept = _saved_bytes(model, text, labels)
    model.zero_grad()
    model.activation_checkpointing = True
    assert _saved_bytes(model, text, labels) < kept / 2
    model.loss(text, labels).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def _saved_bytes(model, text, labels):
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss(text, labels)
    return total


@BOTH
def test_compiles_as_one_graph(config):
    model = make(config)
    text, labels = batch_and_labels()
    model.loss(text, labels).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(text, labels)
    torch.testing.assert_close(loss, model.loss(text, labels))
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@BOTH
def test_autocast(config):
    model = make(config)
    text, labels = batch_and_labels()
    exact = model.loss(text, labels)
    exact.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = model.loss(text, labels), model(text)
    assert logits.dtype is torch.bfloat16, "products did not run in bf16"
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype is torch.float32
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 0.1, f"{name}: {error}"


@BOTH
def test_what_is_put_around_an_mlps_projections_is_seen(config):
    model, text, seen = make(config), tokens(2, 9), []
    mlp = model.blocks[0].mlp
    with torch.no_grad():
        before = model(text)
        first = mlp.gate_up if mlp.gated else mlp.up
        first.register_forward_hook(lambda module, args, y: seen.append(y.shape[-1]))
        torch.testing.assert_close(model(text), before, rtol=1e-4, atol=1e-5)
        assert seen == [first.out_features]
        mlp.down = LoRALinear(mlp.down, 2)
        torch.nn.init.normal_(mlp.down.b)
        after = model(text)
        merged = mlp.down.to_linear()
        mlp.down = merged
        torch.testing.assert_close(after, model(text), rtol=1e-4, atol=1e-4)
        assert (after - before).abs().max() > 0.01


@BOTH
def test_meta_device(config):
    with torch.device("meta"):
        empty = Transformer(config)
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    made = make(config)
    text = tokens(1, 20)
    empty.load_state_dict(made.state_dict(), assign=True)
    empty.make_tables()
    assert torch.equal(empty(text), made(text))

    with torch.device("meta"):
        fresh = Transformer(config)
    fresh = fresh.to_empty(device="cpu")
    torch.manual_seed(3)
    fresh.reset_parameters()
    torch.manual_seed(3)
    made.reset_parameters()
    assert torch.equal(fresh(text), made(text))


def test_rotary_tables_stay_fp32():
    model = make(LLAMA)
    cos = model.cos.clone()
    model.to(torch.bfloat16)
    assert model.embed.weight.dtype is torch.bfloat16
    assert torch.equal(model.cos, cos)
    assert "cos" not in model.state_dict()


def test_initial_weights():
    model = Transformer(preset("llama-6x384", attention_bias=True, tie_embeddings=False))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            expected = 0.02 / math.sqrt(12) if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name


def test_parameter_names():
    assert sorted(name for name, _ in Transformer(dataclasses.replace(GPT2, n_layers=1)).named_parameters()) == sorted(
        f"blocks.0.{name}.{kind}"
        for name in ("norm1", "norm2", "attention.qkv", "attention.out", "mlp.up", "mlp.down")
        for kind in ("weight", "bias")
    ) + ["embed.weight", "norm.bias", "norm.weight", "positions.weight"]
    names = [name for name, _ in Transformer(dataclasses.replace(LLAMA, n_layers=1)).named_parameters()]
    assert "blocks.0.mlp.gate_up.weight" in names
    assert not any(name.endswith("bias") for name in names)


def test_bad_input():
    model = make(LLAMA)
    text = tokens(2, 8)
    bad = text.clone()
    bad[1, 2] = 61
    cache = model.make_cache(3, 8)
    for match, call in {
        "int64": lambda: model(text.int()),
        "batch, sequence": lambda: model(text[0]),
        "token 61 is outside the vocabulary of 61": lambda: model(bad),
        "token -2 is outside": lambda: model(-text - 2 + text),
        "49 tokens are more than the model's 48 positions": lambda: model(tokens(1, 49)),
        "labels must have the shape": lambda: model.loss(text, text[:, 1:]),
        "cache has 3 rows": lambda: model(text, cache=cache),
        "inference_mode": lambda: model(tokens(3, 4), cache=cache),
    }.items():
        with pytest.raises(UserError, match=match):
            call()
    with torch.no_grad():
        model(tokens(3, 5), cache=cache)
        with pytest.raises(UserError, match="4 more tokens after 5 do not fit in its 8"):
            model(tokens(3, 4), cache=cache)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"norm": "batch"}, "norm must be one of rms, layer"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"d_model": 50, "n_heads": 4}, "no multiple of n_heads"),
        ({"n_heads": 6, "d_model": 48, "n_kv_heads": 4}, "multiple of n_kv_heads"),
        ({"head_dim": 7}, "even head_dim"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be one of none, linear, llama3"),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "rope_factor"),
        ({"rope_scaling": "llama3", "rope_low_freq_factor": 4.0}, "rope_low_freq_factor"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0"),
        ({"eos_ids": (3, 99999)}, r"eos_ids\[1\] must be a token below"),
        ({"kind": "encodre"}, "kind must be decoder"),
    ],
)
def test_bad_config(changes, match):
    with pytest.raises(UserError, match=match) as caught:
        TransformerConfig(**changes)
    assert "\n" not in str(caught.value)


def test_families_to_come_say_so():
    with pytest.raises(NotImplementedError, match="'encoder' is not built yet"):
        TransformerConfig(kind="encoder")


def test_config_resolves_what_is_left_open():
    config = TransformerConfig(d_model=384, n_heads=6)
    assert (config.n_kv_heads, config.head_dim, config.d_ff) == (6, 64, 1024)
    assert TransformerConfig(d_model=100, n_heads=5).d_ff == 320
    assert TransformerConfig(gated=False, activation="gelu").d_ff == 3072


def test_presets():
    for name in PRESETS:
        assert preset(name).vocab_size == PRESETS[name]["vocab_size"]
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in Transformer(preset(name, max_positions=1024)).parameters()) for name in PRESETS
        }
    assert sizes["gpt2"] == 124_439_808
    assert sizes["gpt2-xl"] == 1_557_611_200
    assert sizes["llama-3.2-1b"] == 1_235_814_400
    assert sizes["llama-3.1-8b"] == 8_030_261_248
    with pytest.raises(UserError, match="did you mean 'llama-6x384'"):
        preset("lama-6x384")
    with pytest.raises(UserError, match="unknown key 'width'"):
        preset("gpt2", width=3)
