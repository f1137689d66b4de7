"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._op import Op
from fastlm.ops._tensor import can_read, compute_dtype, host_values, is_batched

_FEW = 1 << 14  # elements of q below which the time is that of the calls, not of the memory


def _places(q, positions, offset, starts, cu_seqlens):
    """The position of each token, [S] or [B, S]; None where they are offset, offset + 1, ... in every row."""
    if positions is not None or (starts is None and cu_seqlens is None):
        return positions
    index = torch.arange(q.shape[1], device=q.device)
    if cu_seqlens is not None:
        begins = cu_seqlens.long()
        # The last sequence that begins at or before the token; empty ones have no token.
        sequence = (torch.searchsorted(begins, index, right=True) - 1).clamp(0, max(begins.shape[0] - 2, 0))
        index = index - begins[sequence]
        starts = starts[sequence] if starts is not None and starts.ndim else starts
    elif starts.ndim:
        starts = starts[:, None]
    return index + offset if starts is None else index + starts


def _angles(q, cos, sin, positions, offset, starts, cu_seqlens):
    """cos and sin as [S, 1, R/2] or [B, S, 1, R/2], constants in the dtype in which q is turned."""
    if cos.requires_grad or sin.requires_grad:
        cos, sin = cos.detach(), sin.detach()
    positions, dtype, length = _places(q, positions, offset, starts, cu_seqlens), compute_dtype(q), q.shape[1]
    if positions is not None:
        positions = positions.clamp(0, cos.shape[0] - 1)
        cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
    elif offset or cos.shape[0] != length:
        cos, sin = cos[offset : offset + length], sin[offset : offset + length]
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


def _reference(q, k, cos, sin, interleaved, positions=None, offset=0, starts=None, cu_seqlens=None):
    cos, sin = _angles(q, cos, sin, positions, offset, starts, cu_seqlens)
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


def _rotated_fast(x, cos, sin, interleaved):
    """`_rotated` in fewer passes over memory; not differentiable, and no view of anything."""
    part = _turning_part(x, cos)
    if interleaved:
        out = torch.empty(part.shape, dtype=part.dtype, device=part.device)
        torch.mul(_as_complex(part), torch.complex(cos, sin), out=_as_complex(out))
    else:
        pairs = part.view(*part.shape[:-1], 2, cos.shape[-1])
        out = pairs * cos.unsqueeze(-2)
        (a, b), (new_a, new_b) = pairs.unbind(-2), out.unbind(-2)
        new_a.addcmul_(b, sin, value=-1)
        new_b.addcmul_(a, sin)
        out = out.resize_(part.shape) if out.is_contiguous() else out.reshape(part.shape).clone()
    return _with_rest(out.to(x.dtype), x)


def _rotated_few(x, cos, sin, interleaved):
    """`_rotated` in fewer calls, and fewer steps for autograd, which is what counts for a few tokens."""
    part, half = _turning_part(x, cos), cos.shape[-1]
    if interleaved:
        out = torch.view_as_real(_as_complex(part) * torch.complex(cos, sin)).reshape(part.shape)
    else:
        out = (part * torch.cat((cos, cos), -1)).addcmul_(part.roll(half, -1), torch.cat((-sin, sin), -1))
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


def _marked(ctx, q, k):
    """The outputs of an autograd.Function of (q, k, ...), each of which requires a gradient only where its own input does."""
    ctx.mark_non_differentiable(*(t for t, needed in zip((q, k), ctx.needs_input_grad) if not needed))
    return q, k


