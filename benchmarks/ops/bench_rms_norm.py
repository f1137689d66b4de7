"""rms_norm, alone and with the fused residual add, against F.rms_norm."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Aot, Bench, compiled, meta, ours, plain
from fastlm import ops


def make(dtype, device, M, N, residual=False):
    x = torch.randn(M, N, device=device).to(dtype).requires_grad_()
    weight = (1 + 0.3 * torch.randn(N, device=device)).to(dtype).requires_grad_()
    return x, weight, torch.randn(M, N, device=device).to(dtype).requires_grad_() if residual else None


def by_hand(x, weight, residual):
    s = x if residual is None else x + residual
    y = F.rms_norm(s, s.shape[-1:], weight, 1e-6)
    return y if residual is None else (y, s)


def traffic(mode, x, weight, residual):
    # Forward reads x (and the residual) and writes y (and the sum); backward reads dy, x (and the sum's gradient), writes dx.
    tensors = {"forward": 2 if residual is None else 4, "backward": 3 if residual is None else 4}[mode]
    return tensors * x.nbytes + weight.nbytes


BENCH = Bench(
    op="rms_norm",
    make=make,
    reference=lambda x, weight, residual: ops.rms_norm(x, weight, 1e-6, residual=residual, backend="reference"),
    providers=[
        *ours("rms_norm", lambda x, w, r, backend: ops.rms_norm(x, w, 1e-6, residual=r, backend=backend)),
        plain(by_hand),
        compiled(by_hand),
    ],
    sizes={
        "tiny": [{"M": 8, "N": 48}, {"M": 8, "N": 48, "residual": True}],
        "cpu": [{"M": 1024, "N": 768}, {"M": 1024, "N": 768, "residual": True}],
        "quick": [
            {"M": 8192, "N": 768, "residual": True},
            {"M": 8192, "N": 4096},
            {"M": 8192, "N": 4096, "residual": True},
            {"M": 4096, "N": 16384},
        ],
    },
    traffic=traffic,
)

RSTD = meta(8192, dtype=torch.float32)
AOT = [
    Aot("rms_norm:rms_norm_fwd", meta(8192, 4096), meta(4096), None, 1e-6),
    Aot("rms_norm:rms_norm_fwd", meta(8192, 768), meta(768), meta(8192, 768), 1e-6),
    Aot(
        "rms_norm:rms_norm_bwd",
        meta(8192, 4096),
        None,
        meta(8192, 4096),
        meta(4096),
        RSTD,
        True,
        1e-6,
    ),
    Aot(
        "rms_norm:rms_norm_bwd",
        meta(8192, 768),
        meta(8192, 768),
        meta(8192, 768),
        meta(768),
        RSTD,
        True,
        1e-6,
    ),
]
