"""mlp and gated_mlp against the same products and activations in plain torch, and Liger's gated MLP."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Aot, Bench, Provider, compiled, meta, ours, plain
from fastlm import ops


def make(dtype, device, N, D, F, bias=False):
    shapes = [(N, D), (F, D), (D, F), *([(F,), (D,)] if bias else [])]
    return tuple(_random(shape, dtype, device) for shape in shapes)


def make_gated(dtype, device, N, D, F, packed=False):
    first = [(2 * F, D)] if packed else [(F, D), (F, D)]
    return tuple(_random(shape, dtype, device) for shape in ((N, D), *first, (D, F)))


def _random(shape, dtype, device):
    scale = shape[1] ** -0.5 if len(shape) == 2 else 1.0
    return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()


def by_hand(x, up, down, up_bias=None, down_bias=None):
    return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)


def gated_by_hand(x, *weights):
    if len(weights) == 2:
        gate, up = F.linear(x, weights[0]).chunk(2, -1)
    else:
        gate, up = F.linear(x, weights[0]), F.linear(x, weights[1])
    return F.linear(F.silu(gate) * up, weights[-1])


def gated(x, *weights, recompute=False, backend="auto"):
    first = (weights[0], None) if len(weights) == 2 else weights[:2]
    return ops.gated_mlp(x, *first, weights[-1], recompute=recompute, backend=backend)


def liger():
    from liger_kernel.ops import LigerSiLUMulFunction

    def call(x, *weights):
        if len(weights) == 2:
            gate, up = F.linear(x, weights[0]).chunk(2, -1)
        else:
            gate, up = F.linear(x, weights[0]), F.linear(x, weights[1])
        return F.linear(LigerSiLUMulFunction.apply(gate, up), weights[-1])

    return call


def flops(mode, x, *rest):
    matrices = [t for t in rest if t.ndim == 2]
    return (2 if mode == "forward" else 4) * x.shape[0] * sum(w.numel() for w in matrices)


BENCH = [
    Bench(
        op="mlp",
        make=make,
        reference=lambda *args: ops.mlp(*args, backend="reference"),
        providers=[
            *ours("mlp", lambda *args, backend: ops.mlp(*args, backend=backend)),
            Provider("fastlm:torch, recompute", lambda: lambda *a: ops.mlp(*a, recompute=True, backend="torch")),
            plain(by_hand),
            compiled(by_hand),
        ],
        sizes={
            "tiny": [{"N": 8, "D": 16, "F": 48, "bias": True}],
            "cpu": [
                {"N": 1024, "D": 384, "F": 1536, "bias": True},
                {"N": 256, "D": 256, "F": 1024},
                {"N": 1, "D": 384, "F": 1536, "bias": True},
            ],
            "quick": [
                {"N": 8192, "D": 768, "F": 3072, "bias": True},
                {"N": 8192, "D": 4096, "F": 16384},
            ],
        },
        flops=flops,
    ),
    Bench(
        op="gated_mlp",
        make=make_gated,
        reference=lambda *args: gated(*args, backend="reference"),
        providers=[
            *ours("gated_mlp", gated),
            Provider("fastlm:torch, recompute", lambda: lambda *a: gated(*a, recompute=True, backend="torch")),
            plain(gated_by_hand),
            compiled(gated_by_hand),
            Provider("liger", liger),
        ],
        sizes={
            "tiny": [{"N": 8, "D": 16, "F": 48}, {"N": 8, "D": 16, "F": 48, "packed": True}],
            "cpu": [
                {"N": 1024, "D": 384, "F": 1024, "packed": True},
                {"N": 256, "D": 256, "F": 704},
                {"N": 1, "D": 384, "F": 1024, "packed": True},
            ],
            "quick": [
                {"N": 8192, "D": 2048, "F": 5632},
                {"N": 8192, "D": 4096, "F": 14336},
                {"N": 8192, "D": 4096, "F": 14336, "packed": True},
                {"N": 512, "D": 4096, "F": 14336},
            ],
        },
        flops=flops,
    ),
]


def _aot(kind, gated, D=4096, F=14336, N=8192, bias=False, packed=False, transposed=False, keep=1, **options):
    """The forward and the backward of one call, all gradients."""
    meta_of = lambda *shape: meta(*shape, **options)  # noqa: E731
    width = F * (2 if packed else 1)
    first = meta_of(D, width).t() if transposed else meta_of(width, D)
    second = meta_of(F, D) if gated and not packed else None
    down = meta_of(F, D).t() if transposed else meta_of(D, F)
    biases = (meta_of(width), second if second is None else meta_of(F), meta_of(D)) if bias else (None, None, None)
    x, pre = meta_of(N, D), meta_of(N, 2, F) if gated else meta_of(N, F)
    call = (first, second, down, *biases)
    need = sum(1 << i for i, t in enumerate((x, *call)) if t is not None)
    return [
        Aot("mlp_epilogue:mlp_fwd", x, *call, keep, kind, gated),
        Aot("mlp_epilogue:mlp_bwd", x, x, pre, *call, need, 1, kind, gated),
    ]


AOT = [
    *_aot("gelu_tanh", False, 768, 3072, bias=True),
    *_aot("gelu_tanh", False, 768, 3072, bias=True, transposed=True),
    *_aot("relu2", False, 4096, 16384),
    *_aot("silu", True),
    *_aot("gelu", True, bias=True),
    *_aot("silu", True, packed=True, keep=0),
    *_aot("silu", True, N=64),
    *_aot("silu", True, 1024, 2816, dtype=torch.float32),
    # Odd widths: masked loads, and addresses of single elements.
    *_aot("gelu_tanh", False, 100, 100, bias=True, transposed=True),
    *_aot("gelu", True, 100, 2730, bias=True),
    *_aot("silu", True, 64, 100, packed=True),
    *_aot("relu2", False, 1, 1, bias=True),
]
