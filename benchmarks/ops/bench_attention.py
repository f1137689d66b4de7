"""attention, full and causal, against F.scaled_dot_product_attention with each of its kernels."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Aot, Bench, Provider, meta, ours, plain
from fastlm import ops
from fastlm.ops.attention_reference import Extras


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


def _aot(width, causal, dtype=torch.bfloat16, H=32, H_kv=8, S=4096, left=-1, softcap=0.0, packed=False, **small):
    """Forward and backward at one head width. small: what to add, see Call and Extras."""
    B, rows = (1, 2 * S) if packed else (2, S)
    q, k = meta(B, rows, H, width, dtype=dtype), meta(B, rows, H_kv, width, dtype=dtype)
    lse, scale = meta(B, H, rows, dtype=torch.float32), width**-0.5
    per_head = [small.pop(name, None) for name in ("bias", "distances", "sinks")]
    if packed:
        cu = meta(9, dtype=torch.int32)
        small |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    dropout = 0.1 if "seed" in small else 0.0
    call = (
        q,
        k,
        k,
        None,
        *per_head,
        Extras(**small).listed(),
        bool(causal),
        left,
        0 if causal else -1,
        scale,
        softcap,
        dropout,
    )
    wanted = [x is not None for x in per_head]
    return [Aot("attention:attention_fwd", *call), Aot("attention_bwd:attention_bwd", q, None, q, lse, wanted, *call)]


def _blocks(S, block=128):
    """The tensors of a block mask of S x S, one list for all heads, half of its blocks live."""
    lines = S // block
    counts = [meta(1, 1, lines, dtype=torch.int32)] * 2 + [meta(1, 1, lines, lines // 2, dtype=torch.int32)] * 2
    names = [f"{side}_{part}" for side in ("row", "column") for part in ("count", "partial", "index", "pattern")]
    return dict(zip(names, counts * 2), patterns=meta(8, block, block, dtype=torch.uint8))


HEADS = {"dtype": torch.float32}
AOT = [
    # The hot class: causal, window, packed, GQA, softcap, sinks.
    *_aot(64, True),
    *_aot(128, False),
    *_aot(128, True),
    *_aot(256, True),
    *_aot(80, True),
    *_aot(64, True, torch.float32),
    *_aot(64, True, left=1024, softcap=30.0, packed=True, sinks=meta(32)),
    *_aot(128, True, left=1024, packed=True, sinks=meta(32)),
    *_aot(128, True, softcap=50.0),
    # The second class.
    *_aot(64, False, bias=meta(1, 32, 4096, 4096)),
    *_aot(64, False, distances=meta(32, 257)),
    *_aot(128, True, alibi_slopes=meta(32, **HEADS), seed=meta(2, dtype=torch.int64)),
    *_aot(128, True, **_blocks(4096)),
    *_aot(
        64,
        True,
        prefix_lengths=meta(2, dtype=torch.int32),
        documents_q=meta(2, 4096, dtype=torch.int32),
        documents_k=meta(2, 4096, dtype=torch.int32),
    ),
]
