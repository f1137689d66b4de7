"""newton_schulz of a batch of matrices in bf16, as Muon orthogonalises them, against torch.optim.Muon's loop over matrices."""

import torch
from torch.optim import _muon

from benchmarks.harness import Aot, Bench, compiled, meta, ours, plain
from fastlm import ops
from fastlm.ops.newton_schulz import QUINTIC

STEPS = 5


def make(dtype, device, count, M, N):
    return (torch.randn(count, M, N, device=device).to(dtype),)


def by_us(matrices, backend):
    return ops.newton_schulz(matrices, dtype=torch.bfloat16 if backend != "reference" else None, backend=backend)


def by_loop(matrices):
    found = [_muon._zeropower_via_newtonschulz(m, QUINTIC, STEPS, 1e-7) for m in matrices.clone()]
    return torch.stack(found).to(matrices.dtype)


def by_batch(matrices):
    """As a user writes it for a batch."""
    a, b, c = QUINTIC
    x = matrices.bfloat16()
    x = x.mT if x.shape[1] > x.shape[2] else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if matrices.shape[1] > matrices.shape[2] else x
    return x.to(matrices.dtype)


def flops(mode, matrices):
    """Of the plain iteration: the symmetric products count in full."""
    count, m, n = matrices.shape[0], *sorted(matrices.shape[1:])
    return STEPS * count * (4 * m * m * n + 2 * m**3)


BENCH = Bench(
    op="newton_schulz",
    make=make,
    reference=lambda matrices: by_us(matrices, "reference"),
    providers=[
        *ours("newton_schulz", by_us),
        plain(by_loop, "torch.optim.Muon's loop"),
        plain(by_batch, "batched by hand"),
        compiled(by_batch, "batched, torch.compile"),
    ],
    sizes={
        "tiny": [{"count": 2, "M": 16, "N": 40}, {"count": 1, "M": 33, "N": 20}],
        "cpu": [
            {"count": 2, "M": 384, "N": 1536},
            {"count": 1, "M": 1536, "N": 384},
            {"count": 4, "M": 384, "N": 384},
            {"count": 64, "M": 64, "N": 64},
            {"count": 64, "M": 128, "N": 32},
        ],
        "quick": [
            {"count": 12, "M": 768, "N": 3072},
            {"count": 48, "M": 768, "N": 768},
            {"count": 4, "M": 4096, "N": 4096},
            {"count": 1, "M": 14336, "N": 4096},
            {"count": 512, "M": 256, "N": 128},
        ],
    },
    flops=flops,
    plain="torch.optim.Muon's loop",
    modes=("forward",),
    gate_size=lambda size: size | {"count": min(size["count"], 2)},
)


def _aot(*shape, dtype=torch.bfloat16, given=torch.bfloat16, steps=1):
    return Aot("newton_schulz:newton_schulz_fwd", meta(*shape, dtype=given), list(QUINTIC) * steps, 1e-7, dtype)


AOT = [
    _aot(12, 1024, 4096),
    _aot(12, 4096, 1024, given=torch.float32, steps=2),  # its last step writes fp32, transposed
    _aot(4, 1000, 1400),
    _aot(8, 48, 64),
    _aot(2, 512, 512, dtype=torch.float32, given=torch.float32),
]
