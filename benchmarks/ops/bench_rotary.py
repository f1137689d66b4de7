"""rotary of q and k, as views of one fused product, against the formula as Hugging Face models write it."""

import torch

from benchmarks.harness import Aot, Bench, compiled, meta, ours, plain
from fastlm import ops


def make(dtype, device, B, S, H, H_kv, width, interleaved=False, packed=False, offset=0):
    """packed: the B sequences lie one behind the other. offset: the position of the first token."""
    rows = S + offset + 7
    angles = torch.arange(rows, device=device)[:, None] * 1e4 ** -torch.linspace(0, 1, width // 2, device=device)
    qkv = torch.randn(*(B * S,) if packed else (B, S), H + 2 * H_kv, width, device=device).to(dtype).requires_grad_()
    places = {"offset": offset}
    if packed:
        places |= {"cu_seqlens": torch.arange(B + 1, device=device, dtype=torch.int32) * S}
    return qkv, angles.cos(), angles.sin(), (H, H_kv), interleaved, places


def parts(qkv, heads):
    H, H_kv = heads
    return qkv[..., :H, :], qkv[..., H : H + H_kv, :]


def by_hand(qkv, cos, sin, heads, interleaved, places):
    # Models gather, double and cast the tables once per forward, not per layer: at S = 1 that flatters us.
    offset, cu = places["offset"], places.get("cu_seqlens")
    if cu is not None:
        total = qkv.shape[0]
        index = torch.arange(total, device=qkv.device) - cu[:-1].repeat_interleave(cu.diff(), output_size=total)
        cos, sin = cos[index + offset], sin[index + offset]
    else:
        cos, sin = (t[offset : offset + qkv.shape[1]] for t in (cos, sin))
    if interleaved:
        cos, sin = (t.to(qkv.dtype).repeat_interleave(2, -1).unsqueeze(1) for t in (cos, sin))
    else:
        cos, sin = (torch.cat((t, t), -1).to(qkv.dtype).unsqueeze(1) for t in (cos, sin))

    def turned(x):
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    return tuple(x * cos + turned(x) * sin for x in parts(qkv, heads))


def op(qkv, cos, sin, heads, interleaved, places, backend):
    return ops.rotary(*parts(qkv, heads), cos, sin, interleaved=interleaved, **places, backend=backend)


def traffic(mode, qkv, cos, sin, heads, interleaved, places):
    H, H_kv = heads
    return 2 * qkv.nbytes * (H + H_kv) // (H + 2 * H_kv) + cos.nbytes + sin.nbytes


BENCH = Bench(
    op="rotary",
    make=make,
    reference=lambda *args: op(*args, backend="reference"),
    providers=[*ours("rotary", op), plain(by_hand), compiled(by_hand)],
    sizes={
        "tiny": [
            {"B": 1, "S": 4, "H": 2, "H_kv": 1, "width": 16},
            {"B": 2, "S": 4, "H": 2, "H_kv": 1, "width": 16, "packed": True},
        ],
        "cpu": [
            {"B": 4, "S": 256, "H": 6, "H_kv": 2, "width": 64},
            {"B": 4, "S": 256, "H": 6, "H_kv": 2, "width": 64, "interleaved": True},
            {"B": 4, "S": 256, "H": 6, "H_kv": 2, "width": 64, "packed": True},
            {"B": 1, "S": 1, "H": 6, "H_kv": 2, "width": 64, "offset": 5},
        ],
        "quick": [
            {"B": 2, "S": 4096, "H": 32, "H_kv": 8, "width": 128},
            {"B": 2, "S": 4096, "H": 32, "H_kv": 8, "width": 128, "interleaved": True},
            {"B": 8, "S": 1024, "H": 12, "H_kv": 12, "width": 64},
            {"B": 8, "S": 1024, "H": 32, "H_kv": 8, "width": 128, "packed": True},
            {"B": 64, "S": 1, "H": 32, "H_kv": 8, "width": 128},
        ],
    },
    traffic=traffic,
)


def _aot(width, half, interleaved, positions=None, *places, rows=(2, 4096)):
    q, k, _ = meta(*rows, 48, width).split((32, 8, 8), 2)
    table = meta(4096, half, dtype=torch.float32)
    return Aot("rotary:rotary_fwd", q, k, table, table, positions, interleaved, *places)


_DQ, _DK, _TABLE = meta(2, 4096, 32, 128), meta(2, 4096, 8, 128), meta(4096, 64, dtype=torch.float32)
AOT = [
    _aot(128, 64, False),
    _aot(128, 64, True),
    _aot(64, 32, False, meta(2, 4096, dtype=torch.int64)),
    _aot(80, 40, False),
    _aot(256, 32, True),
    _aot(128, 64, False, None, 7),
    _aot(128, 64, False, None, 0, meta(16, dtype=torch.int64), meta(17, dtype=torch.int32), rows=(1, 8192)),
    Aot("rotary:rotary_bwd", _DQ, _DK, _TABLE, _TABLE, None, False),
]
