"""RMS normalisation, with an optional fused dropout and residual add."""

from __future__ import annotations

from torch import Tensor

from fastlm.ops._op import at_once
from fastlm.ops.norm_torch import plain_rms_norm, rms_norm_torch
from fastlm.ops.norm_wiring import check, check_casting, check_numbers, dropout_seed, norm_op
from fastlm.ops.number_checks import LARGEST

OP = norm_op("rms_norm", rms_norm_torch, centred=False)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    weight_offset: float = 0.0,
    casting: str = "fp32",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y = s / sqrt(mean(s^2) + eps) * (weight_offset + weight) + bias over the last dimension, s = dropout(x) + residual.

    Args:
        x: [..., N], fp16, bf16, fp32 (any float dtype on the reference), any strides: the heads of one fused product are
            read where they lie.
        weight: [N], any float dtype, or None for no scale (and no weight_offset).
        eps: added to the mean square.
        bias: [N], any float dtype, or None for no shift.
        residual: [..., N], shape of x, any float dtype: added to x first (a transformer's residual stream, which may be
            kept in fp32 while x is bf16).
        dropout_p: probability in [0, 1) with which each element of x is dropped before the residual is added, the others
            being scaled by 1 / (1 - dropout_p). 0 is bitwise the same as no dropout.
        seed: int, or int64 tensor [2] (seed, offset) on x's device, which may live in a CUDA graph; None draws one. Which
            elements are dropped depends on seed and position alone, on every backend: Philox 4x32-10 (Salmon et al. 2011),
            counter (column // 4, row, row >> 32, offset), word column % 4, rows of x counted through.
        weight_offset: added to weight in fp32: 1.0 is Gemma's form.
        casting: "fp32": all in fp32, rounded once (with weight_offset=1 as Gemma does). "llama": the normalised s is
            rounded to x's dtype before it is scaled, as in transformers' LlamaRMSNorm. Gradients see no rounding.
        backend: "auto", "reference", "torch", "triton" or "cuda".

    Returns:
        y [..., N] in x's dtype; with `residual` the pair (y, residual_out), residual_out = s in residual's dtype, which is
        also what gets normalised. Sums are taken in fp32. Under autocast dtypes are kept.

    Raises:
        ValueError: shapes or devices that do not fit, dropout_p outside [0, 1) or with a DTensor, a bad seed, an unknown
        casting, an unknown or unsupported backend. TypeError: x, weight, bias or residual is not floating point, dropout_p is
        no number, seed is neither int nor tensor.

    Backends: triton on compute capability >= 8.0, N <= 262144, fewer than 2^31 rows. cuda: likewise but any N;
        weight, bias and residual in x's dtype or fp32, weight and bias of one dtype; not chosen by "auto".
    Paper: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    now = at_once(backend, x)
    if (
        now and bias is residual is None and not dropout_p and not weight_offset and casting == "fp32"
        and type(eps) is float and 0 <= eps <= LARGEST
    ):  # fmt: skip
        y = plain_rms_norm(x, weight, eps)
        if y is not None:
            return y
    check("rms_norm", x, weight, bias, residual)
    check_numbers("rms_norm", eps, weight_offset)
    llama = casting != "fp32" and check_casting("rms_norm", casting)
    backend = "torch" if now else OP.choose(backend, x, weight, bias, residual)
    seed = dropout_seed("rms_norm", x, seed, dropout_p) if dropout_p else None
    if now:
        return rms_norm_torch(x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p)
    if backend in OP.plain_forms:
        return OP.plain(backend, x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p)
    y, residual_out, _, _ = OP.forward(x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p, backend)
    return y if residual is None else (y, residual_out)
