"""global_norm of a GPT's gradients against torch's get_total_norm, which clip_grad_norm_ calls."""

import torch

from benchmarks.harness import Aot, Bench, meta, ours, plain
from benchmarks.ops.bench_adamw import LARGE, SMALL, shapes
from fastlm import ops


def make(dtype, device, layers, D, V):
    return ([0.1 * torch.randn(s, device=device).to(dtype) for s in shapes(layers, D, V)],)


def by_torch(grads):
    # For 16-bit gradients a user who wants an fp32 norm has to ask each tensor for it.
    if grads[0].dtype in (torch.float32, torch.float64):
        return torch.nn.utils.get_total_norm(grads)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]))


def in_16_bits(grads):
    return torch.nn.utils.get_total_norm(grads).float()


BENCH = Bench(
    op="global_norm",
    make=make,
    reference=lambda grads: ops.global_norm(grads, backend="reference"),
    providers=[
        *ours("global_norm", lambda grads, backend: ops.global_norm(grads, backend=backend)),
        plain(by_torch),
        plain(in_16_bits, "torch, sums rounded"),
    ],
    sizes={
        "tiny": [{"layers": 1, "D": 16, "V": 40}],
        "cpu": [{"layers": 6, "D": 384, "V": 8192}],
        "quick": [SMALL, LARGE],
    },
    traffic=lambda mode, grads: sum(g.nbytes for g in grads),
    modes=("forward",),
)


def _aot(*dtypes):
    return Aot("global_norm:global_norm", [meta(*s, dtype=d) for d in dtypes for s in ((768, 768), (768,))])


AOT = [_aot(torch.float32), _aot(torch.bfloat16), _aot(torch.bfloat16, torch.float32), _aot(torch.float16)]
