"""softmax of scaled scores, without and with masks that broadcast, against torch.softmax."""

import torch

from benchmarks.harness import Aot, Bench, Provider, compiled, meta, ours, plain
from fastlm import ops

SCALE = 0.125


def make(dtype, device, M, N, mask=None, heads=4):
    """x [B, heads, M, N] (B = 1) and a mask: "bool" hides keys of a sequence, "added" is one fp for each pair."""
    x = torch.randn(1, heads, M, N, device=device).to(dtype).requires_grad_()
    if mask == "bool":
        keep = torch.rand(1, 1, 1, N, device=device) > 0.2
        keep[..., 0] = True
        return x, keep
    return x, None if mask is None else torch.randn(M, N, device=device).to(dtype)


def by_hand(x, mask):
    s = x * SCALE
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else s + mask
    return torch.softmax(s, -1)


def liger():
    from liger_kernel.transformers.functional import liger_softmax

    def fn(x, mask):
        if mask is not None:
            raise NotImplementedError("it has no mask")
        return liger_softmax(x * SCALE)

    return fn


def traffic(mode, x, mask):
    # Forward reads x and writes y; backward reads dy and y, writes dx.
    if mode == "backward":
        return 3 * x.nbytes
    return 2 * x.nbytes + (0 if mask is None else mask.nbytes)


BENCH = Bench(
    op="softmax",
    make=make,
    reference=lambda x, mask: ops.softmax(x, scale=SCALE, mask=mask, backend="reference"),
    providers=[
        *ours("softmax", lambda x, mask, backend: ops.softmax(x, scale=SCALE, mask=mask, backend=backend)),
        plain(by_hand),
        compiled(by_hand),
        Provider("liger", liger),
    ],
    sizes={
        "tiny": [{"M": 4, "N": 16}, {"M": 4, "N": 16, "mask": "bool"}],
        "cpu": [{"M": 256, "N": 256}, {"M": 256, "N": 256, "mask": "bool"}, {"M": 256, "N": 256, "mask": "added"}],
        "quick": [
            {"M": 4096, "N": 4096},
            {"M": 4096, "N": 4096, "mask": "bool"},
            {"M": 4096, "N": 32768, "heads": 1},
        ],
        "full": [
            *({"M": 1 << 18, "N": n} for n in (64, 128, 256)),
            *({"M": 4096, "N": n, "mask": mask} for n in (1024, 4096) for mask in (None, "bool", "added")),
            *({"M": 4096, "N": n, "heads": 1} for n in (8192, 16384, 32768, 65536)),
            {"M": 1024, "N": 262144, "heads": 1},
        ],
    },
    traffic=traffic,
)


def _aot(n, mask=None):
    x = meta(8, 1024, n)
    forward = Aot("softmax:softmax_fwd", x, mask, SCALE)
    return [forward] if mask is not None else [forward, Aot("softmax:softmax_bwd", x, x, SCALE)]


AOT = [case for n in (128, 768, 4096, 8192, 16384, 32768, 262144) for case in _aot(n)]
AOT += [*_aot(4096, meta(8, 1, 4096, dtype=torch.bool)), *_aot(4096, meta(1024, 4096)), *_aot(32768, meta(1024, 32768))]
