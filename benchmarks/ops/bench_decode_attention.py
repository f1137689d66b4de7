"""decode_attention over contiguous and paged caches, against gathering the pages and calling F.scaled_dot_product_attention."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Aot, Bench, Provider, compiled, meta, ours, plain
from fastlm.ops.decode_attention import decode_attention


def make(dtype, device, B, T, H, H_kv, width, page=0, S=1, ragged=False):
    """page: tokens of a page, 0 for a contiguous cache. ragged: lengths from T / 2 to T, else all T.

    The last of what is returned says that every query sees every key of the cache.
    """
    lengths = torch.linspace(T // 2 if ragged else T, T, B, device=device).long()
    table, rows, places = None, B, T
    if page:
        count = -(-T // page)
        rows, places = B * count, page
        table = torch.randperm(rows, device=device).view(B, count).int()
    q = torch.randn(B, S, H, width, device=device).to(dtype)
    k_cache, v_cache = (torch.randn(rows, places, H_kv, width, device=device, dtype=dtype) for _ in range(2))
    return q, k_cache, v_cache, lengths, table, not ragged and S == 1


def gathered(cache, table):
    return cache if table is None else cache[table.long()].flatten(1, 2)


def by_sdpa(q, k_cache, v_cache, lengths, table, whole):
    k, v = (gathered(x, table).transpose(1, 2) for x in (k_cache, v_cache))
    mask = None
    if not whole:  # else all keys are seen, which leaves SDPA its fastest kernels
        query, key = torch.arange(q.shape[1], device=q.device), torch.arange(k.shape[2], device=q.device)
        mask = key <= (lengths[:, None] - q.shape[1] + query)[:, None, :, None]
    grouped = q.shape[2] != k.shape[1]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)


def with_flash_attn():
    from flash_attn import flash_attn_with_kvcache

    def call(q, k_cache, v_cache, lengths, table, whole):
        options = {"cache_seqlens": lengths.int(), "block_table": table, "causal": True}
        return flash_attn_with_kvcache(q, k_cache, v_cache, **options)

    return call


def op(q, k_cache, v_cache, lengths, table, whole, backend):
    return decode_attention(q, k_cache, v_cache, lengths, page_table=table, backend=backend)


def traffic(mode, q, k_cache, v_cache, lengths, table, whole):
    row = k_cache[0, 0].nbytes + v_cache[0, 0].nbytes
    return int(lengths.sum()) * row + 2 * q.nbytes


GQA = {"H": 64, "H_kv": 8, "width": 128}  # 8 to 1, and 4 KiB of keys and values a token
PAGES = (0, 1, 16, 64, 256)
BENCH = Bench(
    op="decode_attention",
    make=make,
    reference=lambda *args: op(*args, backend="reference"),
    providers=[
        *ours("decode_attention", op),
        plain(by_sdpa, "gather + sdpa"),
        compiled(by_sdpa, "compiled"),
        Provider("flash-attn", with_flash_attn),
    ],
    plain="gather + sdpa",
    sizes={
        "tiny": [
            {"B": 2, "T": 40, "H": 4, "H_kv": 2, "width": 16, "ragged": True},
            {"B": 2, "T": 40, "H": 4, "H_kv": 2, "width": 16, "page": 16, "ragged": True},
        ],
        "cpu": [
            {"B": 4, "T": 2048, "H": 8, "H_kv": 2, "width": 64},
            {"B": 4, "T": 2048, "H": 8, "H_kv": 2, "width": 64, "ragged": True},
            {"B": 4, "T": 2048, "H": 8, "H_kv": 2, "width": 64, "page": 16, "ragged": True},
        ],
        # From 1 GiB of keys and values a call on: nothing of it stays in a cache.
        "quick": [
            *({"B": 32, "T": 8192, **GQA, "page": page} for page in PAGES),
            {"B": 16, "T": 65536, **GQA, "page": 16},
            {"B": 32, "T": 8192, **GQA, "page": 16, "ragged": True},
            {"B": 32, "T": 8192, **GQA, "page": 16, "S": 4},
        ],
        "full": [
            *(
                {"B": B, "T": T, **GQA, "page": page}
                for B, T in ((32, 8192), (16, 16384), (16, 32768), (16, 65536))
                for page in PAGES
            ),
            {"B": 16, "T": 16384, "H": 16, "H_kv": 16, "width": 64, "page": 16},
            {"B": 16, "T": 16384, "H": 16, "H_kv": 2, "width": 256, "page": 16},
        ],
    },
    traffic=traffic,
    modes=("forward",),
    # In fp32 the reference keeps every key and value several times over.
    gate_size=lambda size: {**size, "B": min(size["B"], 4), "T": min(size["T"], 8192)},
)


def _aot(width, page=0, S=1, dtype=torch.bfloat16, H=64, H_kv=8, B=32, T=8192, left=-1, softcap=0.0, heavy=False):
    count = T // page if page else 0
    cache = meta(*((B * count, page) if page else (B, T)), H_kv, width, dtype=dtype)
    table = meta(B, count, dtype=torch.int32) if page else None
    lengths, q = meta(B, dtype=torch.int32), meta(B, S, H, width, dtype=dtype)
    slopes, distances = (meta(H, dtype=torch.float32), meta(H, 257, dtype=dtype)) if heavy else (None, None)
    return Aot(
        "decode_attention:decode_attention", q, cache, cache, lengths, table, None, slopes, distances, None, left, width**-0.5,
        softcap, 0,
    )  # fmt: skip


AOT = [
    *(_aot(width) for width in (64, 128, 256)),
    *(_aot(width, 16, B=4) for width in (64, 128, 256)),  # split over the keys
    *(_aot(128, page) for page in (1, 16, 64, 100, 256)),
    _aot(80, 16),
    *(_aot(width, 16, S=8) for width in (64, 128, 256)),
    _aot(128, 16, left=4096, softcap=50.0),
    _aot(128, 16, heavy=True),
    _aot(128, 16, dtype=torch.float32),
]
