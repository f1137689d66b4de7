"""append_kv_ of rotated keys into contiguous and paged caches, against rotating by hand and index assignment."""

import torch

from benchmarks.harness import Aot, Bench, compiled, meta, ours, plain
from fastlm.ops.append_kv import append_kv_


def make(dtype, device, B, S, T, H_kv, width, page=0):
    """page: tokens of a page, 0 for a contiguous cache."""
    rows, places, table = B, T, None
    if page:
        count = -(-T // page)
        rows, places = B * count, page
        table = torch.randperm(rows, device=device).view(B, count).int()
    k_cache, v_cache = (torch.randn(rows, places, H_kv, width, device=device, dtype=dtype) for _ in range(2))
    k, v, _ = torch.randn(B, S, 3 * H_kv, width, device=device).to(dtype).split(H_kv, 2)  # of one fused product
    lengths = torch.arange(B, device=device) * 7 % (T - S + 1)
    angles = torch.arange(T, device=device)[:, None] * 1e4 ** -torch.linspace(0, 1, width // 2, device=device)
    return k_cache, v_cache, k, v, lengths, table, angles.cos(), angles.sin()


def by_hand(k_cache, v_cache, k, v, lengths, table, cos, sin):
    place = lengths[:, None] + torch.arange(k.shape[1], device=k.device)
    angle_cos, angle_sin = (torch.cat((t, t), -1)[place].unsqueeze(2).to(k.dtype) for t in (cos, sin))
    a, b = k.chunk(2, -1)
    k = k * angle_cos + torch.cat((-b, a), -1) * angle_sin
    if table is None:
        at = (torch.arange(k.shape[0], device=k.device)[:, None], place)
    else:
        size = k_cache.shape[1]
        at = (table.long().gather(1, place // size), place % size)
    k_cache[at], v_cache[at] = k, v
    return k_cache, v_cache


def op(k_cache, v_cache, k, v, lengths, table, cos, sin, backend):
    append_kv_(k_cache, v_cache, k, v, lengths, page_table=table, cos=cos, sin=sin, backend=backend)
    return k_cache, v_cache


def traffic(mode, k_cache, v_cache, k, v, lengths, table, cos, sin):
    return 2 * (k.nbytes + v.nbytes) + k.shape[0] * k.shape[1] * 2 * cos[0].nbytes


GQA = {"H_kv": 8, "width": 128}
BENCH = Bench(
    op="append_kv_",
    make=make,
    reference=lambda *args: op(*args, backend="reference"),
    providers=[*ours("append_kv_", op), plain(by_hand), compiled(by_hand)],
    sizes={
        "tiny": [
            {"B": 2, "S": 3, "T": 16, "H_kv": 2, "width": 16},
            {"B": 2, "S": 1, "T": 16, "H_kv": 2, "width": 16, "page": 4},
        ],
        "cpu": [
            {"B": 4, "S": 1, "T": 1024, "H_kv": 2, "width": 64},
            {"B": 4, "S": 1, "T": 1024, "H_kv": 2, "width": 64, "page": 16},
            {"B": 4, "S": 256, "T": 1024, "H_kv": 2, "width": 64},
        ],
        "quick": [
            {"B": 64, "S": 1, "T": 2048, **GQA},
            *({"B": 64, "S": 1, "T": 2048, **GQA, "page": page} for page in (1, 16)),
            {"B": 8, "S": 4096, "T": 8192, **GQA},
            {"B": 8, "S": 4096, "T": 8192, **GQA, "page": 16},
        ],
    },
    traffic=traffic,
    modes=("forward",),
)


def _aot(B, S, T, width, half, page=0, cache_dtype=torch.bfloat16, interleaved=False):
    cache = meta(*((B * T // page, page) if page else (B, T)), 8, width, dtype=cache_dtype)
    table = meta(B, T // page, dtype=torch.int32) if page else None
    k, v, _ = meta(B, S, 24, width).split(8, 2)
    angles = meta(T, half, dtype=torch.float32) if half else None
    return Aot(
        "append_kv:append_kv", cache, cache, k, v, meta(B, dtype=torch.int64), table, angles, angles, interleaved
    )


AOT = [
    _aot(64, 1, 8192, 128, 64, page=16),
    _aot(8, 4096, 8192, 128, 64),
    _aot(8, 4096, 8192, 128, 64, page=16, interleaved=True),
    _aot(8, 4096, 8192, 64, 0, page=16),
    _aot(8, 4096, 8192, 256, 32, page=100),
    _aot(8, 4096, 8192, 80, 40, cache_dtype=torch.float16),
]
