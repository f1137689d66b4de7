"""attention, full and causal, against F.scaled_dot_product_attention with each of its kernels."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Aot, Bench, Provider, meta, ours, plain
from fastlm import ops


def make(dtype, device, B, S, H, H_kv, width, causal=True):
    q, k, v = (torch.randn(B, S, heads, width, device=device) for heads in (H, H_kv, H_kv))
    return *(x.to(dtype).requires_grad_() for x in (q, k, v)), causal


def by_sdpa(q, k, v, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def with_kernel(kernel):
    def call(*args):
        with sdpa_kernel(kernel):
            return by_sdpa(*args)

    def build():
        if not torch.cuda.is_available():
            raise ImportError("torch has this kernel for CUDA only")
        return call

    return build


def op(q, k, v, causal, backend):
    return ops.attention(q, k, v, causal=causal, backend=backend)


def traffic(mode, q, k, v, causal):
    forward = 2 * q.nbytes + k.nbytes + v.nbytes
    return forward if mode == "forward" else 2 * forward  # backward reads q, k, v, o, do and writes dq, dk, dv


def flops(mode, q, k, v, causal):
    # Two products forward, five backward; a causal mask leaves half of the scores (the convention of the papers).
    products = {"forward": 2, "backward": 5}[mode]
    scores = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    return 2 * products * scores * q.shape[3] // (2 if causal else 1)


SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,  # the CPU's only fused kernel too: there it is what `sdpa` takes anyway
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LARGE = {"B": 1, "H": 64, "H_kv": 8, "width": 128}
BENCH = Bench(
    op="attention",
    make=make,
    reference=lambda *args: op(*args, backend="reference"),
    providers=[
        *ours("attention", op),
        plain(by_sdpa, "sdpa"),
        *(Provider(f"sdpa:{name}", with_kernel(kernel)) for name, kernel in SDPA.items()),
    ],
    plain="sdpa",
    sizes={
        "tiny": [{"B": 1, "S": 20, "H": 2, "H_kv": 1, "width": 16}],
        "cpu": [
            {"B": 4, "S": 256, "H": 6, "H_kv": 6, "width": 64},
            {"B": 4, "S": 256, "H": 6, "H_kv": 2, "width": 64},
            {"B": 4, "S": 256, "H": 6, "H_kv": 6, "width": 64, "causal": False},
        ],
        "quick": [
            {**LARGE, "S": 8192},
            {**LARGE, "S": 8192, "causal": False},
            {"B": 4, "S": 4096, "H": 32, "H_kv": 32, "width": 64},
            {"B": 8, "S": 1024, "H": 12, "H_kv": 12, "width": 64},
        ],
    },
    traffic=traffic,
    flops=flops,
    # The reference stores all scores in fp64: at 8192 tokens and 64 heads that is 34 GB a tensor.
    gate_size=lambda size: {**size, "S": min(size["S"], 512)},
)


def _aot(width, corner, dtype=torch.bfloat16, H=32, H_kv=8, S=4096):
    """Forward and backward at one head width; corner 0: every key, 1: causal, last query at the last key."""
    q, k = meta(2, S, H, width, dtype=dtype), meta(2, S, H_kv, width, dtype=dtype)
    lse, scale = meta(2, H, S, dtype=torch.float32), width**-0.5
    return [
        Aot("attention:attention_fwd", q, k, k, None, corner, scale),
        Aot("attention_bwd:attention_bwd", q, None, q, k, k, q, lse, None, corner, scale),
    ]


AOT = [
    *_aot(64, 1),
    *_aot(128, 0),
    *_aot(128, 1),
    *_aot(256, 1),
    *_aot(80, 1),
    *_aot(64, 1, torch.float32),
]
