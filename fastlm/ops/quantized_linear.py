"""A linear layer whose weight is stored as int8 or int4 codes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._cuda import not_measured
from fastlm.ops._op import Op
from fastlm.ops._tensor import autocast_dtype, compute_dtype
from fastlm.ops.linear import why_not_few_rows
from fastlm.ops.quantize import GROUPS, dequantize_weight
from fastlm.ops.quantized_cpu import by_codes, few_rows_product, gradient_by_codes

# Up to this many rows a GPU reads the weight once and the product costs nothing beside it. Beyond, nothing was measured yet, and
# `auto` takes torch's product with the weight in x's dtype.
FEW_ROWS = 16


def _weight(codes, scale, zero, bits, group_size, columns, dtype):
    scale = scale.detach() if scale.requires_grad else scale  # a constant, in every form
    return dequantize_weight(codes, scale, zero, bits=bits, group_size=group_size or None, columns=columns, dtype=dtype)


def _reference(x, codes, scale, zero, bias, bits, group_size):
    dtype = compute_dtype(x)
    weight = _weight(codes, scale, zero, bits, group_size, x.shape[-1], dtype)
    return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)


def _torch(x, codes, scale, zero, bias, bits, group_size):
    if x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        for product in (few_rows_product, by_codes):
            y = product(x, codes, scale.detach(), zero, bias, bits, group_size)
            if y is not None:
                return y
    weight = _weight(codes, scale, zero, bits, group_size, x.shape[-1], x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _torch_backward(dy, codes, scale, zero, bits, group_size, columns):
    if dy.device.type == "cpu":
        dx = gradient_by_codes(dy, codes, scale.detach(), zero, bits, group_size)
        if dx is not None:
            return dx
    weight = _weight(codes, scale, zero, bits, group_size, columns, dy.dtype)
    return torch.matmul(dy, weight)


OP = Op(
    "quantized_linear",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, str backend) -> Tensor",
    "(Tensor dy, Tensor codes, Tensor scale, Tensor? zero, int bits, int group_size, SymInt columns, str backend) -> Tensor",
    reference=_reference,
    torch=_torch,
    kernels={
        "torch": (_torch, _torch_backward),
        "triton": ("quantized_linear:quantized_linear_fwd", "quantized_linear:quantized_linear_bwd"),
        "cuda": ("quantized_linear_fwd", _torch_backward),
    },
    supports=lambda backend, x, codes, *_: why_not_few_rows(x, codes) if backend == "cuda" else None,
    slower=lambda backend, x, *_: _many_rows(x) if backend == "triton" else not_measured(backend),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _many_rows(x):
    if math.prod(x.shape[:-1]) <= FEW_ROWS:
        return None
    return f"more than {FEW_ROWS} rows: a product with the dequantised weight is taken until ours was measured to be faster"


def _fake_forward(x, codes, scale, zero, bias, bits, group_size, backend):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _fake_backward(dy, codes, scale, zero, bits, group_size, columns, backend):
    return dy.new_empty((*dy.shape[:-1], columns))


OP.fake(_fake_forward, _fake_backward)


@OP.autograd
class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, codes, scale, zero, bias, bits, group_size, backend):
        ctx.save_for_backward(codes, scale, zero, bias)
        ctx.options = bits, group_size, x.shape[-1], backend
        return OP.below(x, codes, scale, zero, bias, bits, group_size, backend)

    @staticmethod
    def backward(ctx, dy):
        codes, scale, zero, bias = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = OP.backward(dy, codes, scale, zero, *ctx.options)
        if ctx.needs_input_grad[4]:
            dbias = _bias_grad(dy, bias)
        return dx, None, None, None, dbias, None, None, None


def _bias_grad(dy, bias):
    """Summed in fp32, rounded once. Over the dimensions as they are: a DTensor divided unevenly could not be reshaped."""
    wide = torch.promote_types(dy.dtype, bias.dtype)
    return (dy if dy.ndim == 1 else dy.sum(tuple(range(dy.ndim - 1)), dtype=wide)).to(bias.dtype)


@OP.backward_reference
def _backward_reference(dy, codes, scale, zero, bits, group_size, columns, backend):
    dtype = compute_dtype(dy)
    return (dy.to(dtype) @ _weight(codes, scale, zero, bits, group_size, columns, dtype)).to(dy.dtype)


def _splits(rows_of, scale, zero):
    """Ways to divide the work among processes: place of x or dy | codes, scale, zero | bias | y | dx."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, last = Replicate(), Shard(rows_of.ndim - 1)
    splits = [(whole, whole, whole, whole)]
    splits += [(at, whole, at, at) for at in map(Shard, range(rows_of.ndim - 1))]
    # Tensor parallel by output rows (Megatron-LM, arXiv:1909.08053): codes, scale, zero and bias are cut alike.
    splits.append((whole, Shard(0), last, Partial()))
    return [(x_at, [w_at, w_at, None if zero is None else w_at], y_at, dx_at) for x_at, w_at, y_at, dx_at in splits]


def _shard_forward(x, codes, scale, zero, bias, bits, group_size, backend):
    return [
        ([y_at], [x_at, *weight_at, None if bias is None else weight_at[0], None, None, None])
        for x_at, weight_at, y_at, _ in _splits(x, scale, zero)
    ]


