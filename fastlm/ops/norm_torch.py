"""The torch form of the norms (the CPU's default): torch's own kernels where they mean the same, else few passes over memory."""

from __future__ import annotations

import torch

from fastlm.ops._op import compute_dtype, grad_of
from fastlm.ops.norm_reference import dropped, normalised

# Elements up to which torch's composites of many small calls cost less than a Function of Python: with a backward, and for
# the forward of RMSNorm alone. Found with rows of 64 and 768 on one thread.
_FEW, _FEW_FORWARD = 40_000, 1 << 19
_BLOCK = 1 << 18  # elements of a block of rows on one thread


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


def _with_sum(norm, x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p):
    """The norm of dropout(x) + residual."""
    total, out = _added(x, residual, seed, dropout_p), x.dtype
    # A residual narrower than x must not round y: what is normalised holds both dtypes.
    s = total if total.dtype == out else total.to(torch.promote_types(total.dtype, out))
    y = norm(s, weight, bias, eps, weight_offset, _rounding(x, llama))
    y = y if y.dtype == out else y.to(out)
    return y if residual is None else (y, total)


def _rounding(x, llama):
    """The dtype to which the normalised x is rounded before it is scaled, or None."""
    return x.dtype if llama and x.dtype != compute_dtype(x) else None


def rms_norm_torch(x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p):
    """The torch form of rms_norm; arguments of norm_reference."""
    if residual is None and seed is None:
        return _rms(x, weight, bias, eps, weight_offset, _rounding(x, llama))
    return _with_sum(_rms, x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p)


def layer_norm_torch(x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p):
    """The torch form of layer_norm; arguments of norm_reference."""
    if residual is None and seed is None:
        return _layer(x, weight, bias, eps, weight_offset, _rounding(x, llama))
    return _with_sum(_layer, x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p)


def _rms(x, weight, bias, eps, weight_offset, rounding):
    """RMSNorm of x, in x's dtype."""
    with_grad = torch.is_grad_enabled()
    if bias is None and not weight_offset and rounding is None and (weight is None or weight.dtype == x.dtype):
        if x.numel() <= (_FEW if with_grad else _FEW_FORWARD) or not _may_block(x):
            return torch.rms_norm(x, x.shape[-1:], weight, eps)
    elif not _may_block(x):
        return normalised(x, weight, bias, eps, weight_offset, rounding, False).to(x.dtype)
    if with_grad:
        return _RMS.apply(x, weight, bias, eps, weight_offset, rounding)
    return _rms_values(x, weight, bias, eps, weight_offset, rounding)[0]


def _may_block(x):
    """Whether x can be worked on a block of rows at a time: not where that is hidden in a graph or on other processes."""
    return not torch.compiler.is_compiling() and x.numel() > 0 and type(x).__name__ != "DTensor"


def _blocks(*tensors):
    """The tensors [M, ...] in blocks of rows that, with what is computed from them, stay in the cache."""
    rows, n = tensors[0].shape
    step = rows
    if tensors[0].device.type == "cpu" and tensors[0].element_size() == 2:  # fp32 needs no copies to compute with
        step = max(1, _BLOCK * torch.get_num_threads() // max(n, 1))
    return zip(*(t.split(step) for t in tensors)) if step < rows else [tensors]


def _cast(t, dtype, offset=0.0):
    return t if t is None else t.to(dtype) + offset if offset else t.to(dtype)


def _rms_values(x, weight, bias, eps, weight_offset, rounding):
    """y in x's dtype and rstd [M, 1], in few passes; F.rms_norm's composite makes eight over all of memory."""
    rows, wide = x.reshape(-1, x.shape[-1]), compute_dtype(x)
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty((len(rows), 1), dtype=wide, device=x.device)
    scale, shift = _cast(weight, wide, weight_offset), _cast(bias, wide)
    for part, y_part, r in _blocks(rows, y, rstd):
        part = part.to(wide)
        torch.linalg.vector_norm(part, dim=-1, keepdim=True, out=r)
        r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        out = torch.mul(part, r, out=y_part) if x.dtype == wide else part.mul_(r)
        if rounding is not None:
            out = out.to(rounding).to(wide)
        if scale is not None:
            out.mul_(scale)
        if shift is not None:
            out.add_(shift)
        if out is not y_part:
            y_part.copy_(out)
    return y.view(x.shape), rstd


class _RMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, weight_offset, rounding):
        y, rstd = _rms_values(x, weight, bias, eps, weight_offset, rounding)
        ctx.save_for_backward(x, weight, bias, rstd)
        ctx.eps, ctx.weight_offset = eps, weight_offset
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: rstd is a constant here, the formula knows better
            formula = lambda x, w, b: normalised(x, w, b, ctx.eps, ctx.weight_offset, None, False).to(x.dtype)  # noqa: E731
            return *grad_of(formula, (x, weight, bias), (dy,)), None, None, None
        n, wide = x.shape[-1], rstd.dtype
        scale = _cast(weight, wide, ctx.weight_offset)
        need_dweight, need_dbias = (t is not None and ctx.needs_input_grad[i] for i, t in ((1, weight), (2, bias)))
        dweight = torch.zeros(n, dtype=wide, device=x.device) if need_dweight else None
        dbias = torch.zeros(n, dtype=wide, device=x.device) if need_dbias else None
        rows, dys = x.reshape(-1, n), dy.reshape(-1, n)
        dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        for part, d, r, out in _blocks(rows, dys, rstd, dx):
            normed, d = part.to(wide) * r, d.to(wide)
            product = d * normed
            if need_dbias:
                dbias += d.sum(0)
            if need_dweight:
                dweight += product.sum(0)
            along = product.sum(-1, keepdim=True) if scale is None else (product @ scale).unsqueeze(-1)
            found = normed.mul_(along.div_(-n))
            found = found.add_(d) if scale is None else found.addcmul_(d, scale)
            out.copy_(found.mul_(r)) if wide != x.dtype else torch.mul(found, r, out=out)
        dweight = dweight.to(weight.dtype) if need_dweight else None
        dbias = dbias.to(bias.dtype) if need_dbias else None
        return dx.view(x.shape), dweight, dbias, None, None, None


