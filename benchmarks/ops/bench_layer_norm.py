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

_STATS = meta(8192, dtype=torch.float32)


def _aot(n, residual):
    x, vector = meta(8192, n), meta(n)
    other = x if residual else None
    return [
        Aot("layer_norm:layer_norm_fwd", x, vector, vector, other, 1e-5),
        Aot("layer_norm:layer_norm_bwd", x, other, x, vector, vector, _STATS, _STATS, True, True, 1e-5),
    ]


# The last one is wider than a row of registers can be without spilling: kept to see by how much.
AOT = [*_aot(768, True), *_aot(1600, False), *_aot(4096, False), *_aot(16384, False)]