def _shard_backward(dy, codes, scale, zero, bits, group_size, columns, backend):
    return [
        ([dx_at], [y_at, *weight_at, None, None, None, None]) for _, weight_at, y_at, dx_at in _splits(dy, scale, zero)
    ]


OP.sharding(_shard_forward, _shard_backward)


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int = 8,
    group_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = x W^T + bias with W[n, k] = scale[n, k // group_size] * (code[n, k] - zero[n, k // group_size]): a weight-only
    quantised linear layer.

    Codes, scales and zeros are what fastlm.ops.quantize.quantize_weight returns.

    Args:
        x: [..., K], fp16, bf16 or fp32 (any float dtype on reference and torch), any strides.
        codes: int8 [N, K] for bits=8; for bits=4 uint8 [N, ceil(K / group_size) * group_size / 2], two codes of 0..15 to a byte
            (fastlm.ops.quantize.pack_int4).
        scale: fp32 or bf16 [N, ceil(K / group_size)], or [N] without groups.
        zero: like scale, int8 (bits=8) or uint8 (bits=4); None means 0 (bits=8) or 8 (bits=4).
        bias: [N] or None, any float dtype.
        bits: 8 or 4.
        group_size: 32, 64 or 128; None, for bits=8 only, for one scale a row.
        backend: "auto", "reference", "torch", "triton" or "cuda".

    Returns:
        y [..., N] in x's dtype, sums in fp32. The gradient goes to x, as dy W, and to the bias; the weight is frozen, and so are
        its scales and zeros: they are constants. Neither x nor the dequantised weight is kept for the backward, which reads the
        codes again. Under autocast x is cast.

    Raises:
        ValueError: shapes that do not fit together or to bits and group_size, an unknown or unsupported backend.
        TypeError: x or bias is not floating point, codes or zero are of another integer type than bits says.

    Backends: triton on compute capability >= 8.0. One row: products and sums in fp32, without tensor cores, groups scaled in
    fp32; more rows: tensor cores on the codes themselves, which 16 bits hold exactly, and the scale on the fp32 sums of a group
    (on the weight, rounded to x's dtype, in the backward). torch: a product with the dequantised weight; on the CPU, int8 codes
    without groups and zeros go to torch's int8 products, see fastlm/ops/quantized_cpu.py. cuda on compute capability >= 8.0, to
    eight rows of x of at most 2^28 columns: 16-bit x on tensor cores, as triton's many rows, fp32 by plain multiply-adds, and so
    any x where rows of codes do not all begin and end at multiples of 16 bytes, read one code at a time; the backward is torch's;
    not chosen by "auto". reference. `auto` takes triton up to 16 rows. Papers: Dettmers et al. 2022, arXiv:2208.07339 (int8),
    2023, arXiv:2305.14314 (QLoRA); Frantar et al. 2022, arXiv:2210.17323 (groups), 2024, arXiv:2408.11743 (few rows on tensor
    cores).
    """
    group_size = 0 if group_size is None else group_size
    _check(x, codes, scale, zero, bias, bits, group_size)
    backend = OP.choose(backend, x, codes, scale, zero, bias)
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    args = (x, codes, scale, zero, bias, bits, group_size)
    if backend == "reference":
        return OP.plain(backend, *args)
    if backend == "torch" and type(x).__name__ != "DTensor" and not torch.is_grad_enabled():
        return OP.plain(backend, *args)
    return OP.forward(*args, backend)


def _check(x, codes, scale, zero, bias, bits, group_size):
    if bits not in (4, 8) or group_size not in (GROUPS if bits == 4 else (0, *GROUPS)):
        raise ValueError(
            "quantized_linear: bits must be 8 or 4 and group_size 32, 64 or 128 (or None with bits=8), "
            f"got bits={bits!r}, group_size={group_size or None!r}"
        )
    if not x.is_floating_point() or (bias is not None and not bias.is_floating_point()):
        wrong = x if not x.is_floating_point() else bias
        raise TypeError(f"quantized_linear: {'x' if wrong is x else 'bias'} must be floating point, got {wrong.dtype}")
    kind = torch.int8 if bits == 8 else torch.uint8
    if codes.dtype != kind or (zero is not None and zero.dtype != kind):
        name, wrong = ("codes", codes) if codes.dtype != kind else ("zero", zero)
        raise TypeError(f"quantized_linear: {name} must be {kind} for bits={bits}, got {wrong.dtype}")
    if x.ndim == 0 or codes.ndim != 2:
        raise ValueError(
            f"quantized_linear: x must be [..., K] and codes [N, .], got {list(x.shape)} and {list(codes.shape)}"
        )
    K, N = x.shape[-1], codes.shape[0]
    count = (K + group_size - 1) // group_size if group_size else 1
    width = K if bits == 8 else count * group_size // 2
    if codes.shape[1] != width:
        raise ValueError(
            f"quantized_linear: codes must be [N, {width}] for x's last dimension {K} with bits={bits} and "
            f"group_size={group_size or None}, got {list(codes.shape)}"
        )
    shape = (N, count) if group_size else (N,)
    if not scale.is_floating_point():
        raise TypeError(f"quantized_linear: scale must be floating point, got {scale.dtype}")
    for name, t in (("scale", scale), ("zero", zero)):
        if t is not None and t.shape != shape:
            raise ValueError(f"quantized_linear: {name} must be {list(shape)}, got {list(t.shape)}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"quantized_linear: bias must be [{N}] like the rows of codes, got {list(bias.shape)}")
