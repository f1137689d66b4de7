"""quantized_linear against the product with the weight dequantised at every call, and with one that was never quantised.

The yardstick is what a user of plain torch writes for codes and scales. `torch, weight in x's dtype` reads the dequantised weight
instead: it is what the codes must beat to be worth more than their memory. On a GPU, 80 % of the machine's bandwidth at N = 1
is the goal.
"""

import torch
import torch.nn.functional as F

from benchmarks.harness import Aot, Bench, Provider, meta, ours, plain
from fastlm import ops
from fastlm.ops.quantize import dequantize_weight, quantize_weight


def make(dtype, device, N, K, out, bits=8, group_size=None):
    """N rows of x."""
    q = quantize_weight(torch.randn(out, K, device=device) / K**0.5, bits, group_size)
    weight = dequantize_weight(q.codes, q.scale, bits=bits, group_size=group_size, columns=K, dtype=dtype)
    x = torch.randn(N, K, device=device).to(dtype).requires_grad_()
    return x, q.codes, q.scale, weight, bits, group_size


def op(x, codes, scale, weight, bits, group_size, backend):
    return ops.quantized_linear(x, codes, scale, bits=bits, group_size=group_size, backend=backend)


def by_hand(x, codes, scale, weight, bits, group_size):
    if bits == 4:
        low, high = codes & 15, codes >> 4
        pairs = torch.stack((low.view(len(codes), -1, group_size // 2), high.view(len(codes), -1, group_size // 2)), 2)
        codes = pairs.view(len(codes), -1).to(torch.int8) - 8
    if group_size is None:
        return F.linear(x, codes.to(x.dtype) * scale.to(x.dtype)[:, None])
    grouped = codes.view(*scale.shape, group_size).to(x.dtype) * scale.to(x.dtype)[..., None]
    return F.linear(x, grouped.view(len(scale), -1)[:, : x.shape[1]])


def unquantized(x, codes, scale, weight, bits, group_size):
    return F.linear(x, weight)


def compiled_by_hand():
    return torch.compile(by_hand, dynamic=False)


def traffic(mode, x, codes, scale, weight, bits, group_size):
    both = x.nbytes + x.shape[0] * codes.shape[0] * x.element_size()
    return both + codes.nbytes + scale.nbytes


def _bitsandbytes():
    import bitsandbytes  # noqa: F401

    raise ImportError("bitsandbytes quantises by its own rule; no product of ours' codes")


BENCH = Bench(
    op="quantized_linear",
    make=make,
    reference=lambda x, codes, scale, weight, bits, group_size: op(
        x, codes, scale, weight, bits, group_size, "reference"
    ),
    providers=[
        *ours("quantized_linear", op),
        plain(by_hand),
        Provider("torch.compile", compiled_by_hand),
        plain(unquantized, "torch, weight in x's dtype"),
        Provider("bitsandbytes", _bitsandbytes),
    ],
    sizes={
        "tiny": [
            {"N": 3, "K": 40, "out": 24},
            {"N": 1, "K": 40, "out": 24, "bits": 4, "group_size": 32},
        ],
        "cpu": [
            {"N": 1, "K": 384, "out": 1152},
            {"N": 1, "K": 2048, "out": 2048},
            {"N": 16, "K": 384, "out": 8192},
            {"N": 128, "K": 1024, "out": 1024},
            {"N": 1, "K": 1024, "out": 1024, "bits": 4, "group_size": 128},
        ],
        "quick": [
            {"N": N, "K": 4096, "out": out, "bits": bits, "group_size": group_size}
            for bits, group_size in ((8, None), (4, 128))
            for out in (4096, 14336)
            for N in (1, 8, 2048)
        ],
    },
    traffic=traffic,
    modes=("forward", "backward"),
)


def _aot(N, K, out, bits, group_size, zero=False, bias=False, **options):
    x, dy = meta(N, K, **options), meta(N, out, **options)
    width = K if bits == 8 else -(-K // group_size) * group_size // 2
    shape = (out, -(-K // group_size)) if group_size else (out,)
    kind = torch.int8 if bits == 8 else torch.uint8
    codes, scale = meta(out, width, dtype=kind), meta(*shape, dtype=torch.float32)
    zero = meta(*shape, dtype=kind) if zero else None
    bias = meta(out, **options) if bias else None
    forward = Aot("quantized_linear:quantized_linear_fwd", x, codes, scale, zero, bias, bits, group_size)
    backward = Aot("quantized_linear:quantized_linear_bwd", dy, codes, scale, zero, bits, group_size, K)
    return [forward] if N in (1, 8) else [forward, backward]


AOT = [
    case
    for bits, group_size in ((8, 0), (4, 128))
    for K, out in ((4096, 4096), (4096, 14336))
    for N in (1, 8)
    for case in _aot(N, K, out, bits, group_size)
] + [
    *_aot(1, 4096, 4096, 8, 128, zero=True, bias=True),
    *_aot(1, 4096, 4096, 4, 32, zero=True),
    *_aot(8, 4096, 4096, 4, 32, zero=True),
    *_aot(2048, 4096, 4096, 8, 0),
    *_aot(2048, 4096, 4096, 4, 128),
    *_aot(2048, 4096, 4096, 8, 64, zero=True),
    *_aot(2048, 4096, 4096, 4, 64, zero=True),
    *_aot(12, 4096, 4096, 4, 64),
    *_aot(1, 4096, 4096, 8, 0, dtype=torch.float32),
    *_aot(8, 4096, 4096, 8, 0, dtype=torch.float32),
    *_aot(256, 4096, 4096, 8, 0, dtype=torch.float32),
    *_aot(256, 4096, 4096, 8, 128, dtype=torch.float32),
    *_aot(256, 4096, 4096, 4, 128, dtype=torch.float32),
    *_aot(8, 4096, 4096, 4, 128, dtype=torch.float32),
    *_aot(8, 4096, 4096, 8, 32),
    # Odd widths: masked loads.
    *_aot(1, 100, 100, 8, 0),
    *_aot(40, 100, 100, 8, 0),
    *_aot(40, 100, 100, 4, 32),
]
