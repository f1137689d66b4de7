"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._op import Op


def _angles(cos, sin, length, positions, dtype):
    """cos and sin as [S, 1, R/2] or [B, S, 1, R/2], constants in `dtype`."""
    cos, sin = cos.detach(), sin.detach()
    if positions is None:
        cos, sin = cos[:length], sin[:length]
    else:
        positions = positions.clamp(0, cos.shape[0] - 1)
        cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
    return cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)


def _reference_one(x, cos, sin, interleaved):
    half = cos.shape[-1]
    turned = x[..., : 2 * half].to(cos.dtype)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    out = out.to(x.dtype)
    return out if 2 * half == x.shape[-1] else torch.cat((out, x[..., 2 * half :]), -1)


def _reference(q, k, cos, sin, interleaved, positions):
    cos, sin = _angles(cos, sin, q.shape[1], positions, torch.promote_types(q.dtype, torch.float32))
    return _reference_one(q, cos, sin, interleaved), _reference_one(k, cos, sin, interleaved)


OP = Op(
    "rotary",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, str backend)"
    " -> (Tensor q_out, Tensor k_out)",
    "(Tensor dq, Tensor dk, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, str backend)"
    " -> (Tensor dq_in, Tensor dk_in)",
    reference=_reference,
    torch=_reference,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _check(q, k, cos, sin, positions):
    for name, t in (("q", q), ("k", k)):
        if t.ndim != 4:
            raise ValueError(f"rotary: {name} must be [B, S, heads, Dh], got {list(t.shape)}")
        if not t.is_floating_point():
            raise TypeError(f"rotary: {name} must be floating point, got {t.dtype}")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"rotary: k must be like q {list(q.shape)} in all but the heads, got {list(k.shape)}")
    if k.dtype != q.dtype:
        raise TypeError(f"rotary: k must have q's dtype {q.dtype}, got {k.dtype}")
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"rotary: {name} must be float32 (16 bits cannot hold the angle), got {t.dtype}")
        if t.ndim != 2 or t.shape != cos.shape or 2 * t.shape[1] > q.shape[3]:
            raise ValueError(
                f"rotary: {name} must be [S_max, R/2] with R <= Dh = {q.shape[3]}, alike in cos and sin, got {list(t.shape)}"
            )
    if positions is None:
        if q.shape[1] > cos.shape[0]:
            raise ValueError(f"rotary: cos and sin have {cos.shape[0]} positions, fewer than the {q.shape[1]} of q")
        return
    if positions.dtype != torch.int64:
        raise TypeError(f"rotary: positions must be int64, got {positions.dtype}")
    if positions.shape not in (q.shape[1:2], q.shape[:2]):
        raise ValueError(
            f"rotary: positions must be [{q.shape[1]}] or {list(q.shape[:2])}, got {list(positions.shape)}"
        )


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotates pairs of elements of q and k by the angle of their position: (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
        q: [B, S, H, Dh], fp16, bf16, fp32 (any float dtype on the reference), any strides: views of one fused product are
            read where they lie.
        k: [B, S, H_kv, Dh], dtype of q.
        cos, sin: [S_max, R/2] fp32 with R <= Dh: row p holds the angles of position p, column i that of pair i. Elements
            R, R+1, ... of each head are passed through. Constants: they get no gradient.
        interleaved: False pairs elements (i, i + R/2) (Llama, NeoX), True (2 i, 2 i + 1) (GPT-J).
        positions: int64 [S] or [B, S], the row of cos and sin for each token; None means 0, 1, ..., S-1. Values outside the
            table are an error on the CPU and are clamped on a GPU, where looking would stall it, and under torch.compile.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        The rotated (q, k), new contiguous tensors of the shapes and dtypes of q and k; computed in fp32. The backward is the
        rotation by minus the angle. Under autocast dtypes are kept.

    Raises:
        ValueError: shapes that do not fit, positions outside the table, an unknown or unsupported backend. TypeError: q and k
        are not of one floating dtype, cos or sin is not fp32, positions are not int64.

    Backends: triton on compute capability >= 8.0. Paper: Su et al. 2021, arXiv:2104.09864.
    """
    _check(q, k, cos, sin, positions)
    backend = OP.choose(backend, q, k, cos, sin)
    if backend in OP.plain_forms:
        return OP.plain(backend, q, k, cos, sin, interleaved, positions)
    return OP.forward(q, k, cos, sin, positions, interleaved, backend)
