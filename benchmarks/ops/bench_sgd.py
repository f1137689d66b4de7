"""sgd_ with momentum over the parameters of a GPT, without and with a clip coefficient, against torch's fused and foreach SGD."""

import torch
from torch.optim.sgd import sgd

from benchmarks.harness import Aot, Bench, Provider, meta, ours, plain
from benchmarks.ops.bench_adamw import LARGE, SMALL, shapes
from fastlm import ops

HYPER = {"lr": 1e-3, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False}


def make(dtype, device, layers, D, V, clip=False):
    params, grads, buffers = ([torch.randn(s, device=device).to(dtype) for s in shapes(layers, D, V)] for _ in range(3))
    # A coefficient just below 1: in-place clipping must not wear the gradients away.
    return params, grads, buffers, torch.tensor(0.999999, device=device) if clip else None


def by_us(params, grads, buffers, clip, backend):
    ops.sgd_(params, grads, buffers, step=3, grad_scale=clip, backend=backend, **HYPER)
    return params, buffers


def by_torch(form):
    def step(params, grads, buffers, clip):
        with torch.no_grad():
            if clip is not None:
                torch._foreach_mul_(grads, clip)
            sgd(params, grads, buffers, maximize=False, **form, **HYPER)
        return params, buffers

    return step


def traffic(mode, params, *rest):
    return 5 * sum(p.nbytes for p in params)  # two read and written, gradients read


BENCH = Bench(
    op="sgd_",
    make=make,
    reference=lambda *args: by_us(*args, backend="reference"),
    providers=[
        *ours("sgd_", by_us),
        # Not the fused form: on the CPU its 16-bit results are wrong by several roundings (torch 2.13).
        plain(by_torch({"foreach": True})),
        Provider("torch fused", lambda: by_torch({"fused": True})),
    ],
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
    """modes: masters, remainders, stochastic, codes, nesterov."""

    def of(d, wanted=True):
        return [meta(768, 768, dtype=d), meta(768, dtype=d)] if wanted else []

    codes, number = "codes" in modes, meta(dtype=torch.float32)
    scales = [meta(2304, dtype=torch.float32), meta(3, dtype=torch.float32)] if codes else []
    return Aot(
        "sgd:sgd_step", of(dtype), of(dtype), of(torch.int8 if codes else state, state or codes),
        of(torch.float32, "masters" in modes), of(torch.int16, "remainders" in modes), [], scales,
        None, None, number, None, meta(2, dtype=torch.int64) if "stochastic" in modes else None, [0, 1],
        1e-3, 3.0, 0.0, 0.0, 0.9, 0.0, 0.1, "nesterov" in modes,
    )  # fmt: skip


FP32, BF16 = torch.float32, torch.bfloat16
AOT = [
    _aot(FP32, FP32),
    _aot(FP32, FP32, "nesterov"),
    _aot(FP32, None),
    _aot(BF16, FP32, "masters"),
    _aot(BF16, FP32, "remainders"),
    _aot(BF16, BF16, "stochastic"),
    _aot(BF16, None, "codes", "stochastic"),
]
