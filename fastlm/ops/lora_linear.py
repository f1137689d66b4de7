"""A linear layer with a low-rank update, in one op."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels import lora_linear as steps
from fastlm.kernels.matmul import cast, empty_grad
from fastlm.ops._op import Op, at_once
from fastlm.ops._tensor import autocast_dtype, compute_dtype, grad_of
from fastlm.ops.number_checks import check_number


def _reference(x, weight, a, b, bias, scale):
    dtype = compute_dtype(x)
    x_wide, weight, a, b, bias = (None if t is None else t.to(dtype) for t in (x, weight, a, b, bias))
    return (F.linear(x_wide, weight, bias) + scale * F.linear(F.linear(x_wide, a), b)).to(x.dtype)


# Elements of y up to which three calls of torch and its own autograd take less time than the passes over y that are saved: a
# call of ours costs the host some 60 us more with its backward.
_SMALL = 1 << 16


def _torch(x, weight, a, b, bias, scale):
    """Without a backward of its own: where none is needed, for small calls, and under torch.compile, which sees through it."""
    dtype = x.dtype
    if not (weight.dtype is dtype is a.dtype and b.dtype is dtype and (bias is None or bias.dtype is dtype)):
        weight, a, b, bias = cast(dtype, weight, a, b, bias)
    y = F.linear(x, weight, bias)
    if y.numel() <= _SMALL:
        return y.add(F.linear(F.linear(x, a), b), alpha=scale)
    n = math.prod(x.shape[:-1])
    rows, u = y.view(n, y.shape[-1]), F.linear(x, a).view(n, a.shape[0])
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.addmm(rows, u, b.t(), alpha=scale).view(y.shape)
    rows.addmm_(u, b.t(), alpha=scale)
    return y


OP = Op(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor a, Tensor b, Tensor? bias, float scale, str backend) -> (Tensor y, Tensor u)",
    "(Tensor dy, Tensor x, Tensor u, Tensor weight, Tensor a, Tensor b, Tensor? bias, int need, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    torch=_torch,
    kernels={
        "torch": (steps.lora_linear_fwd, steps.lora_linear_bwd),
        "triton": ("lora_product:lora_linear_fwd", "lora_product:lora_linear_bwd"),
    },
    slower=lambda backend, x, *_: steps.why_not_one_pass(x) if backend == "triton" else None,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _fake_forward(x, weight, a, b, bias, scale, backend):
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((*x.shape[:-1], a.shape[0]))


def _fake_backward(dy, x, u, weight, a, b, bias, need, scale, backend):
    return tuple(empty_grad(x, t, need >> i & 1) for i, t in enumerate((x, weight, a, b, bias)))


OP.fake(_fake_forward, _fake_backward)


@OP.autograd
class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, a, b, bias, scale, backend):
        y, u = OP.below(x, weight, a, b, bias, scale, backend)
        ctx.save_for_backward(x, u, weight, a, b, bias)
        ctx.options = (scale, backend)
        ctx.mark_non_differentiable(u)
        ctx.set_materialize_grads(False)
        return y, u

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 7
        needs = ctx.needs_input_grad[:5]
        bits = sum(1 << i for i, needed in enumerate(needs) if needed)
        grads = OP.backward(dy, *ctx.saved_tensors, bits, *ctx.options)
        return *(g if needed else None for g, needed in zip(grads, needs)), None, None


@OP.backward_reference
def _backward_reference(dy, x, u, weight, a, b, bias, need, scale, backend):
    tensors = (x, weight, a, b, bias)
    grads = grad_of(lambda *t: _reference(*t, scale), tensors, (dy,))
    return tuple(g if need >> i & 1 else empty_grad(x, tensors[i], False) for i, g in enumerate(grads))


def _splits(x, bias):
    """Ways to divide the work among processes: places of x, weight, a, b, bias | y, u | dy | the five gradients."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, part, last = Replicate(), Partial(), Shard(x.ndim - 1)
    splits = [([whole] * 5, [whole] * 2, whole, [whole] * 5)]
    splits += [([at, *[whole] * 4], [at] * 2, at, [at, *[part] * 4]) for at in map(Shard, range(x.ndim - 1))]
    # Tensor parallel (Megatron-LM, arXiv:1909.08053), by columns and by rows; a bias behind the sum has no place in the latter.
    rows, columns = Shard(0), Shard(1)
    splits.append(([whole, rows, whole, rows, rows], [last, whole], last, [part, rows, part, rows, rows]))
    if bias is None:
        splits.append(
            ([last, columns, columns, whole, whole], [part, part], whole, [last, columns, columns, part, whole])
        )
    return splits