class _Rotate(torch.autograd.Function):
    """The torch form with its own backward: the same rotation by minus the angle."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _marked(ctx, _rotated_fast(q, cos, sin, interleaved), _rotated_fast(k, cos, sin, interleaved))

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        if is_batched(dq) or is_batched(dk):  # of a batch of cotangents nothing can be written into what is not batched
            dq, dk = (_rotated_few(t, cos, -sin, ctx.interleaved) for t in (dq, dk))
        else:
            dq, dk = _Rotate.apply(dq, dk, cos, -sin, ctx.interleaved)
        return dq, dk, None, None, None


def _torch(q, k, cos, sin, interleaved, positions=None, offset=0, starts=None, cu_seqlens=None):
    if torch.compiler.is_compiling():  # Inductor fuses the formula into one loop
        return _reference(q, k, cos, sin, interleaved, positions, offset, starts, cu_seqlens)
    cos, sin = _angles(q, cos, sin, positions, offset, starts, cu_seqlens)
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if q.numel() > _FEW:
        if differentiable:
            return _Rotate.apply(q, k, cos, sin, interleaved)
        return _rotated_fast(q, cos, sin, interleaved), _rotated_fast(k, cos, sin, interleaved)
    if differentiable and not (q.requires_grad and k.requires_grad):
        return _rotated_few(q, cos, sin, interleaved), _rotated_few(k, cos, sin, interleaved)
    both = _rotated_few(torch.cat((q, k), 2), cos, sin, interleaved)
    heads = q.shape[2], k.shape[2]
    # Autograd lets nobody write into one view of several.
    return torch.split_with_sizes_copy(both, heads, 2) if differentiable else both.split_with_sizes(heads, 2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, positions: Tensor | None) -> Tensor:
    """The torch form for one tensor [B, S, heads, width] and without a gradient; its arguments are checked already."""
    cos, sin = _angles(x, cos, sin, positions, 0, None, None)
    return (_rotated_fast if x.numel() > _FEW else _rotated_few)(x, cos, sin, interleaved)


def _supports(backend, q, k, cos, sin):
    if backend == "triton" and q.shape[-1] > 1024:
        return f"its heads are at most 1024 wide, got {q.shape[-1]}"
    return None


_PLACE = "Tensor? positions, bool interleaved, SymInt offset, Tensor? starts, Tensor? cu_seqlens, str backend"
OP = Op(
    "rotary",
    f"(Tensor q, Tensor k, Tensor cos, Tensor sin, {_PLACE}) -> (Tensor q_out, Tensor k_out)",
    f"(Tensor dq, Tensor dk, Tensor cos, Tensor sin, {_PLACE}) -> (Tensor dq_in, Tensor dk_in)",
    reference=_reference,
    torch=_torch,
    kernels={"triton": ("rotary:rotary_fwd", "rotary:rotary_bwd")},
    supports=_supports,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _fake(q, k, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape)


OP.fake(_fake, _fake)


@OP.autograd
class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, interleaved, offset, starts, cu_seqlens, backend):
        ctx.save_for_backward(cos, sin, positions, starts, cu_seqlens)
        ctx.options = interleaved, offset, backend
        return _marked(ctx, *OP.below(q, k, cos, sin, positions, interleaved, offset, starts, cu_seqlens, backend))

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin, positions, starts, cu_seqlens = ctx.saved_tensors
        interleaved, offset, backend = ctx.options
        grads = OP.backward(dq, dk, cos, sin, positions, interleaved, offset, starts, cu_seqlens, backend)
        return *grads, *(None,) * 8


@OP.backward_reference
def _backward_reference(dq, dk, cos, sin, positions, interleaved, offset, starts, cu_seqlens, backend):
    return _reference(dq, dk, cos, -sin, interleaved, positions, offset, starts, cu_seqlens)


def _shard(q, k, cos, sin, positions, interleaved, offset, starts, cu_seqlens, backend):
    from torch.distributed.tensor import Replicate, Shard

    def rule(place):
        def like_batch(t, ndim):
            return None if t is None else place if place == Shard(0) and t.ndim == ndim else Replicate()

        places = [place, place, Replicate(), Replicate(), like_batch(positions, 2)]
        return [place, place], [*places, None, None, like_batch(starts, 1), like_batch(cu_seqlens, None), None]

    # By batch, and by heads (tensor parallel); a split of the sequence would need each part to know where it begins.
    batch = [] if cu_seqlens is not None else [rule(Shard(0))]
    return [rule(Replicate()), *batch, rule(Shard(2))]


OP.sharding(_shard, _shard)


def _check(q, k, cos, sin, positions, offset, cu_seqlens):
    packed = q.ndim == 3
    for name, t in (("q", q), ("k", k)):
        if t.ndim != 4 - packed:
            raise ValueError(
                f"rotary: {name} must be [B, S, heads, Dh] or packed [total, heads, Dh], got {list(t.shape)}"
            )
        if not t.is_floating_point():
            raise TypeError(f"rotary: {name} must be floating point, got {t.dtype}")
    if k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"rotary: k must be like q {list(q.shape)} in all but the heads, got {list(k.shape)}")
    if k.dtype != q.dtype:
        raise TypeError(f"rotary: k must have q's dtype {q.dtype}, got {k.dtype}")
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"rotary: {name} must be float32 (16 bits cannot hold the angle), got {t.dtype}")
        if t.ndim != 2 or t.shape != cos.shape or not 0 < 2 * t.shape[1] <= q.shape[-1]:
            raise ValueError(
                f"rotary: {name} must be [S_max, R/2] with 0 < R <= Dh = {q.shape[-1]}, alike in cos and sin, got {list(t.shape)}"
            )
    if positions is not None:
        _check_positions(q, positions, offset, cu_seqlens)
    elif cu_seqlens is not None or isinstance(offset, Tensor) or offset:
        _check_places(q, cos.shape[0], offset, cu_seqlens)
    elif q.shape[-3] > cos.shape[0]:
        raise ValueError(f"rotary: cos and sin have {cos.shape[0]} positions, fewer than the {q.shape[-3]} of q")


def _check_positions(q, positions, offset, cu_seqlens):
    if cu_seqlens is not None or isinstance(offset, Tensor) or offset:
        raise ValueError("rotary: positions say all; give them, or cu_seqlens and offset, not both")
    if positions.dtype != torch.int64:
        raise TypeError(f"rotary: positions must be int64, got {positions.dtype}")
    total, rows = q.shape[-3:-2], q.shape[:-2]
    if positions.shape not in (total, rows):
        shapes = f"{list(total)} or {list(rows)}" if q.ndim == 4 else f"{list(total)}"
        raise ValueError(f"rotary: positions must be {shapes}, got {list(positions.shape)}")


def _check_places(q, table, offset, cu_seqlens):
    if cu_seqlens is not None:
        if q.ndim != 3:
            raise ValueError(f"rotary: cu_seqlens is for packed q [total, heads, Dh], got q {list(q.shape)}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"rotary: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < (2 if q.shape[0] else 1):
            raise ValueError(
                f"rotary: cu_seqlens must be [B + 1], the cumulative lengths from 0 to {q.shape[0]}, got {list(cu_seqlens.shape)}"
            )
    if isinstance(offset, Tensor):
        if offset.dtype != torch.int64:
            raise TypeError(f"rotary: offset must be an int or an int64 tensor, got {offset.dtype}")
        B = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else q.shape[0] if q.ndim == 4 else 1
        if offset.shape not in ((), (B,)):
            raise ValueError(f"rotary: offset must be an int, 0-d or [{B}], one per sequence, got {list(offset.shape)}")
    elif not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"rotary: offset must be an int or an int64 tensor, got {type(offset).__name__}")
    elif cu_seqlens is None and not 0 <= offset <= table - q.shape[-3]:
        raise ValueError(
            f"rotary: cos and sin have {table} positions, too few for the {q.shape[-3]} of q from offset {offset} on"
        )


def _check_values(q, table, positions, offset, cu_seqlens):
    """On the CPU, where it costs no synchronisation. Not under torch.compile or a transform, where there are no values."""
    if positions is not None:
        if can_read(positions) and positions.numel():
            _check_inside(*(int(t) for t in positions.aminmax()), table)
        return
    lengths, begins = [q.shape[-3]], None if cu_seqlens is None else host_values(cu_seqlens)
    if begins is not None:
        lengths = [b - a for a, b in zip(begins, begins[1:])]
        if begins[0] != 0 or begins[-1] != q.shape[0] or min(lengths, default=0) < 0:
            raise ValueError(f"rotary: cu_seqlens must rise from 0 to {q.shape[0]}, the rows of q, got {begins}")
    first = host_values(offset) if isinstance(offset, Tensor) else offset
    if first is None or (cu_seqlens is not None and begins is None) or not q.numel():
        return
    first = first if isinstance(first, list) else [first] * len(lengths)
    lengths = lengths if cu_seqlens is not None else lengths * len(first)
    ends = [(low, low + length - 1) for low, length in zip(first, lengths) if length]
    _check_inside(min(low for low, _ in ends), max(high for _, high in ends), table)


def _check_inside(low, high, table):
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
    offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotates pairs of elements of q and k by the angle of their position: (a, b) -> (a cos - b sin, b cos + a sin).

    The position of a token is its index in its sequence plus `offset`, unless `positions` says it.

    Args:
        q: [B, S, H, Dh] or packed [total, H, Dh], fp16, bf16, fp32 (any float dtype on the reference), any strides: views of
            one fused product are read where they lie.
        k: [B, S, H_kv, Dh] or [total, H_kv, Dh], dtype of q.
        cos, sin: [S_max, R/2] fp32 with R <= Dh: row p holds the angles of position p, column i that of pair i. Elements
            R, R+1, ... of each head are passed through. Constants: they get no gradient.
        interleaved: False pairs elements (i, i + R/2) (Llama, NeoX), True (2 i, 2 i + 1) (GPT-J).
        positions: int64 [S] or [B, S] ([total] if packed), the row of cos and sin for each token.
        offset: the position of the first token: what a cache holds already, or where this rank's part of the sequence
            begins. An int, or int64 on q's device: 0-d, or [B], one per sequence.
        cu_seqlens: int32 or int64 [B + 1], from 0 to total: sequences packed one behind the other, for packed q; None: they
            are one sequence.
        backend: "auto", "reference", "torch" or "triton".

    Values that lead outside the table are an error on the CPU, and clamped to it on a GPU, where looking would stall it, and
    under torch.compile; likewise a cu_seqlens that does not rise from 0 to total is an error on the CPU only.

    Returns:
        The rotated (q, k), of the shapes and dtypes of q and k, in new memory; computed in fp32. For a few tokens, without
        gradients and on the CPU, the two are views of one new tensor, its first and its last heads, not contiguous each (a
        copy of k would cost such a call 3 to 5 %). The backward is the rotation by minus the angle. Under autocast dtypes
        are kept. The kernel allocates nothing but the two.

    Raises:
        ValueError: shapes that do not fit, positions together with offset or cu_seqlens, positions outside the table, an
        unknown or unsupported backend. TypeError: q and k are not of one floating dtype, cos or sin is not fp32, positions
        or offset are not int64, cu_seqlens is not int32 or int64.

    Backends: triton on compute capability >= 8.0. Paper: Su et al. 2021, arXiv:2104.09864.
    """
    _check(q, k, cos, sin, positions, offset, cu_seqlens)
    backend = OP.choose(backend, q, k, cos, sin)
    starts, shift = (offset, 0) if isinstance(offset, Tensor) else (None, offset)
    if positions is not None or starts is not None or cu_seqlens is not None:
        _check_values(q, cos.shape[0], positions, offset, cu_seqlens)
    packed = q.ndim == 3
    if packed:
        q, k = q[None], k[None]
    if backend in OP.plain_forms:
        q, k = OP.plain(backend, q, k, cos, sin, interleaved, positions, shift, starts, cu_seqlens)
    else:
        q, k = OP.forward(q, k, cos, sin, positions, interleaved, shift, starts, cu_seqlens, backend)
    return (q[0], k[0]) if packed else (q, k)
