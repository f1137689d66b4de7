"""adamw_ over the parameters of a GPT, without and with a clip coefficient, against torch's fused and foreach AdamW."""

import torch
from torch.optim.adamw import adamw

from benchmarks.harness import Aot, Bench, Provider, meta, ours, plain
from fastlm import ops

HYPER = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def shapes(layers, D, V):
    block = [(3 * D, D), (D, D), (4 * D, D), (D, 4 * D), (D,), (D,)]
    return [(V, D), (D,), *block * layers]


def make(dtype, device, layers, D, V, clip=False):
    def tensors(scale):
        return [scale * torch.randn(s, device=device).to(dtype) for s in shapes(layers, D, V)]

    params, grads, exp_avgs = tensors(1.0), tensors(0.1), tensors(0.1)
    exp_avg_sqs = [t.square() for t in tensors(0.1)]
    # torch counts up before the step. A coefficient just below 1: in-place clipping must not wear the gradients away.
    steps = [torch.tensor(2.0, device=device) for _ in params]
    return params, grads, exp_avgs, exp_avg_sqs, steps, torch.tensor(0.999999, device=device) if clip else None


def by_us(params, grads, exp_avgs, exp_avg_sqs, steps, clip, backend):
    ops.adamw_(params, grads, exp_avgs, exp_avg_sqs, step=3, grad_scale=clip, backend=backend, **HYPER)
    return params, exp_avgs, exp_avg_sqs


def by_torch(form):
    def step(params, grads, exp_avgs, exp_avg_sqs, steps, clip):
        with torch.no_grad():
            if clip is not None:
                torch._foreach_mul_(grads, clip)
            adamw(params, grads, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False, maximize=False, **form, **HYPER)
        return params, exp_avgs, exp_avg_sqs

    return step


def traffic(mode, params, *rest):
    return 7 * sum(p.nbytes for p in params)  # three read and written, gradients read


SMALL, LARGE = {"layers": 12, "D": 768, "V": 50257}, {"layers": 16, "D": 2048, "V": 128256}
BENCH = Bench(
    op="adamw_",
    make=make,
    reference=lambda *args: by_us(*args, backend="reference"),
    providers=[
        *ours("adamw_", by_us),
        plain(by_torch({"fused": True})),
        Provider("torch foreach", lambda: by_torch({"foreach": True})),
    ],
    sizes={
        "tiny": [{"layers": 1, "D": 16, "V": 40}, {"layers": 1, "D": 16, "V": 40, "clip": True}],
        "cpu": [{"layers": 6, "D": 384, "V": 8192}, {"layers": 6, "D": 384, "V": 8192, "clip": True}],
        "quick": [SMALL, SMALL | {"clip": True}, LARGE | {"clip": True}],
    },
    traffic=traffic,
    modes=("forward",),
    gate_size=lambda size: size | {"layers": 1},
)


def _aot(dtype, state, *modes):
    """modes: masters, remainders, stochastic, codes, averages, skip (found_inf)."""

    def of(d, name=None):
        return [meta(768, 768, dtype=d), meta(768, dtype=d)] if name is None or name in modes else []

    codes = "codes" in modes
    scales = [meta(2304, dtype=torch.float32), meta(3, dtype=torch.float32)] if codes else []
    number = meta(dtype=torch.float32)
    return Aot(
        "adamw:adamw_step", of(dtype), of(dtype), of(torch.int8 if codes else state), of(torch.uint8 if codes else state),
        of(torch.float32, "masters"), of(torch.int16, "remainders"), of(torch.float32, "averages"), scales, scales,
        None, None, number, number if "skip" in modes else None,
        meta(2, dtype=torch.int64) if "stochastic" in modes else None, [0, 1],
        1e-3, 3.0, 0.0, 0.999, 0.9, 0.95, 1e-8, 0.1,
    )  # fmt: skip


FP32, BF16 = torch.float32, torch.bfloat16
AOT = [
    _aot(FP32, FP32),
    _aot(BF16, FP32),
    _aot(BF16, BF16),
    _aot(BF16, FP32, "masters"),
    _aot(BF16, FP32, "remainders"),
    _aot(BF16, BF16, "stochastic"),
    _aot(FP32, None, "codes"),
    _aot(FP32, None, "codes", "stochastic"),
    _aot(BF16, None, "codes", "stochastic"),
    _aot(BF16, None, "codes", "stochastic", "remainders", "averages", "skip"),
]
