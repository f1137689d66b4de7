"""layer_norm, alone and with the fused residual add, against F.layer_norm."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Aot, Bench, compiled, meta, ours, plain
from fastlm import ops


def make(dtype, device, M, N, residual=False):
    x = torch.randn(M, N, device=device).to(dtype).requires_grad_()
    weight = (1 + 0.3 * torch.randn(N, device=device)).to(dtype).requires_grad_()
    bias = torch.randn(N, device=device).to(dtype).requires_grad_()
    return x, weight, bias, torch.randn(M, N, device=device).to(dtype).requires_grad_() if residual else None


def by_hand(x, weight, bias, residual):
    s = x if residual is None else x + residual
    y = F.layer_norm(s, s.shape[-1:], weight, bias, 1e-5)
    return y if residual is None else (y, s)


def traffic(mode, x, weight, bias, residual):
    # Forward reads x (and the residual) and writes y (and the sum); backward reads dy, x (and the sum's gradient), writes dx.
    tensors = {"forward": 2 if residual is None else 4, "backward": 3 if residual is None else 4}[mode]
    return tensors * x.nbytes + weight.nbytes + bias.nbytes


BENCH = Bench(
    op="layer_norm",
    make=make,
    reference=lambda x, w, b, residual: ops.layer_norm(x, w, b, 1e-5, residual=residual, backend="reference"),
    providers=[
        *ours("layer_norm", lambda x, w, b, r, backend: ops.layer_norm(x, w, b, 1e-5, residual=r, backend=backend)),
        plain(by_hand),
        compiled(by_hand),
    ],
    sizes={
        "tiny": [{"M": 8, "N": 48}, {"M": 8, "N": 48, "residual": True}],
        "cpu": [{"M": 1024, "N": 384}, {"M": 1024, "N": 768, "residual": True}],
        "quick": [
            {"M": 8192, "N": 768, "residual": True},
            {"M": 8192, "N": 4096},
            {"M": 8192, "N": 4096, "residual": True},
            {"M": 4096, "N": 16384},
        ],
    },
    traffic=traffic,
)


def _aot(n, residual=False, dropout=False, heads=None):
    x = meta(8192, n) if heads is None else meta(256, 3 * heads, n)[:, :heads]
    vector, stats = meta(n), meta(*x.shape[:-1], dtype=torch.float32)
    other, seed, p = x if residual else None, meta(2, dtype=torch.int64) if dropout else None, 0.1 if dropout else 0.0
    bias, mean = vector, stats
    return [
        Aot("layer_norm:layer_norm_fwd", x, vector, bias, other, seed, 1e-5, 0.0, False, p),
        Aot(
            "layer_norm:layer_norm_bwd", x, other, x, vector, bias, mean, stats, seed, residual, True, True, 1e-5, 0.0, p
        ),
    ]  # fmt: skip


AOT = [
    case
    for n in (128, 768, 4096, 8192, 16384, 32768, 262144)
    for residual in (False, True)
    for case in _aot(n, residual)
]
AOT += [*_aot(128, heads=32), *_aot(4096, True, True)]