def _shard_forward(x, weight, a, b, bias, scale, backend):
    return [
        (outputs, [*inputs[:4], None if bias is None else inputs[4], None, None])
        for inputs, outputs, _, _ in _splits(x, bias)
    ]


def _shard_backward(dy, x, u, weight, a, b, bias, need, scale, backend):
    from torch.distributed.tensor import Replicate

    rules = []
    for inputs, (_, u_at), dy_at, grads in _splits(x, bias):
        grads = [place if need >> i & 1 else Replicate() for i, place in enumerate(grads)]
        x_at, *rest, bias_at = inputs
        rules.append((grads, [dy_at, x_at, u_at, *rest, None if bias is None else bias_at, None, None, None]))
    return rules


OP.sharding(_shard_forward, _shard_backward)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """y = x weight^T + bias + scale * (x a^T) b^T: a linear layer with a low-rank update (LoRA).

    Args:
        x: [..., D], fp16, bf16 or fp32 (any float dtype on reference and torch), any strides.
        weight: [D_out, D], any float dtype and any strides, frozen or not; products are in x's dtype, to which a matrix of
            another one is cast at every call.
        a: [r, D] and b: [D_out, r], likewise: the update is b a, of rank r.
        bias: [D_out] or None, likewise.
        scale: factor of the update, alpha / r in most libraries.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        y [..., D_out] in x's dtype. Products sum in fp32; fp32 ones follow torch.get_float32_matmul_precision(). Gradients
        come in the dtype and memory order of each parameter, and only where one is required. Under autocast the products
        are in autocast's dtype.

    Saved for the backward, besides the parameters: x and x a^T [..., r]. No second tensor of y's or x's size is made, forward
    or backward. LoRA's dropout, which falls on the x of x a^T alone, is not part of the op: it needs a second x.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown or unsupported backend. TypeError: a tensor is not floating
        point (a quantized weight must be dequantized first).

    Backends: triton on compute capability >= 8.0 (one product over [x | x a^T] and [weight | b]), torch (two, the second added in
    place), reference. `auto` takes triton only where it was measured to be faster. Paper: Hu et al. 2021, arXiv:2106.09685.
    """
    _check(x, weight, a, b, bias)
    check_number("lora_linear", "scale", scale)
    now = at_once(backend, x)
    backend = "torch" if now else OP.choose(backend, x, weight, a, b, bias)
    dtype = autocast_dtype(x)
    if now and dtype is None and _direct(x, weight):
        return _torch(x, weight, a, b, bias, float(scale))
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    scale, tensors = float(scale), (x, weight, a, b, bias)
    if backend == "reference":
        return OP.plain(backend, *tensors, scale)
    if backend == "torch" and type(x).__name__ != "DTensor" and _direct(x, weight):
        return OP.plain(backend, *tensors, scale)
    return OP.forward(*tensors, scale, backend)[0]


def _direct(x, weight):
    """Whether torch's own autograd does."""
    if not torch.is_grad_enabled():
        return True
    small = x.numel() // max(1, x.shape[-1]) * weight.shape[0] <= _SMALL
    return x.device.type == "cpu" and (small or torch.compiler.is_compiling())


def _check(x, weight, a, b, bias):
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        width = "D" if x.ndim == 0 else x.shape[-1]
        raise ValueError(
            f"lora_linear: x must be [..., D] and weight [D_out, {width}] like x's last dimension, "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if a.ndim != 2 or a.shape[1] != x.shape[-1]:
        raise ValueError(f"lora_linear: a must be [r, {x.shape[-1]}] like x's last dimension, got {list(a.shape)}")
    if b.shape != (weight.shape[0], a.shape[0]):
        raise ValueError(
            f"lora_linear: b must be {[weight.shape[0], a.shape[0]]} like weight's rows and a's, got {list(b.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"lora_linear: bias must be [{weight.shape[0]}] like weight's rows, got {list(bias.shape)}")
    for name, t in (("x", x), ("weight", weight), ("a", a), ("b", b), ("bias", bias)):
        if t is None:
            continue
        if not t.is_floating_point():
            raise TypeError(f"lora_linear: {name} must be floating point, got {t.dtype}")
        if t.device != x.device:  # torch's products take no notice of a meta tensor
            raise ValueError(f"lora_linear: {name} must be on x's device {x.device}, got {t.device}")