def _layer(x, weight, bias, eps, weight_offset, rounding):
    """LayerNorm of x, in x's dtype."""
    if rounding is not None:
        return _rounded_layer(x, weight, bias, eps, weight_offset, rounding)
    if weight_offset and weight is not None:
        weight = weight.to(compute_dtype(weight)) + weight_offset
    dtype = x.dtype
    in16 = dtype.itemsize == 2 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if weight is None and bias is not None and torch.is_grad_enabled():
        # torch.layer_norm with a bias alone: in 16 bits its backward raises, and its second derivative drops the weight's
        # part (torch 2.13).
        weight = torch.ones_like(bias, dtype=torch.float32 if in16 else None)
    if in16:
        return _layer16(x, weight, bias, eps)
    if (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype):
        return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = compute_dtype(x)
    return torch.layer_norm(x.to(wide), x.shape[-1:], _cast(weight, wide), _cast(bias, wide), eps).to(dtype)


def _rounded_layer(x, weight, bias, eps, weight_offset, rounding):
    wide = compute_dtype(x)
    y = torch.layer_norm(x.to(wide), x.shape[-1:], None, None, eps).to(rounding).to(wide)
    if weight is not None:
        y = y * (weight.to(wide) + weight_offset)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _layer16(x, weight, bias, eps):
    """16 bits on the CPU. F.layer_norm's forward is right there and takes fp32 parameters; its backward sums dweight and
    dbias in 16 bits (dbias of 1024 rows was off by 25 %)."""
    if not (torch.is_grad_enabled() and (x.requires_grad or _trained(weight) or _trained(bias))):
        if (weight is None or weight.dtype == x.dtype) and (bias is None or bias.dtype == x.dtype):
            return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return torch.layer_norm(x, x.shape[-1:], _cast(weight, torch.float32), _cast(bias, torch.float32), eps)
    trained = _trained(weight) or _trained(bias)
    if trained and x.numel() > _FEW and _may_block(x):
        return _Layer16.apply(x, weight, bias, eps)
    if weight is None and bias is None:
        weight = torch.ones(x.shape[-1])  # an fp32 parameter keeps the statistics in fp32
    weight, bias = _cast(weight, torch.float32), _cast(bias, torch.float32)
    if trained:
        return torch.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)
    return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _trained(t):
    return t is not None and t.requires_grad


class _Layer16(torch.autograd.Function):
    """torch's own kernels, forward on 16 bits and backward in fp32, a block of rows at a time."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        weight32, bias32 = _cast(weight, torch.float32), _cast(bias, torch.float32)
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
        need, n = ctx.needs_input_grad[:3], x.shape[-1]
        weight32, bias32 = _cast(weight, torch.float32), _cast(bias, torch.float32)
        backward = torch.ops.aten.native_layer_norm_backward.default
        dx, _, _ = backward(dy, x, (n,), mean, rstd, weight32, bias32, (need[0], False, False))
        if not (need[1] or need[2]):
            return dx, None, None, None
        # The sums over rows again, of fp32: converted to that in a scratch that stays in the cache.
        dweight, dbias, scratch = torch.zeros(n), torch.zeros(n), None
        for part, d, m, r in _blocks(x.reshape(-1, n), dy.reshape(-1, n), mean.view(-1, 1), rstd.view(-1, 1)):
            scratch = torch.empty((2, len(part), n)) if scratch is None else scratch[:, : len(part)]
            wide_d, wide_x = scratch[0].copy_(d), scratch[1].copy_(part)
            _, dw, db = backward(wide_d, wide_x, (n,), m, r, weight32, bias32, (False, *need[1:]))
            if need[1]:
                dweight += dw
            if need[2]:
                dbias += db
        return dx, dweight.to(weight.dtype) if need[1] else None, dbias.to(bias.dtype) if need[2] else None, None
