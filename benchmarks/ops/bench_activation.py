"""activation and glu against torch's own, contiguous and as halves of one product."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Aot, Bench, compiled, meta, ours, plain
from fastlm import ops


def make(dtype, device, M, N):
    return (torch.randn(M, N, device=device).to(dtype).requires_grad_(),)


def make_glu(dtype, device, M, N, halves=False):
    # With `halves` the argument is the product [M, 2 N] and taking it apart is timed too, forward and backward.
    if halves:
        return (torch.randn(M, 2 * N, device=device).to(dtype).requires_grad_(),)
    return make(dtype, device, M, N) + make(dtype, device, M, N)


def both(product, *up):
    return (product, *up) if up else product.chunk(2, -1)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def swiglu(*args):
    gate, up = both(*args)
    return F.silu(gate) * up


def traffic(mode, *args):
    # Forward reads the inputs and writes y; backward reads them and dy and writes a gradient for each.
    read = sum(a.nbytes for a in args)
    one = args[0].nbytes
    return read + one if mode == "forward" else 2 * read + one


def traffic_glu(mode, *args):
    read = sum(a.nbytes for a in args)
    return read * 3 // 2 if mode == "forward" else read * 5 // 2


BENCH = [
    Bench(
        op="activation",
        make=make,
        reference=lambda x: ops.activation(x, "gelu_tanh", backend="reference"),
        providers=[
            *ours("activation", lambda x, backend: ops.activation(x, "gelu_tanh", backend=backend)),
            plain(gelu_tanh),
            compiled(gelu_tanh),
        ],
        sizes={
            "tiny": [{"M": 8, "N": 48}],
            "cpu": [{"M": 1024, "N": 1536}],
            "quick": [{"M": 8192, "N": 3072}, {"M": 8192, "N": 16384}],
        },
        traffic=traffic,
    ),
    Bench(
        op="glu",
        make=make_glu,
        reference=lambda *args: ops.glu(*both(*args), backend="reference"),
        providers=[
            *ours("glu", lambda *args, backend: ops.glu(*both(*args), backend=backend)),
            plain(swiglu),
            compiled(swiglu),
        ],
        sizes={
            "tiny": [{"M": 8, "N": 48}, {"M": 8, "N": 48, "halves": True}],
            "cpu": [{"M": 1024, "N": 1024}, {"M": 1024, "N": 1024, "halves": True}],
            "quick": [
                {"M": 8192, "N": 11008},
                {"M": 8192, "N": 11008, "halves": True},
                {"M": 8192, "N": 14336},
            ],
        },
        traffic=traffic_glu,
    ),
]

_X, _HALF = meta(8192, 11008), meta(8192, 2 * 11008).chunk(2, -1)
AOT = [
    *(
        case
        for kind in ("gelu", "gelu_tanh", "silu", "relu", "relu2")
        for case in (Aot("activation:activation_fwd", _X, kind), Aot("activation:activation_bwd", _X, _X, kind))
    ),
    Aot("activation:glu_fwd", _X, _X, "silu"),
    Aot("activation:glu_bwd", _X, _X, _X, "silu"),
    Aot("activation:glu_fwd", *_HALF, "silu"),
    Aot("activation:glu_bwd", _X, *_HALF, "gelu"),
    Aot("activation:slopes_and_values", _X, *_HALF, "silu", *_HALF, _X),
]
