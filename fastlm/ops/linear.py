"""A linear layer."""

from __future__ import annotations

import math
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels.linear import linear_bwd
from fastlm.kernels.matmul import empty_grad
from fastlm.ops._cuda import not_measured
from fastlm.ops._op import Op, at_once
from fastlm.ops._tensor import autocast_dtype, compute_dtype, grad_of

_MOST_ROWS, _MOST_COLUMNS, _MOST_OUTPUTS = 8, 1 << 28, 1 << 31  # csrc/few_rows.h


def why_not_few_rows(x: Tensor, weight: Tensor) -> str | None:
    """Why the CUDA kernel for products of few rows cannot take x [..., K] and a weight [N, .], or None."""
    rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
    if rows > _MOST_ROWS:
        return f"it takes at most {_MOST_ROWS} rows of x, got {rows}"
    if not 0 < columns <= _MOST_COLUMNS or weight.shape[0] >= _MOST_OUTPUTS:
        return f"x must have 1 to 2^28 columns and the weight fewer than 2^31 rows, got {columns} and {weight.shape[0]}"
    return None


def _supports(backend, x, weight, bias):
    return why_not_few_rows(x, weight) if backend == "cuda" else None


def _reference(x, weight, bias):
    dtype = compute_dtype(x)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


OP = Op(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, int need, str backend) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    torch=F.linear,
    kernels={"torch": (F.linear, linear_bwd), "cuda": ("linear_fwd", linear_bwd)},
    supports=_supports,
    slower=not_measured,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)
OP.fake(
    lambda x, weight, bias, backend: x.new_empty((*x.shape[:-1], weight.shape[0])),
    lambda dy, x, weight, bias, need, backend: tuple(
        empty_grad(x, t, need >> i & 1) for i, t in enumerate((x, weight, bias))
    ),
)


@OP.autograd
class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, backend):
        ctx.save_for_backward(x, weight, bias)
        ctx.backend = backend
        return OP.below(x, weight, bias, backend)

    @staticmethod
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[:3]
        bits = sum(1 << i for i, needed in enumerate(needs) if needed)
        grads = OP.backward(dy, *ctx.saved_tensors, bits, ctx.backend)
        return *(g if needed else None for g, needed in zip(grads, needs)), None


@OP.backward_reference
def _backward_reference(dy, x, weight, bias, need, backend):
    tensors = (x, weight, bias)
    grads = grad_of(_reference, tensors, (dy,))
    return tuple(g if need >> i & 1 else empty_grad(x, tensors[i], False) for i, g in enumerate(grads))


def _splits(x, bias):
    """Ways to divide the work among processes: places of x, weight, bias | y | dy | the three gradients."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, part, last, rows = Replicate(), Partial(), Shard(x.ndim - 1), Shard(0)
    splits = [([whole] * 3, whole, whole, [whole] * 3)]
    splits += [([at, whole, whole], at, at, [at, part, part]) for at in map(Shard, range(x.ndim - 1))]
    # Tensor parallel (Megatron-LM, arXiv:1909.08053), by rows and by columns; a bias behind the sum has no place in the latter.
    splits.append(([whole, rows, rows], last, last, [part, rows, rows]))
    if bias is None:
        splits.append(([last, Shard(1), whole], part, whole, [last, Shard(1), whole]))
    return splits


def _shard_forward(x, weight, bias, backend):
    return [([y], [*inputs[:2], None if bias is None else inputs[2], None]) for inputs, y, _, _ in _splits(x, bias)]


def _shard_backward(dy, x, weight, bias, need, backend):
    from torch.distributed.tensor import Replicate

    rules = []
    for inputs, _, dy_at, grads in _splits(x, bias):
        grads = [place if need >> i & 1 else Replicate() for i, place in enumerate(grads)]
        rules.append((grads, [dy_at, *inputs[:2], None if bias is None else inputs[2], None, None]))
    return rules


OP.sharding(_shard_forward, _shard_backward)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y = x weight^T + bias.

    Args:
        x: [..., K], fp16, bf16 or fp32 (any float dtype on reference and torch), any strides.
        weight: [N, K], any float dtype, cast to x's; any strides (the CUDA kernel copies one whose rows do not lie in one piece).
        bias: [N] or None, any float dtype, cast to x's.
        backend: "auto", "reference", "torch" or "cuda".

    Returns:
        y [..., N] in x's dtype, sums in fp32. Under autocast all are cast.

    Raises:
        ValueError: shapes or devices that do not fit together, an unknown or unsupported backend. TypeError: an argument is not
        floating point.

    Backends: torch: torch.nn.functional.linear, with torch's own gradient. cuda on compute capability >= 8.0, for decoding: up to
    eight rows of x of at most 2^28 columns, a kernel that reads the weight once, in 16-byte loads, and multiplies it on tensor
    cores (fp32: by plain multiply-adds); a weight whose rows do not all begin and end at multiples of 16 bytes it reads one at a
    time, and multiplies by plain multiply-adds; the backward is torch's products; not chosen by "auto". reference.
    """
    if at_once(backend, x) and _is_plain(x, weight, bias):
        with suppress(RuntimeError):  # what torch refuses the checks explain
            return F.linear(x, weight, bias)
    _check(x, weight, bias)
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    backend = OP.choose(backend, x, weight, bias)
    if backend == "reference" or (backend == "torch" and type(x).__name__ != "DTensor"):
        return OP.plain(backend, x, weight, bias)
    return OP.forward(x, weight, bias, backend)


def _is_plain(x, weight, bias):
    """Whether torch's product takes these arguments as this op means them, or refuses them."""
    if x.dtype != weight.dtype or weight.ndim != 2 or not (weight.is_cpu and x.is_floating_point()):
        return False
    return bias is None or (bias.dtype == x.dtype and bias.is_cpu and bias.shape == weight.shape[:1])


def _check(x, weight, bias):
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is not None and not t.is_floating_point():
            raise TypeError(f"linear: {name} must be floating point, got {t.dtype}")
        if t is not None and t.device != x.device:
            raise ValueError(f"linear: {name} must be on x's device {x.device}, got {t.device}")
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"linear: x must be [..., K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias must be [{weight.shape[0]}] like the rows of weight, got {list(bias.shape)}")
