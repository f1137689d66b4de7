"""Plans of the products with weights of few bits, beside those of fuzz_plans.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from fastlm import ops
from fastlm.ops.quantize import quantize_weight
from tests.ops.fuzz import Plan, shape_of


def quantized_linear(draw):
    bits = draw(st.sampled_from((8, 4)))
    group = draw(st.sampled_from((32, 64, 128) if bits == 4 else (None, 32, 64)))
    N, K = draw(st.sampled_from((1, 3, 8, 17, 33))), draw(st.sampled_from((1, 3, 31, 32, 40, 64, 65, 100, 129)))
    symmetric, scale_dtype = draw(st.booleans()), draw(st.sampled_from((torch.float32, torch.bfloat16)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    q = quantize_weight(torch.randn(N, K, generator=generator), bits, group, symmetric, scale_dtype)
    codes, width = q.codes.double(), group or K
    if bits == 4:  # from the contract: byte j of a group's G / 2 holds columns j and j + G / 2
        parts = [p for g in q.codes.split(group // 2, 1) for p in (g % 16, g // 16)]
        codes = torch.cat(parts, 1)[:, :K].double()
    at = torch.arange(K) // width
    zero = (8.0 if bits == 4 else 0.0) if q.zero is None else q.zero.double().view(N, -1)[:, at]
    weight = q.scale.double().view(N, -1)[:, at] * (codes - zero)
    shapes = {"x": shape_of(draw, K, most=40)} | ({"bias": (N,)} if draw(st.booleans()) else {})

    def call(backend, x, bias=None):
        parts = [None if t is None else t.to(x.device) for t in (q.codes, q.scale, q.zero)]
        return ops.quantized_linear(x, *parts, bias, bits=bits, group_size=group, backend=backend)

    def plain(x, bias=None):
        return F.linear(x, weight.to(x), bias)

    options = {"N": N, "bits": bits, "group": group, "symmetric": symmetric, "scale": scale_dtype}
    return Plan(shapes, call, plain, options)


def _e4m3(v):
    """fp32 values on the grid of fp8 e4m3: four significant bits, steps of 2^-9 at least, at most 448."""
    step = torch.ldexp(torch.ones_like(v), torch.frexp(v)[1].clamp(min=-5) - 4)
    return (torch.round(v / step) * step).clamp(-448, 448)


def fp8_linear(draw):
    rows, D = draw(st.sampled_from((1, 3, 8, 17, 33))), draw(st.sampled_from((1, 3, 8, 17, 40, 65, 130)))
    scaling = draw(st.sampled_from(("row", "tensor")))
    shapes = {"x": shape_of(draw, D, most=20), "weight": (rows, D)} | ({"bias": (rows,)} if draw(st.booleans()) else {})

    def rounded(t):
        t = t.detach().float()
        amax = (t.abs().amax(-1, keepdim=True) if scaling == "row" else t.abs().max()) if t.numel() else torch.ones(())
        amax = amax.clamp(min=1e-12)
        return _e4m3(t * (1 / amax * 448)).double() * (amax / 448)

    def plain(x, weight, bias=None):
        exact = F.linear(x, weight)
        y = F.linear(rounded(x), rounded(weight))  # straight through: the derivative is that of the exact product
        y = y.to(x.dtype) + (exact - exact.detach())
        return y if bias is None else y + bias

    return Plan(
        shapes, lambda backend, **t: ops.fp8_linear(**t, scaling=scaling, backend=backend), plain, {"scaling": scaling}
    )


QUANTIZED = {"quantized_linear": quantized_linear, "fp8_linear": fp8_linear}
