"""attention, dense and causal, windowed, block-sparse and packed, against torch's own kernels and those people install.

Operations are counted as the papers do: two products forward, five backward, half of the scores under a causal mask, and only
pairs of query and key that are seen where there is a window, a block mask or packed sequences. So TFLOP/s compares across all
cells: block-sparse attention costs what its density says if its rate is that of the dense cell of the same shape.
"""

import torch

from benchmarks.harness import Aot, Bench, Provider, meta, ours, plain
from benchmarks.ops import attention_providers as others
from benchmarks.ops.attention_providers import Mask
from fastlm import ops
from fastlm.ops.attention_reference import Extras


def make(dtype, device, B, S, H, H_kv, width, causal=True, window=None, density=None, block=128, packed=None):
    """density: share of live blocks, the same in each row of blocks. packed: number of sequences that share the S tokens."""
    live = lengths = None
    if (density is not None and (causal or window is not None or packed)) or (packed and B != 1):
        raise ValueError(
            "bench attention: blocks are drawn for the whole square, and packed sequences are a batch of 1"
        )
    if packed and window is not None and not causal:
        raise ValueError("bench attention: a padded batch would have rows that see nothing")
    if density is not None:
        if S % block:
            raise ValueError(f"bench attention: S must be whole blocks of {block}, got {S}")
        count = max(1, round(density * S / block))
        # The same blocks on every machine: drawn on the CPU with a seed.
        order = torch.rand(S // block, S // block, generator=torch.Generator().manual_seed(0)).argsort(1)
        live = (order < count).to(device)
    if packed:  # the last is nearly seven times as long as the first
        shares = torch.arange(packed) * 6 + packed
        ends = [0, *(S * shares.cumsum(0) // shares.sum()).tolist()]
        lengths = tuple(b - a for a, b in zip(ends, ends[1:]))
    rows = (S,) if packed else (B, S)
    q, k, v = (torch.randn(*rows, heads, width, device=device) for heads in (H, H_kv, H_kv))
    mask = Mask(S, device, causal, window, live, block, lengths)
    return *(x.to(dtype).requires_grad_() for x in (q, k, v)), mask


def op(q, k, v, mask, backend):
    options = {}
    if mask.lengths is not None:
        longest = max(mask.lengths)
        options = {"cu_seqlens_q": mask.cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest}
    if mask.window is not None:
        options["window"] = mask.band
    return ops.attention(q, k, v, causal=mask.causal, block_mask=mask.blocks, backend=backend, **options)


def traffic(mode, q, k, v, mask):
    forward = 2 * q.nbytes + k.nbytes + v.nbytes
    return forward if mode == "forward" else 2 * forward  # backward reads q, k, v, o, do and writes dq, dk, dv


def flops(mode, q, k, v, mask):
    products = {"forward": 2, "backward": 5}[mode]
    batch = q.shape[0] if q.ndim == 4 else 1
    return 2 * products * batch * q.shape[-2] * mask.pairs * q.shape[-1]


def gate_size(size):
    """At most 1024 tokens, for the reference stores all scores: 34 GB a tensor at 8192 tokens and 64 heads in fp64."""
    S = size["S"]
    if S <= 1024:
        return size
    cut = {**size, "S": 1024, "B": min(size["B"], 2)}
    if "window" in size:  # as much of the sequence as at the full size
        cut["window"] = max(1, size["window"] * 1024 // S)
    if "packed" in size:
        cut["packed"] = min(size["packed"], 4)
    return cut


def _heads(width):
    """2048 wide in all, as in the papers' sweeps."""
    return {"H": 2048 // width, "H_kv": 2048 // width, "width": width}


LARGE = {"B": 1, "H": 64, "H_kv": 8, "width": 128}
LONG = {"B": 1, "S": 16384}
TINY = {"B": 1, "S": 32, "H": 2, "H_kv": 1, "width": 16}
CPU = {"B": 4, "S": 256, "H": 6, "H_kv": 6, "width": 64}
DENSITIES = (0.05, 0.1, 0.25, 0.5, 1.0)
BENCH = Bench(
    op="attention",
    make=make,
    reference=lambda *args: op(*args, backend="reference"),
    providers=[
        *ours("attention", op),
        plain(others.by_sdpa, "sdpa"),
        *(Provider(f"sdpa:{name}", others.with_kernel(kernel)) for name, kernel in others.SDPA.items()),
        Provider("flex", others.with_flex),
        Provider("torch:varlen", others.with_varlen),
        Provider("flash-attn", others.with_flash_attn("flash_attn")),
        Provider("flash-attn 3", others.with_flash_attn("flash_attn_interface")),
        Provider("xformers", others.with_xformers),
    ],
    plain="sdpa",
    sizes={
        "tiny": [
            {**TINY, "S": 20},
            {**TINY, "window": 9},
            {**TINY, "causal": False, "density": 0.5, "block": 16},
            {**TINY, "S": 40, "packed": 3},
            {**TINY, "S": 40, "packed": 3, "causal": False},
        ],
        "cpu": [
            CPU,
            {**CPU, "H_kv": 2},
            {**CPU, "causal": False},
            {**CPU, "B": 1, "S": 2048},
            {**CPU, "B": 1, "S": 2048, "window": 256},
            {**CPU, "B": 1, "S": 2048, "causal": False, "density": 0.25},
            {**CPU, "B": 1, "S": 2048, "packed": 8},
        ],
        # What benchmarks/gpu.sh has time for. Each kind of cell means kernels to compile, at every one's first call.
        "quick": [
            {**LARGE, "S": 8192},
            {**LARGE, "S": 8192, "causal": False},
            {"B": 4, "S": 4096, "H": 32, "H_kv": 32, "width": 64},
            {**LONG, **_heads(128), "window": 1024},
            {**LONG, **_heads(128), "causal": False, "density": 0.1},
            {**LONG, **_heads(128), "causal": False, "density": 1.0},
            {**LONG, **_heads(128), "packed": 16},
        ],
        "full": [
            *(
                {"B": 16384 // S, "S": S, **_heads(width), "causal": causal}
                for width in (64, 128, 256)
                for causal in (True, False)
                for S in (1024, 2048, 4096, 8192, 16384)
            ),
            *({**LARGE, "S": S, "causal": causal} for causal in (True, False) for S in (2048, 8192, 16384)),
            *({**LONG, **_heads(width), "window": window} for width in (64, 128, 256) for window in (256, 1024, 4096)),
            *(
                {**LONG, **_heads(width), "causal": False, "density": density}
                for width in (64, 128, 256)
                for density in DENSITIES
            ),
            *(
                {**LONG, **_heads(width), "packed": packed, "causal": causal}
                for width in (64, 128)
                for causal in (True, False)
                for packed in (4, 16, 64)
            ),
        ],
    },
    traffic=traffic,
    flops=flops,
    gate_size=gate_size,
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
        int(causal),
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
