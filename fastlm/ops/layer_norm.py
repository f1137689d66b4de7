"""Layer normalisation, with an optional fused residual add."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._op import Op, compute_dtype


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
    parameters = [t.dtype for t in (weight, bias) if t is not None]
    if all(dtype == x.dtype for dtype in parameters) or _native_mixed(x, parameters):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = compute_dtype(x)
    weight, bias = (t if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(x.dtype)


def _native_mixed(x, parameters):
    """torch's CPU kernel reads a 16-bit x beside fp32 parameters as they are; casting either would cost a pass."""
    wide = all(dtype == torch.float32 for dtype in parameters)
    return wide and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


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
    kernels={},
    supports=_supports,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


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
