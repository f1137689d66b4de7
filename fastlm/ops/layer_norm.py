"""Layer normalisation, with an optional fused residual add."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._op import Op, compute_dtype, grad_of


def _reference(x, weight, bias, eps, residual=None):
    if residual is not None:
        dtype = compute_dtype(residual)
        residual_out = (x.to(dtype) + residual.to(dtype)).to(residual.dtype)
        return _normalised(residual_out, weight, bias, eps).to(x.dtype), residual_out
    return _normalised(x, weight, bias, eps).to(x.dtype)


def _normalised(x, weight, bias, eps):
    dtype = compute_dtype(x)
    centred = x.to(dtype)
    centred = centred - centred.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.to(dtype)
    return y if bias is None else y + bias.to(dtype)


def _torch(x, weight, bias, eps, residual=None):
    if residual is not None:
        residual_out = residual + x if residual.dtype == x.dtype else (residual.float() + x.float()).to(residual.dtype)
        return _torch(residual_out, weight, bias, eps).to(x.dtype), residual_out
    if _native(x, [t for t in (weight, bias) if t is not None]):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = compute_dtype(x)
    weight, bias = (t if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(x.dtype)


def _native(x, parameters):
    """Whether F.layer_norm gets its arguments as they are, or in fp32."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        # Its CPU backward sums dweight and dbias in 16 bits (dbias of 1024 rows was off by 25 %). Its forward is right, and
        # takes fp32 parameters.
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        return not trained and (
            all(p.dtype == x.dtype for p in parameters) or all(p.dtype == torch.float32 for p in parameters)
        )
    return all(p.dtype == x.dtype for p in parameters)


def _supports(backend, x, weight, bias, residual):
    if backend == "triton" and x.shape[-1] > 65536:
        return f"its rows are at most 65536 wide, got {x.shape[-1]}"
    return None


OP = Op(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str backend)"
    " -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)",
    "(Tensor dy, Tensor? dresidual_out, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " bool need_dweight, bool need_dbias, float eps, str backend) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    reference=_reference,
    torch=_torch,
    kernels={"triton": ("layer_norm:layer_norm_fwd", "layer_norm:layer_norm_bwd")},
    supports=_supports,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _fake_forward(x, weight, bias, residual, eps, backend):
    sum_shape, sum_dtype = (0, x.dtype) if residual is None else (x.shape, residual.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(sum_shape, dtype=sum_dtype),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    )


def _fake_backward(dy, dresidual_out, x, weight, bias, mean, rstd, need_dweight, need_dbias, eps, backend):
    return x.new_empty(x.shape), *(
        x.new_empty(x.shape[-1] if need else 0, dtype=(x if t is None else t).dtype)
        for need, t in ((need_dweight, weight), (need_dbias, bias))
    )


OP.fake(_fake_forward, _fake_backward)


@OP.autograd
class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, backend):
        y, residual_out, mean, rstd = OP.below(x, weight, bias, residual, eps, backend)
        # bias is kept for its dtype alone.
        ctx.save_for_backward(x if residual is None else residual_out, weight, bias, mean, rstd)
        ctx.x_dtype, ctx.eps, ctx.backend, ctx.has_residual = x.dtype, eps, backend, residual is not None
        ctx.mark_non_differentiable(*((mean, rstd) if residual is not None else (residual_out, mean, rstd)))
        ctx.set_materialize_grads(False)
        return y, residual_out, mean, rstd

    @staticmethod
    def backward(ctx, dy, dresidual_out, *_):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros(x.shape, dtype=ctx.x_dtype, device=x.device)
        need_dweight = weight is not None and ctx.needs_input_grad[1]
        need_dbias = bias is not None and ctx.needs_input_grad[2]
        dx, dweight, dbias = OP.backward(
            dy, dresidual_out, x, weight, bias, mean, rstd, need_dweight, need_dbias, ctx.eps, ctx.backend
        )
        dweight, dbias = dweight if need_dweight else None, dbias if need_dbias else None
        return dx.to(ctx.x_dtype), dweight, dbias, dx if ctx.has_residual else None, None, None


@OP.backward_reference
def _backward_reference(dy, dresidual_out, x, weight, bias, mean, rstd, need_dweight, need_dbias, eps, backend):
    # x is the sum that was normalised, so the residual's own gradient is simply added.
    dx, dweight, dbias = grad_of(lambda a, w, b: _normalised(a, w, b, eps).to(dy.dtype), (x, weight, bias), (dy,))
    if dresidual_out is not None:
        dx = dx + dresidual_out
    _, no_dweight, no_dbias = _fake_backward(dy, None, x, weight, bias, mean, rstd, False, False, eps, backend)
    return dx, dweight if need_dweight else no_dweight, dbias if need_dbias else no_dbias


def _shard_forward(x, weight, bias, residual, eps, backend):
    from torch.distributed.tensor import Replicate, Shard

    def rule(place):
        sum_place = Replicate() if residual is None else place
        parameters = [None if t is None else Replicate() for t in (weight, bias)]
        return (
            [place, sum_place, place, place],
            [place, *parameters, None if residual is None else place, None, None],
        )

    return [rule(Replicate()), *(rule(Shard(d)) for d in range(x.ndim - 1))]


def _shard_backward(dy, dresidual_out, x, weight, bias, mean, rstd, need_dweight, need_dbias, eps, backend):
    from torch.distributed.tensor import Partial, Replicate, Shard

    def rule(place, summed):
        outputs = [place, *(summed if need else Replicate() for need in (need_dweight, need_dbias))]
        parameters = [None if t is None else Replicate() for t in (weight, bias)]
        inputs = [place, None if dresidual_out is None else place, place, *parameters, place, place]
        return outputs, [*inputs, None, None, None, None]

    return [rule(Replicate(), Replicate()), *(rule(Shard(d), Partial()) for d in range(x.ndim - 1))]


OP.sharding(_shard_forward, _shard_backward)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension; with `residual`, of x + residual.

    Args:
        x: [..., N], fp16, bf16, fp32 (any float dtype on the reference), any strides.
        weight: [N], any float dtype, or None for no scale.
        bias: [N], any float dtype, or None for no shift.
        eps: added to the variance (the biased one, divided by N).
        residual: [..., N], shape of x, any float dtype: added to x first (a transformer's residual stream, which may be
            kept in fp32 while x is bf16).
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        y [..., N] in x's dtype; with `residual` the pair (y, residual_out), residual_out = x + residual in residual's dtype,
        which is also what gets normalised. Sums are taken in fp32. Under autocast dtypes are kept.

    Raises:
        ValueError: shapes that do not fit, an unknown or unsupported backend. TypeError: x is not floating point.

    Backends: triton on compute capability >= 8.0, N <= 65536. Paper: Ba, Kiros and Hinton 2016, arXiv:1607.06450.
    """
    if not x.is_floating_point():
        raise TypeError(f"layer_norm: x must be floating point, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("layer_norm: x must have at least one dimension, got a scalar")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != x.shape[-1:]:
            raise ValueError(f"layer_norm: {name} must be [{x.shape[-1]}] like x's last dimension, got {list(t.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"layer_norm: residual must have x's shape {list(x.shape)}, got {list(residual.shape)}")
    backend = OP.choose(backend, x, weight, bias, residual)
    if backend in OP.plain_forms:
        return OP.plain(backend, x, weight, bias, eps, residual)
    y, residual_out, _, _ = OP.forward(x, weight, bias, residual, eps, backend)
    return y if residual is None else (y, residual_out)
