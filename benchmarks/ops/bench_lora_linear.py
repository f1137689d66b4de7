"""lora_linear against the three products and the sum that PEFT writes; the base matrix is frozen, as it is when fine-tuning."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Aot, Bench, compiled, meta, ours, plain
from fastlm import ops

SCALE = 2.0


def make(dtype, device, N, D, D_out, r):
    x, weight, a, b = (
        (s[-1] ** -0.5 * torch.randn(s, device=device)).to(dtype) for s in ((N, D), (D_out, D), (r, D), (D_out, r))
    )
    return x.requires_grad_(), weight, a.requires_grad_(), b.requires_grad_()


def by_hand(x, weight, a, b):
    return F.linear(x, weight) + F.linear(F.linear(x, a), b) * SCALE


def flops(mode, x, weight, a, b):
    # A frozen matrix has one product in the backward, a trained one two.
    trained = a.numel() + b.numel()
    return 2 * x.shape[0] * (weight.numel() + (trained if mode == "forward" else 2 * trained))


BENCH = Bench(
    op="lora_linear",
    make=make,
    reference=lambda *args: ops.lora_linear(*args, scale=SCALE, backend="reference"),
    providers=[
        *ours("lora_linear", lambda *args, backend: ops.lora_linear(*args, scale=SCALE, backend=backend)),
        plain(by_hand),
        compiled(by_hand),
    ],
    sizes={
        "tiny": [{"N": 8, "D": 16, "D_out": 24, "r": 4}],
        "cpu": [
            {"N": 1024, "D": 384, "D_out": 384, "r": 8},
            {"N": 512, "D": 384, "D_out": 1536, "r": 16},
            {"N": 1, "D": 384, "D_out": 384, "r": 8},
        ],
        "quick": [
            {"N": 8192, "D": 4096, "D_out": 4096, "r": 16},
            {"N": 8192, "D": 4096, "D_out": 14336, "r": 64},
            {"N": 64, "D": 4096, "D_out": 4096, "r": 16},
        ],
    },
    flops=flops,
)


def _aot(N, D, D_out, r, bias=False, **options):
    """The forward, and the backward with a frozen matrix."""
    shapes = ((N, D), (D_out, D), (r, D), (D_out, r), (N, D_out), (N, r))
    x, weight, a, b, dy, u = (meta(*s, **options) for s in shapes)
    bias = meta(D_out, **options) if bias else None
    return [
        Aot("lora_product:lora_linear_fwd", x, weight, a, b, bias, SCALE),
        Aot("lora_product:lora_linear_bwd", dy, x, u, weight, a, b, bias, 0b01101, SCALE),
    ]


AOT = [
    *_aot(8192, 4096, 4096, 16),
    *_aot(8192, 4096, 14336, 64, bias=True),
    *_aot(64, 4096, 4096, 16),
    *_aot(8192, 1024, 1024, 16, dtype=torch.float32),
    # Odd widths: masked loads, and addresses of single elements.
    *_aot(8192, 100, 100, 3),
    *_aot(8192, 4096, 100, 16),
    *_aot(8192, 1, 64, 8, bias=True),
]
