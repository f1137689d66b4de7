"""nn.MLP and nn.GatedMLP: what they compute, their parameters, and options that reach the op."""

import pytest
import torch
import torch.nn.functional as F

from fastlm import nn, ops


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("d_out", [None, 7])
def test_mlp_equals_its_layers(bias, recompute, d_out):
    layer = nn.MLP(12, 20, d_out, bias=bias, activation="gelu", recompute=recompute)
    x = torch.randn(2, 3, 12, requires_grad=True)
    want = layer.down(F.gelu(layer.up(x)))
    _same(layer(x), want, (x, *layer.parameters()))
    assert want.shape[-1] == (d_out or 12)
    names = ["up.weight", "up.bias", "down.weight", "down.bias"]
    assert list(layer.state_dict()) == [n for n in names if bias or "weight" in n]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gated_mlp_equals_its_layers(bias, recompute):
    layer = nn.GatedMLP(12, 20, bias=bias, recompute=recompute)
    x = torch.randn(2, 3, 12, requires_grad=True)
    _same(layer(x), layer.down(F.silu(layer.gate(x)) * layer.up(x)), (x, *layer.parameters()))
    names = ["gate.weight", "gate.bias", "up.weight", "up.bias", "down.weight", "down.bias"]
    assert list(layer.state_dict()) == [n for n in names if bias or "weight" in n]


def _same(got, want, inputs):
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(got)
    for g, w in zip(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy)):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("module", [nn.MLP, nn.GatedMLP])
def test_another_layer_in_place_of_a_linear_is_called(module, recompute):
    layer, x = module(12, 20, recompute=recompute), torch.randn(3, 12)
    layer.down = nn.LoRALinear(layer.down, 2)
    torch.nn.init.normal_(layer.down.b)
    act = F.gelu(layer.up(x), approximate="tanh") if module is nn.MLP else F.silu(layer.gate(x)) * layer.up(x)
    y = layer(x)
    torch.testing.assert_close(y, layer.down(act))
    y.sum().backward()
    assert layer.down.b.grad.any()


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_hooks_on_a_layer_run(name):
    layer, x, seen = nn.GatedMLP(12, 20), torch.randn(3, 12, requires_grad=True), []
    want, part = layer(x), getattr(layer, name)
    hooks = [
        lambda: part.register_forward_hook(lambda module, args, y: seen.append(y.shape[-1])),
        lambda: part.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1])),
        lambda: part.register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0].shape[-1])),
        lambda: part.register_full_backward_pre_hook(lambda module, dy: seen.append(dy[0].shape[-1])),
    ]
    for register in hooks:
        handle = register()
        y = layer(x)
        torch.testing.assert_close(y, want)
        y.sum().backward()
        handle.remove()
    assert seen == [part.out_features, part.in_features, part.out_features, part.out_features]
    part.forward = lambda x: seen.append("forward") or F.linear(x, part.weight)  # as accelerate's offloading sets it
    torch.testing.assert_close(layer(x), want)
    assert seen[4:] == ["forward"]


def test_plain_layers_go_to_the_op(monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "mlp", lambda *args, **options: asked.append("mlp") or args[0])
    monkeypatch.setattr(ops, "gated_mlp", lambda *args, **options: asked.append("gated_mlp") or args[0])
    for module in (nn.MLP, nn.GatedMLP):
        layer = module(4, 8)
        layer(torch.randn(1, 4))
        del layer.down._parameters["weight"]
        layer.down.weight = torch.randn(4, 8)  # a plain tensor, as FSDP sets it between its calls
        layer(torch.randn(1, 4))
    assert asked == ["mlp", "mlp", "gated_mlp", "gated_mlp"]


def test_options_reach_the_op(monkeypatch):
    seen = {}
    monkeypatch.setattr(ops, "mlp", lambda *args, **options: seen.update(options) or args[0])
    nn.MLP(4, 8, activation="relu2", recompute=True)(torch.randn(1, 4))
    assert seen == {"activation": "relu2", "recompute": True}
    assert "activation='relu2', recompute=True" in repr(nn.MLP(4, 8, activation="relu2", recompute=True))


@pytest.mark.parametrize("module", [nn.MLP, nn.GatedMLP])
def test_device_dtype_and_errors(module):
    layer = module(4, 8, dtype=torch.bfloat16, device="meta")
    assert all(p.dtype == torch.bfloat16 and p.is_meta for p in layer.parameters())
    with pytest.raises(ValueError, match="activation must be one of gelu, gelu_tanh, silu, relu, relu2, got 'swish'"):
        module(4, 8, activation="swish")
