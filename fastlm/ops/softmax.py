"""softmax of scaled and masked scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlm.ops._cuda import not_measured
from fastlm.ops._native import softmax_gradient
from fastlm.ops._op import Op, at_once
from fastlm.ops._tensor import can_read, compute_dtype, is_batched
from fastlm.ops.number_checks import LARGEST, check_number

_WIDEST = 262144
_FEW = 1 << 14  # elements up to which autograd's own steps cost less than a Function of Python
_BLOCK = 1 << 18  # elements of a block of 16-bit rows of the torch form


def _reference(x, mask, scale):
    dtype = compute_dtype(x)
    s = x.to(dtype) * scale
    if mask is None:
        return torch.softmax(s, -1).to(x.dtype)
    s = s.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else s + mask.to(dtype)
    dead = (s == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0).to(x.dtype)


def _torch(x, mask, scale):
    if mask is None and scale == 1:
        return torch.softmax(x, -1)
    if not can_read(x) or x.numel() == 0:
        return _reference(x, mask, scale)
    if mask is None and x.element_size() == 2 and abs(math.frexp(scale)[0]) == 0.5 and abs(scale) <= 1:
        return torch.softmax(x * scale, -1)  # a power of two rounds nothing
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _values(x, mask, scale)
    if x.numel() > _FEW:
        return _OnCPU.apply(x, mask, scale)
    return _differentiable(x, mask, scale)


def _differentiable(x, mask, scale):
    """The formula, but for the care for rows of nothing but -inf where there is none."""
    wide = compute_dtype(x)
    s = x.to(wide) * scale
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else s + mask.to(wide)
    y = torch.softmax(s, -1)
    return _reference(x, mask, scale) if mask is not None and _nan_in(y.detach()) else y.to(x.dtype)


def _nan_in(y):
    """Whether a row of y is NaN: hidden altogether, or its scores are."""
    return math.isnan(y.select(-1, 0).sum().item())


def _blocks(*tensors):
    """The tensors, of one shape (or None), in blocks of rows that stay in the cache when they are widened."""
    shape, count = tensors[0].shape, tensors[0].numel()
    if count <= _BLOCK or len(shape) == 1:
        yield tensors
        return
    step = _BLOCK * shape[0] // count
    for i in range(0, shape[0], max(step, 1)):
        part = [t if t is None else t[i : i + step] if step else t[i] for t in tensors]
        yield from (part,) if step else _blocks(*part)


def _values(x, mask, scale):
    """softmax by way of scores in fp32: what a mask or a scale makes of 16-bit x need not fit into 16 bits. In place in them."""
    wide = compute_dtype(x)
    added = mask
    if mask is not None and mask.dtype == torch.bool and 4 * mask.numel() <= x.numel():
        # An addition costs a tenth of a masked_fill. It leaves NaN and inf of what is hidden, which are seen to below.
        added = x.new_zeros(mask.shape, dtype=wide).masked_fill_(~mask, float("-inf"))
    elif mask is not None and mask.dtype != torch.bool:
        added = mask.to(wide)
    if wide == x.dtype:
        return _block_values(x, added, scale, wide, mask)
    if x.numel() <= _BLOCK:
        y = _block_values(x, added, scale, wide, mask)
        return y.bfloat16() if x.dtype is torch.bfloat16 else y.to(x.dtype)
    y = x.new_empty(x.shape)
    wholes = (t if t is None else t.expand(x.shape) for t in (added, mask))
    for part, m, hidden, out in _blocks(x, *wholes, y):
        out.copy_(_block_values(part, m, scale, wide, hidden))
    return y


def _block_values(x, added, scale, wide, mask):
    s = x.to(wide)
    if added is None or added.dtype == torch.bool:
        s = s * scale if s is x else s.mul_(scale)
        if added is not None:
            s.masked_fill_(~added, float("-inf"))
    else:
        s = torch.add(added, s, alpha=scale, out=None if s is x else s)
    s = s if s.is_contiguous() else s.contiguous()
    y = torch.softmax(s, -1, out=s)
    return _reference(x, mask, scale) if mask is not None and _nan_in(y) else y


class _OnCPU(torch.autograd.Function):
    """_values, and torch's own backward of softmax, which reads y alone. What is hidden gets no gradient: y is 0 there."""

    @staticmethod
    def forward(ctx, x, mask, scale):
        y = _values(x, mask, scale)
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(dy):
            return _backward_reference(dy, y, ctx.scale, None), None, None
        dx = softmax_gradient(dy, y)
        return dx if ctx.scale == 1 else dx.mul_(ctx.scale), None, None


def _supports(backend, x, mask):
    if backend in ("triton", "cuda"):
        if x.shape[-1] > _WIDEST and backend == "triton":
            return f"its rows are at most {_WIDEST} wide, got {x.shape[-1]}"
        if x.numel() >= (x.shape[-1] or 1) * 2**31:
            return f"its rows are numbered in 32 bits: fewer than 2^31 of them, got x {list(x.shape)}"
    return None


