"""Linear layer in fp8 e4m3: scales, codes and the chain forward and backward. Plain torch: runs without Triton.

A scale is amax / 448 in fp32, of a row or of the whole matrix; a code is x * (1 / amax * 448), rounded to nearest even and never
past 448; infinity is NaN. Every backend makes the same codes, bit for bit.
"""

from __future__ import annotations

import torch

from .matmul import bias_grad, empty_grad, matrix, weight_grad

LARGEST = 448.0  # of e4m3
TINY = 1e-12  # least amax: what lies far below is 0
CODES = torch.float8_e4m3fn


def scale_and_inverse(matrix, by_row, given):
    """fp32 [N, 1] or [1, 1]: scale of each row of a matrix [N, D], or of all, and what it is multiplied by. `given`: a scale.
    NaN where there is NaN or infinity."""
    if given is not None:
        scale = given.to(torch.float32).reshape(-1, 1)
        return scale, scale.reciprocal()
    rows = matrix.shape[0] if by_row else 1
    if matrix.numel() == 0:
        amax = torch.zeros((rows, 1), dtype=torch.float32, device=matrix.device)
    else:
        amax = _largest(matrix, 1 if by_row else None)
    amax = amax.to(torch.float32).view(rows, 1).clamp(min=TINY)
    amax = amax + (amax - amax)  # infinity becomes NaN
    # By a tensor: a number's reciprocal is what torch multiplies by on a GPU, a bit off the kernel's quotient.
    scale = amax / LARGEST if amax.is_cpu else amax / torch.empty_like(amax).fill_(LARGEST)
    return scale, amax.reciprocal() * LARGEST


def _largest(matrix, dim):
    """The largest magnitude of each row (dim 1) or of all (None); NaN stays NaN."""
    if matrix.device.type == "cpu":  # a twentieth of the time of its norm
        return matrix.abs().amax(dim) if dim is not None else matrix.abs().amax()
    wide = torch.promote_types(matrix.dtype, torch.float32)
    return torch.linalg.vector_norm(matrix, float("inf"), dim, dtype=wide)  # one pass and no copy


def decoded(codes, dtype):
    """Codes as numbers in fp32 or fp64."""
    if codes.device.type == "cpu":
        bits = codes.view(torch.int8).to(torch.int16)
        if not (bits & 127).eq(127).any():
            # The code's bits moved to where fp16 has exponent and mantissa are its value / 2^8: a sixth of the time of torch's
            # conversion on a CPU.
            return bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16).to(dtype).mul_(256)
    return codes.to(dtype)


def quantize(matrix, by_row, given=None):
    """A matrix [N, D] -> codes [N, D] and their scales [N, 1] or [1, 1]."""
    scale, inverse = scale_and_inverse(matrix, by_row, given)
    scaled = (matrix.to(torch.float32) * inverse).clamp_(-LARGEST, LARGEST)
    if given is not None:  # else the scale is NaN
        scaled.masked_fill_(matrix.isinf(), torch.nan)
    return scaled.to(CODES), scale


def weight_scales(weight, weight_scale):
    """Scales of a weight that is already in codes, [F, 1] or [1, 1]."""
    return weight_scale.to(torch.float32).reshape(-1, 1)


def forward(quantize, product, x, weight, bias, weight_scale, input_scale, by_row):
    """-> y [..., F]. quantize(matrix, by_row, given) -> codes, scales; product(codes, scales, codes, scales, bias, dtype)."""
    rows = matrix(x)
    codes, scale = quantize(rows, by_row, input_scale)
    if weight.dtype == CODES:
        weight_codes, weight_scale = weight, weight_scales(weight, weight_scale)
    else:
        weight_codes, weight_scale = quantize(weight, by_row, weight_scale)
    y = product(codes, scale, weight_codes, weight_scale, bias, x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def wide_weight(weight, weight_scale, dtype):
    """The weight in dtype; codes are multiplied by their scales in fp32 and rounded once."""
    if weight.dtype != CODES:
        return weight.to(dtype)
    return (decoded(weight, torch.float32) * weight_scales(weight, weight_scale)).to(dtype)


def backward(dy, x, weight, bias, weight_scale, need):
    """-> gradients of x, weight and bias, those of the linear layer without rounding to fp8 (straight through); an empty
    tensor for each whose bit of `need` is 0."""
    rows, flat = matrix(x), matrix(dy)
    dx, dw, db = (empty_grad(x, t, False) for t in (x, weight, bias))
    if need & 1:
        dx = torch.mm(flat, wide_weight(weight, weight_scale, x.dtype)).view(x.shape)
    if need & 2:
        dw = weight_grad(flat, rows, weight)
    if need & 4:
        db = bias_grad(flat, bias)
    return dx, dw, db


# --- torch's own products -----------------------------------------------------------------------------------------


def wide_product(codes, scale, weight_codes, weight_scale, bias, dtype):
    """By a product in fp32 (fp64 for dtype fp64): codes are exact in it."""
    wide = torch.promote_types(dtype, torch.float32)
    y = torch.mm(decoded(codes, wide), decoded(weight_codes, wide).t()).mul_(scale).mul_(weight_scale.t())
    return (y if bias is None else y.add_(bias)).to(dtype)
