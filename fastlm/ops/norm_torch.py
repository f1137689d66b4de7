"""The torch form of the norms (the CPU's default): torch's own kernels where they mean the same, else few passes over memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm.ops._op import compute_dtype, grad_of
from fastlm.ops.norm_reference import dropped, normalised

# Elements up to which F.rms_norm's composite of many small calls costs less than a Function of Python: [rows, 64] fp32 on one
# thread, forward and backward, see benchmarks/results.
_FEW = 1 << 13


class _Dropped(torch.autograd.Function):
    """x.to(dtype) after dropout. Linear and its own transpose, so the backward needs the seed alone."""

    @staticmethod
    def forward(ctx, x, seed, p, dtype):
        ctx.save_for_backward(seed)
        ctx.p, ctx.dtype = p, x.dtype
        return dropped(x.to(compute_dtype(x)), seed, p).to(dtype)

    @staticmethod
    def backward(ctx, dy):
        return _Dropped.apply(dy, *ctx.saved_tensors, ctx.p, ctx.dtype), None, None, None


def _added(x, residual, seed, p):
    """dropout(x) + residual, in residual's dtype if there is one."""
    if seed is not None:
        wide = compute_dtype(x)
        compiling = torch.compiler.is_compiling()
        x = dropped(x.to(wide), seed, p) if compiling else _Dropped.apply(x, seed, p, wide)
    if residual is None:
        return x
    if residual.dtype == x.dtype:
        return residual + x
    wide = compute_dtype(residual)
    return (residual.to(wide) + x.to(wide)).to(residual.dtype)


def norm_torch(norm, x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p):
    """The torch form of rms_norm or layer_norm, whose own part is `norm` (rms or layer below)."""
    rounding = x.dtype if llama and x.dtype != compute_dtype(x) else None
    if residual is None and seed is None:
        return norm(x, weight, bias, eps, weight_offset, rounding)
    total, out = _added(x, residual, seed, dropout_p), x.dtype
    y = norm(total, weight, bias, eps, weight_offset, rounding)
    y = y if y.dtype == out else y.to(out)
    return y if residual is None else (y, total)


def rms(x, weight, bias, eps, weight_offset, rounding):
    """RMSNorm of x, in x's dtype."""
    if bias is None and not weight_offset and rounding is None and (weight is None or weight.dtype == x.dtype):
        if x.numel() <= _FEW or torch.compiler.is_compiling():
            return F.rms_norm(x, x.shape[-1:], weight, eps)
    elif torch.compiler.is_compiling():
        return normalised(x, weight, bias, eps, weight_offset, rounding, False).to(x.dtype)
    return _RMS.apply(x, weight, bias, eps, weight_offset, rounding)


class _RMS(torch.autograd.Function):
    """In few passes: F.rms_norm's composite took three times as long on the CPU (1024 x 384, fp32, one thread: forward
    0.57 ms instead of 0.82, backward 0.76 instead of 2.35)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, weight_offset, rounding):
        wide = x.to(compute_dtype(x))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(max(x.shape[-1], 1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, bias, rstd)
        ctx.eps, ctx.weight_offset = eps, weight_offset
        y = wide * rstd
        if rounding is not None:
            y = y.to(rounding).to(wide.dtype)
        if weight is not None:
            y.mul_(weight.to(wide.dtype) + weight_offset if weight_offset else weight)
        if bias is not None:
            y.add_(bias)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: rstd is a constant here, the formula knows better
            formula = lambda x, w, b: normalised(x, w, b, ctx.eps, ctx.weight_offset, None, False).to(x.dtype)  # noqa: E731
            return *grad_of(formula, (x, weight, bias), (dy,)), None, None, None
        need = ctx.needs_input_grad
        normed = x.to(rstd.dtype) * rstd
        dy = dy.to(rstd.dtype)
        dbias = _over_rows(dy).to(bias.dtype) if bias is not None and need[2] else None
        if weight is None:
            dweight, dot = None, torch.linalg.vecdot(dy, normed)
        else:
            product = dy * normed
            dweight = _over_rows(product).to(weight.dtype) if need[1] else None
            weight = weight.to(rstd.dtype)
            weight = weight + ctx.weight_offset if ctx.weight_offset else weight
            dot = product @ weight
        dx = normed.mul_(dot.div_(-max(x.shape[-1], 1)).unsqueeze(-1))
        dx = dx.add_(dy) if weight is None else dx.addcmul_(dy, weight)
        return dx.mul_(rstd).to(x.dtype), dweight, dbias, None, None, None


def _over_rows(x):
    """The sum of all rows of x."""
    return x if x.ndim == 1 else x.flatten(0, -2).sum(0)


def layer(x, weight, bias, eps, weight_offset, rounding):
    """LayerNorm of x, in x's dtype."""
    if rounding is not None:
        return _rounded_layer(x, weight, bias, eps, weight_offset, rounding)
    if weight_offset and weight is not None:
        weight = weight.to(compute_dtype(weight)) + weight_offset
    dtype = x.dtype
    if x.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling():
        return _layer16(x, weight, bias, eps)
    if (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = compute_dtype(x)
    weight, bias = (t if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(dtype)


def _rounded_layer(x, weight, bias, eps, weight_offset, rounding):
    wide = compute_dtype(x)
    y = F.layer_norm(x.to(wide), x.shape[-1:], None, None, eps).to(rounding).to(wide)
    if weight is not None:
        y = y * (weight.to(wide) + weight_offset)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _layer16(x, weight, bias, eps):
    """16 bits on the CPU. F.layer_norm's forward is right there and takes fp32 parameters; its backward sums dweight and
    dbias in 16 bits (dbias of 1024 rows was off by 25 %)."""
    if weight is None and bias is None:
        weight = torch.ones(x.shape[-1])  # an fp32 parameter keeps the statistics in fp32
    trained = any(t is not None and t.requires_grad for t in (weight, bias))
    if trained and torch.is_grad_enabled():
        return _Layer16.apply(x, weight, bias, eps)
    weight, bias = (t if t is None else t.float() for t in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


class _Layer16(torch.autograd.Function):
    """torch's own kernels, forward on 16 bits and backward in fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        weight32, bias32 = (t if t is None else t.float() for t in (weight, bias))
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight32, bias32, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            formula = lambda x, w, b: normalised(x, w, b, ctx.eps, 0.0, None, True).to(x.dtype)  # noqa: E731
            return *grad_of(formula, (x, weight, bias), (dy,)), None
        need = ctx.needs_input_grad
        weight32, bias32 = (t if t is None else t.float() for t in (weight, bias))
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dy.float(), x.float(), x.shape[-1:], mean.float(), rstd.float(), weight32, bias32, need[:3]
        )
        dx, dweight, dbias = (g if g is None else g.to(x.dtype if t is None else t.dtype)
                              for g, t in ((dx, x), (dweight, weight), (dbias, bias)))  # fmt: skip
        return dx, dweight, dbias, None
