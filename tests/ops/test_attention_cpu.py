"""The bf16 backward of causal attention on the CPU, against fp64 and beside torch's own."""

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.ops import attention_cpu
from fastlm.testing import assert_accurate, poison_empty


def make(S, H=6, H_kv=2, D=16, Dv=None, sharpness=1.0, B=2):
    shapes = ((B, S, H, D), (B, S, H_kv, D), (B, S, H_kv, Dv or D), (B, S, H, Dv or D))
    q, k, v, dout = (torch.randn(shape).bfloat16() for shape in shapes)
    return q * sharpness, k * sharpness, v, dout


def gradients(fn, q, k, v, dout, dtype=torch.bfloat16):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    out = fn(*leaves)
    return out, torch.autograd.grad(out, leaves, dout.to(dtype))


def torchs(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def check(q, k, v, dout):
    assert attention_cpu.serves(q.detach().requires_grad_(), k, v)
    with poison_empty():
        out, ours = gradients(lambda *a: ops.attention(*a, causal=True, backend="torch"), q, k, v, dout)
    _, exact = gradients(lambda *a: ops.attention(*a, causal=True, backend="reference"), q, k, v, dout, torch.float64)
    plain_out, plain = gradients(torchs, q, k, v, dout)
    assert torch.equal(out, plain_out)
    for name, got, want, base in zip(("dq", "dk", "dv"), ours, exact, plain):
        assert_accurate(got, want, base, name)


@pytest.mark.parametrize("S", [2, 63, 64, 65, 200, 512])
def test_lengths(S):
    check(*make(S))


@pytest.mark.parametrize("sizes", [{"H": 2}, {"H_kv": 1}, {"D": 24, "Dv": 8}, {"B": 1, "D": 64}])
def test_heads(sizes):
    check(*make(70, **sizes))


def test_sharp_attention():
    check(*make(130, D=64, sharpness=2.5))


def test_views_of_one_product_and_inputs_untouched():
    product = torch.randn(2, 100, 10, 16).bfloat16()
    q, k, v = product.split((6, 2, 2), 2)
    before = product.clone()
    check(q, k, v, torch.randn(2, 6, 100, 16).bfloat16().transpose(1, 2))
    assert torch.equal(product, before)


def test_one_graph():
    q, k, v, dout = make(100)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: ops.attention(*a, causal=True), fullgraph=True, backend="aot_eager")
    _, got = gradients(compiled, q, k, v, dout)
    _, want = gradients(lambda *a: ops.attention(*a, causal=True), q, k, v, dout)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w)


def test_second_derivatives():
    q, k, v, _ = make(20)

    def twice(dtype, backend):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = ops.attention(*leaves, causal=True, backend=backend)
        once = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in once), leaves)

    for got, want in zip(twice(torch.bfloat16, "torch"), twice(torch.float64, "reference")):
        assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("change", ["fp32", "long", "no gradient", "more keys"])
def test_others_go_to_torch(change):
    q, k, v, _ = make({"long": 513}.get(change, 20))
    q = q.float() if change == "fp32" else q
    k = torch.cat([k, k], 1) if change == "more keys" else k
    assert not attention_cpu.serves(q if change == "no gradient" else q.requires_grad_(), k, v)
