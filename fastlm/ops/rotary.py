"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._op import Op, _transforming, compute_dtype

_FEW = 1 << 14  # elements of q below which the time is that of the calls, not of the memory


def _angles(cos, sin, length, positions, dtype):
    """cos and sin as [S, 1, R/2] or [B, S, 1, R/2], constants in `dtype`."""
    if cos.requires_grad or sin.requires_grad:
        cos, sin = cos.detach(), sin.detach()
    if positions is not None:
        positions = positions.clamp(0, cos.shape[0] - 1)
        cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
    elif cos.shape[0] != length:
        cos, sin = cos[:length], sin[:length]
    if cos.dtype != dtype:
        cos, sin = cos.to(dtype), sin.to(dtype)
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


def _rotated(x, cos, sin, interleaved):
    half = cos.shape[-1]
    part = x[..., : 2 * half].to(cos.dtype)
    if interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = part[..., :half], part[..., half:]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return _with_rest(out.to(x.dtype), x)


def _with_rest(rotated, x):
    width = rotated.shape[-1]
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), -1)


def _reference(q, k, cos, sin, interleaved, positions):
    cos, sin = _angles(cos, sin, q.shape[1], positions, compute_dtype(q))
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


def _rotated_fast(x, cos, sin, interleaved):
    """`_rotated` in fewer passes over memory; not differentiable."""
    part = _turning_part(x, cos)
    if interleaved:
        out = torch.view_as_real(_as_complex(part) * torch.complex(cos, sin)).reshape(part.shape)
    else:
        pairs = part.view(*part.shape[:-1], 2, cos.shape[-1])
        turned = pairs * cos.unsqueeze(-2)
        (a, b), (new_a, new_b) = pairs.unbind(-2), turned.unbind(-2)
        new_a.addcmul_(b, sin, value=-1)
        new_b.addcmul_(a, sin)
        out = turned.reshape(part.shape)
    return _with_rest(out.to(x.dtype), x)


def _rotated_few(x, cos, sin):
    """`_rotated` by halves in fewer calls, which is what counts for a few tokens; not differentiable."""
    a, b = _turning_part(x, cos).chunk(2, -1)
    out = torch.cat(((a * cos).addcmul_(b, sin, value=-1), (b * cos).addcmul_(a, sin)), -1)
    return _with_rest(out.to(x.dtype), x)


def _turning_part(x, cos):
    width = 2 * cos.shape[-1]
    return (x if width == x.shape[-1] else x[..., :width]).to(cos.dtype)


def _as_complex(x):
    """[..., R] as complex [..., R/2]; a view where the strides allow one."""
    pairs = x.view(*x.shape[:-1], x.shape[-1] // 2, 2)
    if pairs.stride(-1) != 1 or any(s % 2 for s in pairs.stride()[:-1]) or pairs.storage_offset() % 2:
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(pairs)


class _Rotate(torch.autograd.Function):
    """The torch form with its own backward: the same rotation by minus the angle."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated_fast(q, cos, sin, interleaved), _rotated_fast(k, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return *_Rotate.apply(dq, dk, cos, -sin, ctx.interleaved), None, None, None


def _torch(q, k, cos, sin, interleaved, positions):
    if torch.compiler.is_compiling():
        return _reference(q, k, cos, sin, interleaved, positions)  # which Inductor fuses into one loop
    cos, sin = _angles(cos, sin, q.shape[1], positions, compute_dtype(q))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rotate.apply(q, k, cos, sin, interleaved)
    if q.numel() > _FEW:
        return _rotated_fast(q, cos, sin, interleaved), _rotated_fast(k, cos, sin, interleaved)
    both = torch.cat((q, k), 2)
    both = _rotated_fast(both, cos, sin, True) if interleaved else _rotated_few(both, cos, sin)
    return both.split_with_sizes((q.shape[2], k.shape[2]), 2)


def _supports(backend, q, k, cos, sin):
    if backend == "triton" and q.shape[-1] > 1024:
        return f"its heads are at most 1024 wide, got {q.shape[-1]}"
    return None


OP = Op(
    "rotary",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, str backend)"
    " -> (Tensor q_out, Tensor k_out)",
    "(Tensor dq, Tensor dk, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, str backend)"
    " -> (Tensor dq_in, Tensor dk_in)",
    reference=_reference,
    torch=_torch,
    kernels={"triton": ("rotary:rotary_fwd", "rotary:rotary_bwd")},
    supports=_supports,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _fake(q, k, cos, sin, positions, interleaved, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape)


OP.fake(_fake, _fake)


@OP.autograd
class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, interleaved, backend):
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved, ctx.backend = interleaved, backend
        return OP.below(q, k, cos, sin, positions, interleaved, backend)

    @staticmethod
    def backward(ctx, dq, dk):
        return *OP.backward(dq, dk, *ctx.saved_tensors, ctx.interleaved, ctx.backend), None, None, None, None, None


@OP.backward_reference
def _backward_reference(dq, dk, cos, sin, positions, interleaved, backend):
    return _reference(dq, dk, cos, -sin, interleaved, positions)


def _shard(q, k, cos, sin, positions, interleaved, backend):
    from torch.distributed.tensor import Replicate, Shard

    def rule(place, positions_place):
        places = [place, place, Replicate(), Replicate(), None if positions is None else positions_place]
        return [place, place], [*places, None, None]

    # By batch, and by heads (tensor parallel); a split of the sequence would need each part to know where it begins.
    by_batch = Shard(0) if positions is not None and positions.ndim == 2 else Replicate()
    return [rule(Replicate(), Replicate()), rule(Shard(0), by_batch), rule(Shard(2), Replicate())]


OP.sharding(_shard, _shard)


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
        if t.ndim != 2 or t.shape != cos.shape or not 0 < 2 * t.shape[1] <= q.shape[3]:
            raise ValueError(
                f"rotary: {name} must be [S_max, R/2] with 0 < R <= Dh = {q.shape[3]}, alike in cos and sin, got {list(t.shape)}"
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


def _check_values(positions, table):
    """On the CPU, where it costs no synchronisation. Not under torch.compile or a transform, where there are no values."""
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or _transforming((positions,)):
        return
    if type(positions) is not Tensor or positions.numel() == 0:
        return
    low, high = (int(t) for t in positions.aminmax())
    if low < 0 or high >= table:
        raise ValueError(f"rotary: positions must lie in 0..{table - 1}, the rows of cos and sin, got {low}..{high}")


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
        The rotated (q, k), new tensors of the shapes and dtypes of q and k; computed in fp32. The backward is the
        rotation by minus the angle. Under autocast dtypes are kept.

    Raises:
        ValueError: shapes that do not fit, positions outside the table, an unknown or unsupported backend. TypeError: q and k
        are not of one floating dtype, cos or sin is not fp32, positions are not int64.

    Backends: triton on compute capability >= 8.0. Paper: Su et al. 2021, arXiv:2104.09864.
    """
    _check(q, k, cos, sin, positions)
    backend = OP.choose(backend, q, k, cos, sin)
    if positions is not None:
        _check_values(positions, cos.shape[0])
    if backend in OP.plain_forms:
        return OP.plain(backend, q, k, cos, sin, interleaved, positions)
    return OP.forward(q, k, cos, sin, positions, interleaved, backend)
