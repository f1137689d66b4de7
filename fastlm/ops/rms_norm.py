"""RMS normalisation, with an optional fused residual add."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._op import Op, compute_dtype, grad_of


def _reference(x, weight, eps, residual=None):
    dtype = compute_dtype(x if residual is None else residual)
    if residual is not None:
        residual_out = (x.to(dtype) + residual.to(dtype)).to(residual.dtype)
        return _reference(residual_out, weight, eps).to(x.dtype), residual_out
    xf = x.to(dtype)
    y = xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(dtype)).to(x.dtype)


def _torch(x, weight, eps, residual=None):
    if residual is not None:
        residual_out = residual + x if residual.dtype == x.dtype else (residual.float() + x.float()).to(residual.dtype)
        return _torch(residual_out, weight, eps).to(x.dtype), residual_out
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.rms_norm(x, x.shape[-1:], weight if weight is None else weight.to(x.dtype), eps)
    return _Norm.apply(x, weight, eps)


class _Norm(torch.autograd.Function):
    """The torch form with a backward of its own, in few passes: F.rms_norm's composite one took three times as long on the
    CPU (1024 x 384, fp32, one thread: forward 0.57 ms instead of 0.82, backward 0.76 instead of 2.35)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(compute_dtype(x))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(max(x.shape[-1], 1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps = eps
        y = wide * rstd
        return (y if weight is None else y.mul_(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: rstd is a constant here, the formula knows better
            return *grad_of(lambda x, w: _reference(x, w, ctx.eps), (x, weight), (dy,)), None
        normed = x.to(rstd.dtype) * rstd
        dy = dy.to(rstd.dtype)
        product = dy * normed
        dweight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dot = product.sum(-1) if weight is None else product @ weight.to(rstd.dtype)
        dx = normed.mul_(dot.div_(-max(x.shape[-1], 1)).unsqueeze(-1))
        dx = dx.add_(dy) if weight is None else dx.addcmul_(dy, weight)
        return dx.mul_(rstd).to(x.dtype), dweight, None


def _supports(backend, x, weight, residual):
    if backend == "triton" and x.shape[-1] > 65536:
        return f"its rows are at most 65536 wide, got {x.shape[-1]}"
    return None


OP = Op(
    "rms_norm",
    "(Tensor x, Tensor? weight, Tensor? residual, float eps, str backend) -> (Tensor y, Tensor residual_out, Tensor rstd)",
    "(Tensor dy, Tensor? dresidual_out, Tensor x, Tensor? weight, Tensor rstd, bool need_dweight, float eps, str backend)"
    " -> (Tensor dx, Tensor dweight)",
    reference=_reference,
    torch=_torch,
    kernels={"triton": ("rms_norm:rms_norm_fwd", "rms_norm:rms_norm_bwd")},
    supports=_supports,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _fake_forward(x, weight, residual, eps, backend):
    sum_shape, sum_dtype = (0, x.dtype) if residual is None else (x.shape, residual.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(sum_shape, dtype=sum_dtype),
        x.new_empty(x.numel() // max(x.shape[-1], 1), dtype=torch.float32),
    )


def _fake_backward(dy, dresidual_out, x, weight, rstd, need_dweight, eps, backend):
    dtype = x.dtype if weight is None else weight.dtype
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if need_dweight else 0, dtype=dtype)


OP.fake(_fake_forward, _fake_backward)


@OP.autograd
class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, eps, backend):
        y, residual_out, rstd = OP.below(x, weight, residual, eps, backend)
        ctx.save_for_backward(x if residual is None else residual_out, weight, rstd)
        ctx.x_dtype, ctx.eps, ctx.backend, ctx.has_residual = x.dtype, eps, backend, residual is not None
        ctx.mark_non_differentiable(*((rstd,) if residual is not None else (residual_out, rstd)))
        ctx.set_materialize_grads(False)
        return y, residual_out, rstd

    @staticmethod
    def backward(ctx, dy, dresidual_out, _):
        x, weight, rstd = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros(x.shape, dtype=ctx.x_dtype, device=x.device)
        need_dweight = weight is not None and ctx.needs_input_grad[1]
        dx, dweight = OP.backward(dy, dresidual_out, x, weight, rstd, need_dweight, ctx.eps, ctx.backend)
        return dx.to(ctx.x_dtype), dweight if need_dweight else None, dx if ctx.has_residual else None, None, None


@OP.backward_reference
def _backward_reference(dy, dresidual_out, x, weight, rstd, need_dweight, eps, backend):
    # x is the sum that was normalised, so the residual's own gradient is simply added.
    dx, dweight = grad_of(lambda a, w: _reference(a, w, eps).to(dy.dtype), (x, weight), (dy,))
    if dresidual_out is not None:
        dx = dx + dresidual_out
    return dx, dweight if need_dweight else x.new_empty(0, dtype=x.dtype if weight is None else weight.dtype)


def _shard_forward(x, weight, residual, eps, backend):
    from torch.distributed.tensor import Replicate, Shard

    def rule(place):
        stats = Shard(0) if isinstance(place, Shard) else place
        sum_place = Replicate() if residual is None else place
        none_or = [None if weight is None else Replicate(), None if residual is None else place]
        return [place, sum_place, stats], [place, *none_or, None, None]

    # rstd is flat, so only a split of the first dimension maps onto it.
    return [rule(Replicate())] + ([rule(Shard(0))] if x.ndim > 1 else [])


def _shard_backward(dy, dresidual_out, x, weight, rstd, need_dweight, eps, backend):
    from torch.distributed.tensor import Partial, Replicate, Shard

    def rule(place, dweight):
        inputs = [
            place,
            None if dresidual_out is None else place,
            place,
            None if weight is None else Replicate(),
            place,
        ]
        return [place, dweight if need_dweight else Replicate()], [*inputs, None, None, None]

    return [rule(Replicate(), Replicate())] + ([rule(Shard(0), Partial())] if x.ndim > 1 else [])


OP.sharding(_shard_forward, _shard_backward)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension; with `residual`, of x + residual.

    Args:
        x: [..., N], fp16, bf16, fp32 (any float dtype on the reference), any strides.
        weight: [N], any float dtype, or None for no scale.
        eps: added to the mean square.
        residual: [..., N], shape of x, any float dtype: added to x first (a transformer's residual stream, which may be
            kept in fp32 while x is bf16).
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        y [..., N] in x's dtype; with `residual` the pair (y, residual_out), residual_out = x + residual in residual's dtype,
        which is also what gets normalised. Sums are taken in fp32. Under autocast dtypes are kept.

    Raises:
        ValueError: shapes that do not fit, an unknown or unsupported backend. TypeError: x is not floating point.

    Backends: triton on compute capability >= 8.0, N <= 65536. Paper: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if not x.is_floating_point():
        raise TypeError(f"rms_norm: x must be floating point, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("rms_norm: x must have at least one dimension, got a scalar")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must be [{x.shape[-1]}] like x's last dimension, got {list(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm: residual must have x's shape {list(x.shape)}, got {list(residual.shape)}")
    backend = OP.choose(backend, x, weight, residual)
    if backend in OP.plain_forms:
        return OP.plain(backend, x, weight, eps, residual)
    y, residual_out, _ = OP.forward(x, weight, residual, eps, backend)
    return y if residual is None else (y, residual_out)
