"""The torch form of the norms (the CPU's default): torch's own kernels where they mean the same, else few passes over memory."""

from __future__ import annotations

import torch

from fastlm.ops._tensor import compute_dtype, grad_of, is_batched
from fastlm.ops.norm_reference import dropped, normalised

# 16-bit elements up to which torch's LayerNorm of an fp32 copy costs less, with its backward, than a Function of Python.
_FEW = 40_000
# How fp32 becomes the dtype, where it does not compute itself; the methods cost a microsecond less than to(dtype).
_NARROW = {
    torch.float32: None,
    torch.float64: None,
    torch.bfloat16: torch.Tensor.bfloat16,
    torch.float16: torch.Tensor.half,
}
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


def plain_rms_norm(x, weight, eps):
    """RMSNorm of a plain CPU tensor as rms_norm_torch computes it, its checks included, in as few calls as it takes; None where
    there is more to it: another dtype of the weight, none at all, nothing in x, so much in 16 bits that it goes by blocks."""
    dtype = x.dtype
    if weight is None or weight.dtype is not dtype or dtype not in _NARROW or not weight.is_cpu:
        return None
    if weight.shape != x.shape[-1:] or not x.ndim:
        return None
    if not 0 < x.numel() <= _BLOCK and (_NARROW[dtype] or not x.numel()):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _PlainRMS.apply(x, weight, eps)
    return _plain_rms(x, weight, eps)[0]


def _plain_rms(x, weight, eps):
    """y and rstd. F.rms_norm's composite makes eight passes over memory, and ten calls."""
    narrow = _NARROW[x.dtype]
    if narrow is None:
        rstd = _rstd(x, eps)
        return (x * rstd).mul_(weight), rstd
    x = x.float()
    rstd = _rstd(x, eps)
    return narrow(x.mul_(rstd).mul_(weight)), rstd


