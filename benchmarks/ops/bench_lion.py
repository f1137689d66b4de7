"""lion_ over the parameters of a GPT, without and with a clip coefficient, against torch's foreach functions."""

import torch

from benchmarks.harness import Aot, Bench, compiled, meta, ours, plain
from benchmarks.ops.bench_adamw import LARGE, SMALL, shapes
from fastlm import ops

HYPER = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}


def make(dtype, device, layers, D, V, clip=False):
    params, grads, exp_avgs = (
        [torch.randn(s, device=device).to(dtype) for s in shapes(layers, D, V)] for _ in range(3)
    )
    # A coefficient just below 1: in-place clipping must not wear the gradients away.
    return params, grads, exp_avgs, torch.tensor(0.999999, device=device) if clip else None


def by_us(params, grads, exp_avgs, clip, backend):
    ops.lion_(params, grads, exp_avgs, grad_scale=clip, backend=backend, **HYPER)
    return params, exp_avgs


def by_torch(params, grads, exp_avgs, clip):
    with torch.no_grad():
        if clip is not None:
            torch._foreach_mul_(grads, clip)
        updates = torch._foreach_lerp(exp_avgs, grads, 1 - HYPER["beta1"])
        torch._foreach_sign_(updates)
        torch._foreach_mul_(params, 1 - HYPER["lr"] * HYPER["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-HYPER["lr"])
        torch._foreach_lerp_(exp_avgs, grads, 1 - HYPER["beta2"])
    return params, exp_avgs


def traffic(mode, params, *rest):
    return 5 * sum(p.nbytes for p in params)  # two read and written, gradients read


BENCH = Bench(
    op="lion_",
    make=make,
    reference=lambda *args: by_us(*args, backend="reference"),
    providers=[*ours("lion_", by_us), plain(by_torch), compiled(by_torch)],
    sizes={
        "tiny": [{"layers": 1, "D": 16, "V": 40}, {"layers": 1, "D": 16, "V": 40, "clip": True}],
        "cpu": [{"layers": 6, "D": 384, "V": 8192}, {"layers": 6, "D": 384, "V": 8192, "clip": True}],
        "quick": [SMALL, LARGE | {"clip": True}],
    },
    traffic=traffic,
    modes=("forward",),
    gate_size=lambda size: size | {"layers": 1},
)


def _aot(dtype, state, *modes):
    """modes: masters, remainders, stochastic, codes."""

    def of(d, wanted=True):
        return [meta(768, 768, dtype=d), meta(768, dtype=d)] if wanted else []

    codes, number = "codes" in modes, meta(dtype=torch.float32)
    scales = [meta(2304, dtype=torch.float32), meta(3, dtype=torch.float32)] if codes else []
    return Aot(
        "lion:lion_step", of(dtype), of(dtype), of(torch.int8 if codes else state),
        of(torch.float32, "masters" in modes), of(torch.int16, "remainders" in modes), [], scales,
        None, None, number, None, meta(2, dtype=torch.int64) if "stochastic" in modes else None, [0, 1],
        1e-3, 3.0, 0.0, 0.0, 0.9, 0.99, 0.1,
    )  # fmt: skip


FP32, BF16 = torch.float32, torch.bfloat16
AOT = [
    _aot(FP32, FP32),
    _aot(BF16, FP32, "masters"),
    _aot(BF16, FP32, "remainders"),
    _aot(BF16, BF16, "stochastic"),
    _aot(BF16, None, "codes", "stochastic"),
]