OP = Op(
    "softmax",
    "(Tensor x, Tensor? mask, float scale, str backend) -> Tensor",
    "(Tensor dy, Tensor y, float scale, str backend) -> Tensor",
    reference=_reference,
    torch=_torch,
    kernels={"triton": ("softmax:softmax_fwd", "softmax:softmax_bwd"), "cuda": ("softmax_fwd", "softmax_bwd")},
    supports=_supports,
    slower=not_measured,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)
OP.fake(lambda x, mask, scale, backend: x.new_empty(x.shape), lambda dy, y, scale, backend: y.new_empty(y.shape))


@OP.autograd
class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, scale, backend):
        y = OP.below(x, mask, scale, backend)
        ctx.save_for_backward(y)
        ctx.scale, ctx.backend = scale, backend
        return y

    @staticmethod
    def backward(ctx, dy):
        return OP.backward(dy, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None, None


@OP.backward_reference
def _backward_reference(dy, y, scale, backend):
    wide = y.to(compute_dtype(y))
    dy = dy.to(wide.dtype)
    return (scale * wide * (dy - (dy * wide).sum(-1, keepdim=True))).to(y.dtype)


def _shard_forward(x, mask, scale, backend):
    from torch.distributed.tensor import Replicate, Shard

    def rule(d):
        if d is None:
            return [Replicate()], [Replicate(), None if mask is None else Replicate(), None, None]
        at = None if mask is None else d - x.ndim + mask.ndim  # the mask's own dimension, if it has one there
        whole = mask is not None and (at < 0 or mask.shape[at] == 1)
        return [Shard(d)], [Shard(d), None if mask is None else Replicate() if whole else Shard(at), None, None]

    return [rule(None), *(rule(d) for d in range(x.ndim - 1))]


def _shard_backward(dy, y, scale, backend):
    from torch.distributed.tensor import Replicate, Shard

    return [([place], [place, place, None, None]) for place in (Replicate(), *(Shard(d) for d in range(y.ndim - 1)))]


OP.sharding(_shard_forward, _shard_backward)


def _check(x, dim, mask):
    if not x.is_floating_point():
        raise TypeError(f"softmax: x must be floating point, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("softmax: x must have at least one dimension, got a scalar")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"softmax: dim must lie in [{-x.ndim}, {x.ndim}) for x {list(x.shape)}, got {dim}")
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"softmax: mask must be boolean (True is kept) or floating point (added), got {mask.dtype}")
    shape = list(x.shape)
    if mask.ndim > x.ndim or any(m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(shape))):
        raise ValueError(f"softmax: mask must broadcast to x {shape}, got {list(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"softmax: mask must be on x's device {x.device}, got {mask.device}")
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("softmax: mask gets no gradient; pass mask.detach(), or add it to x for one that is learnt")


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * x + mask) over `dim`.

    Args:
        x: any shape, fp16, bf16, fp32 (any float dtype on the reference), any strides; over another dimension than the last
            the kernels work on a copy.
        dim: the dimension that sums to 1.
        scale: a number.
        mask: broadcastable to x: boolean, True where an element takes part, or floating point, added to scale * x. It is
            read at its own size, never at x's (unless x has five dimensions or more, and it broadcasts along some of them by
            turns, as [2, 1, 2, V] along x [2, 2, 3, 2, V]: then a copy of x's size may be made). Gets no gradient.
        backend: "auto", "reference", "torch", "triton" or "cuda".

    Returns:
        y of x's shape and dtype, computed in fp32. A row of which the mask hides everything (False, or -inf) gives 0, and
        zero gradients. Under autocast x's dtype is kept.

    Raises:
        ValueError: dim outside x, a mask that does not broadcast to x, lies elsewhere or requires a gradient, an unknown or
        unsupported backend. TypeError: x is not floating point, mask is neither boolean nor floating point.

    Backends: triton on compute capability >= 8.0, fewer than 2^31 rows of at most 262144; cuda likewise, rows of any width, not
    chosen by "auto". Paper: Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    now = at_once(backend, x)
    plain = now and mask is None and dim == -1 and x.dtype is torch.float32 and x.ndim and type(scale) is float
    plain = plain and -LARGEST <= scale <= LARGEST
    if plain and not (x.requires_grad and torch.is_grad_enabled()):
        return torch.softmax(x if scale == 1 else x * scale, -1)  # what _torch comes to
    _check(x, dim, mask)
    check_number("softmax", "scale", scale)
    dim = dim if dim < 0 else dim - x.ndim
    if dim != -1:
        if mask is not None and mask.ndim >= -dim:
            mask = mask.movedim(dim, -1)
        elif mask is not None:  # it says the same for every element along dim
            mask = mask.expand(*[1] * (-dim - mask.ndim), *mask.shape).movedim(dim, -1)
        return softmax(x.movedim(dim, -1), scale=scale, mask=mask, backend=backend).movedim(-1, dim)
    if now:
        return _torch(x, mask, scale)
    backend = OP.choose(backend, x, mask)
    if backend in OP.plain_forms:
        return OP.plain(backend, x, mask, scale)
    return OP.forward(x, mask, scale, backend)
