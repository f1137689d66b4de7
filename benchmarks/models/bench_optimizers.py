"""`python -m benchmarks.models.bench_optimizers`: optimizer steps of fastlm.optim beside torch's fused ones, on a GPT's weights.

What a user calls is timed: `step()` of the object, with clipping where the row says so (torch: clip_grad_norm_ before). Steps are
taken in turns within one process; the ratio is the median time of torch's row of the same group over ours. The bytes of an
element count the weight, the gradient and the state.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks.clock import quartiles, time_calls
from benchmarks.machine import machine
from benchmarks.ops.bench_adamw import shapes
from fastlm import optim

SIZES = {"cpu": {"layers": 6, "D": 384, "V": 8192}, "cuda": {"layers": 16, "D": 2048, "V": 128256}}
ADAMW, SGD = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}, {"lr": 1e-2, "momentum": 0.9}
CLIP = 1e-3  # below the norm of these gradients, so that there is something to scale
FP32, BF16 = torch.float32, torch.bfloat16

# group -> (row, dtype, optimizer, options, whether to clip); the first row of a group is torch's.
ROWS = {
    "AdamW": [
        ("torch fused", FP32, torch.optim.AdamW, ADAMW | {"fused": True}, False),
        ("no look for NaN", FP32, optim.AdamW, ADAMW | {"skip_nonfinite": False}, False),
        ("default", FP32, optim.AdamW, ADAMW, False),
        ("8-bit states", FP32, optim.AdamW, ADAMW | {"state_bits": 8}, False),
        ("average", FP32, optim.AdamW, ADAMW | {"average_decay": 0.999}, False),
    ],
    "AdamW, clipped": [
        ("torch fused", FP32, torch.optim.AdamW, ADAMW | {"fused": True}, True),
        ("default", FP32, optim.AdamW, ADAMW | {"max_norm": CLIP}, False),
    ],
    "AdamW, bf16 weights": [
        ("torch fused", BF16, torch.optim.AdamW, ADAMW | {"fused": True}, False),
        ("nearest", BF16, optim.AdamW, ADAMW, False),
        ("stochastic", BF16, optim.AdamW, ADAMW | {"precision": "stochastic"}, False),
        ("remainder", BF16, optim.AdamW, ADAMW | {"precision": "remainder"}, False),
        ("master", BF16, optim.AdamW, ADAMW | {"precision": "master"}, False),
    ],
    "SGD": [
        ("torch fused", FP32, torch.optim.SGD, SGD | {"fused": True}, False),
        ("no look for NaN", FP32, optim.SGD, SGD | {"skip_nonfinite": False}, False),
        ("default", FP32, optim.SGD, SGD, False),
    ],
    "Lion": [
        ("torch fused AdamW", FP32, torch.optim.AdamW, ADAMW | {"fused": True}, False),
        ("default", FP32, optim.Lion, {"lr": 1e-4, "weight_decay": 0.1}, False),
    ],
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.bench_optimizers", description=__doc__)
    parser.add_argument("--group", action="append", choices=tuple(ROWS), help="several allowed; default all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="per group")
    options = parser.parse_args(argv)
    print("  ".join(f"{k}: {v}" for k, v in machine(options.device).items() if k != "kind"))
    size = SIZES[options.device]
    print("  ".join(f"{k}: {v}" for k, v in size.items()))
    for group in options.group or ROWS:
        for row in measure(group, size, options.device, options.seconds):
            print(
                f"{group:20} {row['provider']:18} {row['ms']:8.2f} ms ({row['q1']:.2f} - {row['q3']:.2f})  "
                f"{row['ratio']:5.2f}x  {row['bytes']:5.1f} bytes an element",
                flush=True,
            )
    return 0


def measure(group: str, size: dict, device: str, seconds: float) -> list[dict]:
    """One row per provider of a group: median and quartiles in ms, torch's median over it, bytes of an element."""
    calls, weights = [], []
    for _, dtype, cls, options, clip in ROWS[group]:
        call, count = _make(dtype, cls, options, clip, size, device)
        calls.append(call)
        weights.append(count)
    found = []
    samples = time_calls(calls, device, seconds)
    for (name, *_), times, count in zip(ROWS[group], samples, weights):
        q1, ms, q3 = quartiles(times)
        found.append({"provider": name, "ms": ms, "q1": q1, "q3": q3, "bytes": count()})
    return [row | {"ratio": found[0]["ms"] / row["ms"]} for row in found]


def _make(dtype, cls, options, clip, size, device) -> tuple[Callable, Callable]:
    """-> the call that makes a step, and one that counts the bytes of an element afterwards."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(0.02 * torch.randn(s, device=device).to(dtype)) for s in shapes(**size)]
    for p in params:
        p.grad = (0.01 * torch.randn(p.shape, device=device)).to(dtype)
    optimizer = cls(params, **options)

    def step():
        if clip:
            clip_grad_norm_(params, CLIP)
        optimizer.step()

    def per_element():
        state = [t for s in optimizer.state.values() for k, t in s.items() if torch.is_tensor(t) and k != "step"]
        return (2 * sum(p.nbytes for p in params) + sum(t.nbytes for t in state)) / sum(p.numel() for p in params)

    return step, per_element


if __name__ == "__main__":
    raise SystemExit(main())
