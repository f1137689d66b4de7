"""rms_norm, alone and with the fused residual add, against F.rms_norm."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Aot, Bench, Provider, compiled, meta, ours, plain
from fastlm import ops


def make(dtype, device, M, N, residual=False, heads=None):
    """x [M, N], or the first `heads` heads of a fused product [M, 3 * heads, N] with a norm over each."""
    shape = (M, N) if heads is None else (M, 3 * heads, N)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    weight = (1 + 0.3 * torch.randn(N, device=device)).to(dtype).requires_grad_()
    return x, weight, torch.randn(M, N, device=device).to(dtype).requires_grad_() if residual else None


def rows(x):
    return x if x.ndim == 2 else x[:, : x.shape[1] // 3]


def by_hand(x, weight, residual):
    s = rows(x) if residual is None else x + residual
    y = F.rms_norm(s, s.shape[-1:], weight, 1e-6)
    return y if residual is None else (y, s)


def op(x, weight, residual, backend):
    return ops.rms_norm(rows(x), weight, 1e-6, residual=residual, backend=backend)


def liger():
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm, liger_rms_norm

    def fn(x, weight, residual):
        if residual is not None:
            return liger_fused_add_rms_norm(x, residual, weight, 1e-6, in_place=False)
        return liger_rms_norm(rows(x), weight, 1e-6, in_place=False)  # its default overwrites dy

    return fn


def quack():
    from quack import rmsnorm

    def fn(x, weight, residual):
        if residual is not None:
            return rmsnorm(x, weight, residual=residual, eps=1e-6, prenorm=True)
        return rmsnorm(rows(x), weight, eps=1e-6)

    return fn


def traffic(mode, x, weight, residual):
    # Forward reads x (and the residual) and writes y (and the sum); backward reads dy, x (and the sum's gradient), writes dx.
    tensors = {"forward": 2 if residual is None else 4, "backward": 3 if residual is None else 4}[mode]
    return tensors * rows(x).nbytes + weight.nbytes


BENCH = Bench(
    op="rms_norm",
    make=make,
    reference=lambda *args: op(*args, backend="reference"),
    providers=[
        *ours("rms_norm", op),
        plain(by_hand),
        compiled(by_hand),
        Provider("liger", liger),
        Provider("quack", quack),
    ],
    sizes={
        "tiny": [{"M": 8, "N": 48}, {"M": 8, "N": 48, "residual": True}],
        "cpu": [{"M": 1024, "N": 768}, {"M": 1024, "N": 768, "residual": True}, {"M": 4, "N": 64}],
        "quick": [
            {"M": 1 << 20, "N": 128},
            {"M": 8192, "N": 768, "residual": True},
            {"M": 8192, "N": 4096},
            {"M": 8192, "N": 4096, "residual": True},
            {"M": 4096, "N": 16384},
        ],
        "full": [
            *({"M": 1 << 20, "N": n} for n in (64, 128, 256)),
            {"M": 1 << 15, "N": 128, "heads": 32},
            *({"M": 8192, "N": n, "residual": r} for n in (768, 1024, 4096, 8192) for r in (False, True)),
            *({"M": 4096, "N": n} for n in (16384, 32768)),
            {"M": 2048, "N": 65536},
            {"M": 512, "N": 262144},
        ],
    },
    traffic=traffic,
)


def _aot(n, residual=False, dropout=False, heads=None, stream=None):
    x = meta(8192, n) if heads is None else meta(256, 3 * heads, n)[:, :heads]
    vector, stats = meta(n), meta(*x.shape[:-1], dtype=torch.float32)
    other = (x if stream is None else meta(8192, n, dtype=stream)) if residual else None
    seed, p = meta(2, dtype=torch.int64) if dropout else None, 0.1 if dropout else 0.0
    bias, mean = None, None
    saved = other if residual else x
    return [
        Aot("rms_norm:rms_norm_fwd", x, vector, bias, other, seed, 1e-6, 0.0, False, p),
        Aot(
            "rms_norm:rms_norm_bwd", x, other, saved, vector, bias, mean, stats, seed, residual, True, False, 1e-6, 0.0, p
        ),
    ]  # fmt: skip


AOT = [
    case
    for n in (128, 768, 4096, 8192, 16384, 32768, 262144)
    for residual in (False, True)
    for case in _aot(n, residual)
]
AOT += [*_aot(128, heads=32), *_aot(4096, True, True)]
AOT += [case for n in (4096, 16384) for case in _aot(n, True, stream=torch.float32)]
