"""adamw_ over the parameters of a GPT in its modes: fp32 masters, remainders, stochastic rounding, 8-bit states, averages.

The yardstick is what a user writes in plain torch: an fp32 step of torch's fused AdamW and the conversions around it. The
remainders have the masters' yardstick: both keep exact fp32 weights, in 2 bytes a parameter less.
"""

import torch

from benchmarks.harness import Bench, ours, plain
from benchmarks.ops.bench_adamw import HYPER, LARGE, SMALL, shapes
from fastlm import ops
from fastlm.ops._native import fused_adamw_
from fastlm.ops.block_quantize import block_dequantize, block_quantize
from fastlm.ops.master_weights import join_master, split_master

MODES = ("masters", "remainders", "stochastic", "codes", "averages")


def make(dtype, device, layers, D, V, mode):
    """-> params, grads, m, v, and the lists of the mode: masters, remainders, averages, scales of m and of v."""
    params = [torch.randn(s, device=device) for s in shapes(layers, D, V)]
    grads = [(0.1 * torch.randn_like(p)).to(dtype) for p in params]
    m = [0.1 * torch.randn_like(p) for p in params]
    v = [t.square() for t in m]
    extra = {"masters": [], "remainders": [], "averages": [], "m_scales": [], "v_scales": []}
    if mode == "masters":
        extra["masters"], params = params, [p.to(dtype) for p in params]
    elif mode == "remainders":
        params, extra["remainders"] = map(list, zip(*map(split_master, params)))
    elif mode == "stochastic":
        params, m, v = ([t.to(dtype) for t in tensors] for tensors in (params, m, v))
    elif mode == "codes":
        m, extra["m_scales"] = map(list, zip(*(block_quantize(t, True) for t in m)))
        v, extra["v_scales"] = map(list, zip(*(block_quantize(t, False) for t in v)))
    else:
        extra["averages"] = [p.clone() for p in params]
    seed = torch.tensor([3, 0], device=device) if mode in ("stochastic", "codes") else None
    return params, grads, m, v, *extra.values(), seed


def by_us(params, grads, m, v, masters, remainders, averages, m_scales, v_scales, seed, backend):
    ops.adamw_(
        params, grads, m, v, step=3, masters=masters or None, remainders=remainders or None, averages=averages or None,
        average_decay=0.999, exp_avg_scales=m_scales or None, exp_avg_sq_scales=v_scales or None, seed=seed,
        backend=backend, **HYPER,
    )  # fmt: skip
    return compared(params, m, masters, averages, m_scales, seed)


def compared(params, m, masters, averages, m_scales, seed):
    """The lists that are compared. Not weights that are rounded at random: m then."""
    return m if seed is not None and not m_scales else averages or masters or params


def reference(params, grads, m, v, masters, remainders, averages, m_scales, v_scales, seed):
    """The step in the dtype of the arguments, which the harness makes fp64, without rounding."""
    found, moments = [], []
    for i, p in enumerate(masters or params):
        if remainders:
            p = join_master(p.to(torch.bfloat16), remainders[i]).to(p.dtype)
        g = grads[i].to(p.dtype)
        a = block_dequantize(m[i], m_scales[i]) if m_scales else m[i]
        b = block_dequantize(v[i], v_scales[i]) if v_scales else v[i]
        a, b = HYPER["beta1"] * a + (1 - HYPER["beta1"]) * g, HYPER["beta2"] * b + (1 - HYPER["beta2"]) * g * g
        update = a / (1 - HYPER["beta1"] ** 3) / ((b / (1 - HYPER["beta2"] ** 3)).sqrt() + HYPER["eps"])
        p = p * (1 - HYPER["lr"] * HYPER["weight_decay"]) - HYPER["lr"] * update
        found.append(torch.lerp(averages[i], p, 0.001) if averages else p)
        moments.append(a)
    return compared(found, moments, [], [], m_scales, seed)


@torch.no_grad()
def by_torch(params, grads, m, v, masters, remainders, averages, m_scales, v_scales, seed):
    step = torch.tensor(3.0, device=params[0].device)
    weights = masters or [p.float() for p in params]
    if remainders:
        weights = list(map(join_master, params, remainders))
    if m_scales:
        a, b = (list(map(block_dequantize, *pair)) for pair in ((m, m_scales), (v, v_scales)))
    else:
        a, b = [t.float() for t in m], [t.float() for t in v]
    fused_adamw_(weights, [g.float() for g in grads], a, b, step, **HYPER)
    if m_scales:
        for codes, scales, states in ((m, m_scales, a), (v, v_scales, b)):
            for code, scale, state in zip(codes, scales, states):
                for old, new in zip((code, scale), block_quantize(state, code.dtype == torch.int8)):
                    old.copy_(new)
    elif m[0] is not a[0]:
        torch._foreach_copy_(m, a)
        torch._foreach_copy_(v, b)
    for i, (p, w) in enumerate(zip(params, weights)):
        if remainders:
            for old, new in zip((p, remainders[i]), split_master(w)):
                old.copy_(new)
        elif seed is not None and p.dtype == torch.bfloat16:
            bits = w.view(torch.int32)
            p.copy_(((bits + torch.randint_like(bits, 65536)) & -65536).view(torch.float32))
        elif p is not w:
            p.copy_(w)
    if averages:
        torch._foreach_lerp_(averages, weights, 0.001)
    return compared(params, m, masters, averages, m_scales, seed)


def traffic(mode, params, grads, *rest):
    """Everything but the gradients is read and written."""
    lists = [params, *rest[:-1]]
    return sum(t.nbytes for t in grads) + 2 * sum(t.nbytes for tensors in lists for t in tensors)


BENCH = Bench(
    op="adamw_",
    make=make,
    reference=reference,
    providers=[*ours("adamw_", by_us), plain(by_torch)],
    sizes={
        "tiny": [{"layers": 1, "D": 16, "V": 40, "mode": mode} for mode in MODES],
        "cpu": [{"layers": 2, "D": 384, "V": 2048, "mode": mode} for mode in MODES],
        "quick": [size | {"mode": mode} for size in (SMALL, LARGE) for mode in MODES],
    },
    traffic=traffic,
    modes=("forward",),
    dtypes={"cpu": (torch.bfloat16,), "cuda": (torch.bfloat16,)},
)
