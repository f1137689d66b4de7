"""nn.LoRALinear: the update, its gradients, merging and the state dict."""

import pytest
import torch

from fastlm import nn


def _layer(bias=True, dtype=None, alpha=8.0):
    layer = nn.LoRALinear(torch.nn.Linear(12, 10, bias=bias, dtype=dtype), 3, alpha)
    torch.nn.init.normal_(layer.b)
    return layer


@pytest.mark.parametrize("bias", [False, True])
def test_base_and_update(bias):
    layer, x = _layer(bias), torch.randn(2, 5, 12)
    want = layer.base(x) + 8 / 3 * (x @ layer.a.t() @ layer.b.t())
    torch.testing.assert_close(layer(x), want)
    layer(x).square().sum().backward()
    got = layer.a.grad, layer.b.grad
    for g, w in zip(got, torch.autograd.grad(want.square().sum(), (layer.a, layer.b))):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
    assert layer.base.weight.grad is None and not layer.base.weight.requires_grad
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["a", "b"]


def test_a_fresh_update_is_zero():
    linear = torch.nn.Linear(12, 10)
    x = torch.randn(4, 12)
    layer = nn.LoRALinear(linear, 2)
    assert torch.equal(layer(x), linear(x)) and layer.scale == 1 and bool(layer.a.any())
    assert "rank=2, alpha=2" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unmerge(dtype):
    layer, x = _layer(dtype=dtype), torch.randn(4, 12, dtype=dtype)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.no_grad():
        want = layer(x)
        layer.merge()
        merged = layer.to_linear()
        assert torch.equal(layer(x), merged(x))
        if dtype == torch.float32:
            torch.testing.assert_close(layer(x), want)
        exact = layer.base.weight.double() + layer.scale * layer.b.double() @ layer.a.double()
        torch.testing.assert_close(merged.weight.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)
        after = layer.state_dict()
        assert list(after) == ["a", "b", "base.weight", "base.bias"]
        assert all(torch.equal(after[k], before[k]) for k in before)
        layer.unmerge()
        assert torch.equal(layer(x), want)


def test_training_goes_on_while_merged():
    layer, x = _layer(), torch.randn(4, 12)
    layer.merge()
    layer(x).sum().backward()
    assert layer.a.grad.any() and layer.b.grad.any()


def test_loading_forgets_what_was_merged():
    layer, other, x = _layer(), _layer(), torch.randn(4, 12)
    layer.merge()
    layer.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(layer(x), other(x))


def test_a_fresh_update_forgets_what_was_merged():
    layer, x = _layer(), torch.randn(4, 12)
    layer.merge()
    layer.reset_parameters()
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_merging_changes_no_dtype(dtype, x_dtype, autocast):
    layer, x = _layer(dtype=dtype), torch.randn(4, 12, dtype=x_dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        before = layer(x)
        layer.merge()
        after = layer(x)
        assert after.dtype == before.dtype
        torch.testing.assert_close(after, before, rtol=0.03, atol=0.1)


def test_errors():
    layer = _layer()
    layer.merge()
    with torch.no_grad(), pytest.raises(TypeError, match="x must be floating point, got torch.int64"):
        layer(torch.ones(4, 12, dtype=torch.int64))
    with pytest.raises(TypeError, match="LoRALinear: linear must be a torch.nn.Linear or nn.QuantizedLinear, got ReLU"):
        nn.LoRALinear(torch.nn.ReLU(), 2)
    with pytest.raises(ValueError, match="LoRALinear: rank must be at least 1, got 0"):
        nn.LoRALinear(torch.nn.Linear(2, 2), 0)


@pytest.mark.parametrize("bits, group", [(8, None), (4, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_over_codes(bits, group, dtype):
    base = nn.QuantizedLinear.from_linear(torch.nn.Linear(40, 10, dtype=dtype), bits, group)
    layer = nn.LoRALinear(base, 3, 8.0)
    torch.nn.init.normal_(layer.b)
    x, saved = torch.randn(2, 3, 40, dtype=dtype, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert all(t.shape != (10, 40) or t.dtype == torch.int8 for t in saved)  # no dequantised weight
    plain = base.dequantize().to(torch.float64).requires_grad_(False)
    wide = [t.detach().double().requires_grad_() for t in (x, layer.a, layer.b)]
    want = plain(wide[0]) + 8 / 3 * (wide[0] @ wide[1].t() @ wide[2].t())
    room = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(y.double(), want, **room)
    got = torch.autograd.grad(y.sum(), (x, layer.a, layer.b))
    for g, w in zip(got, torch.autograd.grad(want.sum(), wide)):
        torch.testing.assert_close(g.double(), w, rtol=room["rtol"], atol=room["atol"] * 4)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["a", "b"] and layer.a.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x[0, 0]).shape == (10,) and layer(x[:0]).shape == (0, 3, 10)
    with pytest.raises(TypeError, match="the base is a QuantizedLinear, .* take to_linear()"):
        layer.merge()
    assert layer.merged_weight is None
    exact = plain.weight + 8 / 3 * layer.b.double() @ layer.a.double()
    torch.testing.assert_close(layer.to_linear().weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
