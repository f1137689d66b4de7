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