class _PlainRMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = _plain_rms(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(dy):
            return *_formula_gradients(dy, x, weight, None, ctx.eps, 0.0, False)[:2], None
        shape, n, dtype = x.shape, weight.shape[0], x.dtype
        if len(shape) != 2:
            x, dy, rstd = x.reshape(-1, n), dy.reshape(-1, n), rstd.view(-1, 1)
        narrow = _NARROW[dtype]
        if narrow is not None:
            x, dy, weight = x.float(), dy.float(), weight.float()
        dx, dweight, _ = _rms_gradients(x, dy, rstd, weight, ctx.needs_input_grad[1], False)
        if narrow is not None:
            dx, dweight = narrow(dx), dweight if dweight is None else narrow(dweight)
        return dx if len(shape) == 2 else dx.view(shape), dweight, None


def _rms(x, weight, bias, eps, weight_offset, rounding):
    """RMSNorm of x, in x's dtype."""
    bare = bias is None and not weight_offset and rounding is None
    if not _may_block(x):
        if bare and (weight is None or weight.dtype == x.dtype):
            return torch.rms_norm(x, x.shape[-1:], weight, eps)
        return normalised(x, weight, bias, eps, weight_offset, rounding, False).to(x.dtype)
    if bare and x.device.type == "cpu":
        y = plain_rms_norm(x, weight, eps)
        if y is not None:
            return y
    if torch.is_grad_enabled() and (x.requires_grad or _trained(weight) or _trained(bias)):
        return _RMS.apply(x, weight, bias, eps, weight_offset, rounding)
    return _rms_values(x, weight, bias, eps, weight_offset, rounding)[0]


def _rstd(x, eps):
    """1 / sqrt(mean(x^2) + eps) of rows, one column. A number beside a tensor costs a small call more than the call itself, but
    for `value`."""
    norm = torch.linalg.vector_norm(x, 2, -1, True)
    return torch.full_like(norm, eps).addcmul_(norm, norm, value=1 / x.shape[-1]).rsqrt_()


def _may_block(x):
    """Whether x can be worked on a block of rows at a time: not where that is hidden in a graph or on other processes."""
    return not torch.compiler.is_compiling() and x.numel() > 0 and type(x).__name__ != "DTensor"


def _step(x):
    """Rows of x, 16 bits on the CPU, that stay in the cache with what is computed from them in fp32; 0: take all at once."""
    if x.element_size() != 2 or x.numel() <= _BLOCK or x.device.type != "cpu":  # fp32 needs no copies to compute with
        return 0
    step = max(1, _BLOCK * torch.get_num_threads() // x.shape[-1])
    return step if step * x.shape[-1] < x.numel() else 0


def _cast(t, dtype, offset=0.0):
    return t if t is None else t.to(dtype) + offset if offset else t.to(dtype)


def _rms_values(x, weight, bias, eps, weight_offset, rounding):
    """y in x's dtype and rstd, in few passes and few calls; F.rms_norm's composite makes eight over all of memory."""
    wide, step = compute_dtype(x), _step(x)
    options = _cast(weight, wide, weight_offset), _cast(bias, wide), eps, wide, rounding
    if not step:
        y, rstd = _rms_block(x, *options)
        return y if wide is x.dtype else y.to(x.dtype), rstd
    y = x.new_empty(x.shape)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=wide)
    n = x.shape[-1]
    for part, y_part, r_part in zip(*(t.split(step) for t in (x.reshape(-1, n), y.view(-1, n), rstd.view(-1, 1)))):
        out, r = _rms_block(part, *options)
        y_part.copy_(out)
        r_part.copy_(r)
    return y, rstd


def _rms_block(x, scale, shift, eps, wide, rounding):
    """y of rows x, in the dtype `wide`, and rstd of one column."""
    x_wide = x.to(wide)
    r = _rstd(x_wide, eps)
    y = x_wide * r if x_wide is x else x_wide.mul_(r)
    if rounding is not None:
        y = y.to(rounding).to(wide)
    if scale is not None:
        y.mul_(scale)
    if shift is not None:
        y.add_(shift)
    return y, r


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
        if torch.is_grad_enabled() or is_batched(dy):
            return *_formula_gradients(dy, x, weight, bias, ctx.eps, ctx.weight_offset, False), None, None, None
        shape, n, step = x.shape, x.shape[-1], _step(x)
        if len(shape) != 2:
            x, dy, rstd = x.reshape(-1, n), dy.reshape(-1, n), rstd.view(-1, 1)
        wide = rstd.dtype
        scale = _cast(weight, wide, ctx.weight_offset)
        _, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        if not step:
            found, dweight, dbias = _rms_gradients(x.to(wide), dy.to(wide), rstd, scale, need_dweight, need_dbias)
            dx = found.to(x.dtype)
        else:
            dx, sums = x.new_empty(x.shape), x.new_zeros((2, n), dtype=wide)
            for part, d, r, out in zip(*(t.split(step) for t in (x, dy, rstd, dx))):
                found, *parts = _rms_gradients(part.to(wide), d.to(wide), r, scale, need_dweight, need_dbias)
                out.copy_(found)
                for total, more in zip(sums, parts):
                    if more is not None:
                        total.add_(more)
            dweight, dbias = sums
        dweight = dweight.to(weight.dtype) if need_dweight else None
        dbias = dbias.to(bias.dtype) if need_dbias else None
        return dx if len(shape) == 2 else dx.view(shape), dweight, dbias, None, None, None


def _rms_gradients(x, dy, rstd, scale, need_dweight, need_dbias):
    """Gradients by rows x [M, N], weight and bias of _rms_block, all in rstd's dtype; None for what is not needed."""
    xhat, part = x * rstd, -1 / x.shape[-1]
    product = dy * xhat
    dbias = dy.sum(0) if need_dbias else None
    dweight = product.sum(0) if need_dweight else None
    if scale is None:
        dx = torch.addcmul(dy, xhat, product.sum(-1, True), value=part)
    else:
        along = torch.mv(product, scale).unsqueeze(-1)  # not `@`, which autocast would send through 16 bits
        dx = torch.mul(dy, scale, out=product).addcmul_(xhat, along, value=part)
    return dx.mul_(rstd), dweight, dbias


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
        return torch.layer_norm(x, x.shape[-1:], _float(weight), _float(bias), eps)
    trained = _trained(weight) or _trained(bias)
    if trained and x.numel() > _FEW and _may_block(x):
        return _Layer16.apply(x, weight, bias, eps)
    if weight is None and bias is None:
        weight = x.new_ones(x.shape[-1], dtype=torch.float32)  # an fp32 parameter keeps the statistics in fp32
    weight, bias = _float(weight), _float(bias)
    if trained:
        return _NARROW[x.dtype](torch.layer_norm(x.float(), x.shape[-1:], weight, bias, eps))
    return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _formula_gradients(dy, x, weight, bias, eps, weight_offset, centred):
    """Gradients by x, weight and bias from the formula: under create_graph, where statistics are no constants, and for a batch
    of cotangents (is_grads_batched), which must not be written into what is not batched."""
    formula = lambda x, w, b: normalised(x, w, b, eps, weight_offset, None, centred).to(x.dtype)  # noqa: E731
    return grad_of(formula, (x, weight, bias), (dy,))


def _trained(t):
    return t is not None and t.requires_grad


def _float(t):
    return t if t is None else t.float()


class _Layer16(torch.autograd.Function):
    """torch's own kernels, forward on 16 bits and backward in fp32, a block of rows at a time."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        weight32, bias32 = _float(weight), _float(bias)
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight32, bias32, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(dy):
            return *_formula_gradients(dy, x, weight, bias, ctx.eps, 0.0, True), None
        weight32, bias32 = _float(weight), _float(bias)
        need, shape = ctx.needs_input_grad[:3], x.shape[-1:]
        backward = torch.ops.aten.native_layer_norm_backward.default
        # The sums first: their scratch is dx's memory then.
        dw, db = _layer_sums(backward, dy, x, mean, rstd, weight32, bias32, need)
        dx, _, _ = backward(dy, x, shape, mean, rstd, weight32, bias32, (need[0], False, False))
        return dx, dw.to(weight.dtype) if need[1] else None, db.to(bias.dtype) if need[2] else None, None


def _layer_sums(backward, dy, x, mean, rstd, weight, bias, need):
    """dweight and dbias, summed in fp32 over 16-bit rows that are converted to it in a scratch of at most dx's size."""
    n = x.shape[-1]
    rows, dys = (t if t.ndim == 2 else t.reshape(-1, n) for t in (x, dy))
    step = min(max(1, len(rows) // 4), max(1, _BLOCK * torch.get_num_threads() // n))
    scratch, mask, sums = x.new_empty((2, step, n), dtype=torch.float32), (False, *need[1:]), []
    wide_d, wide_x = scratch.unbind()
    for part, d, m, r in zip(rows.split(step), dys.split(step), mean.view(-1).split(step), rstd.view(-1).split(step)):
        if len(part) < step:
            wide_d, wide_x = scratch[:, : len(part)].unbind()
        sums.append(backward(wide_d.copy_(d), wide_x.copy_(part), (n,), m, r, weight, bias, mask)[1:])
    return (torch.stack(some).sum(0) if needed else None for some, needed in zip(zip(*sums), mask[1:]))
