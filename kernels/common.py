"""What kernels share: where rows lie, how many programs there are, and tanh."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a fixed stand-in where there is no GPU (interpreter, meta tensors)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if device.type == "cpu" else 132


def rows(x: torch.Tensor) -> torch.Tensor:
    """x as a matrix [M, N] of its last dimension, with unit stride along it; a view wherever strides allow."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def at_two_strides(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """x [..., N] with unit stride along N, and (inner, outer stride, inner stride): row r of its rows, counted through,
    begins at (r // inner) * outer + (r % inner) * inner_stride. Heads of one fused product are so read where they lie;
    what lies at more than two strides, or not along N, is copied."""
    groups = row_groups(x)
    if len(groups) > 2 or not (x.stride(-1) == 1 or x.shape[-1] == 1):
        x = x.contiguous()
        groups = row_groups(x)
    if len(groups) == 2:
        return x, groups[1][0], groups[0][1], groups[1][1]
    return x, 1, groups[0][1] if groups else x.shape[-1], 0


@triton.jit
def row_start(row, inner, stride_outer, stride_inner):
    """Where rows begin that lie at two strides: (row // inner, row % inner). In 64 bits; the usual inner = 1 costs nothing."""
    return (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner


@triton.jit
def tanh_and_slope(x, exponent, EXACT: tl.constexpr):
    """tanh(x) and its derivative; exponent is 2 log2(e) x, which a caller may have for less. (The interpreter has no tanh.)

    With e = exp(-2 |x|) and d = 2 e / (1 + e), |tanh| is 1 - d and the slope d (2 - d): 1 - tanh^2 has few digits left where tanh
    is near 1, as softcaps make it. Both come from the one tile d, which keeps attention's dK dV from spilling. Near 0 a
    difference of two numbers near 1 has few digits; where more are wanted (EXACT) a polynomial takes over (that of the Cephes
    library, relative error 2e-7 up to 0.625).
    """
    e = tl.exp2(-tl.abs(exponent))
    d = 2.0 * e / (1.0 + e)
    t = tl.where(exponent < 0, d - 1.0, 1.0 - d)
    if EXACT:
        s = x * x
        p = (-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2
        p = (p * s + 1.33314422036e-1) * s - 3.33332819422e-1
        t = tl.where(tl.abs(x) < 0.625, p * s * x + x, t)
    return t, d * (2.0 - d)


def empty_beside(x: torch.Tensor) -> torch.Tensor:
    """A new tensor of x's shape and dtype, contiguous but for up to 7 elements between neighbours along a leading dimension, so
    that each row begins as far behind a multiple of 8 elements as that row of x. All contiguous if x is."""
    strides, width = [1], x.shape[-1]
    for count, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        if count != 1:
            width += (stride - width) % 8
        strides.append(width)
        width *= count
    return torch.empty(width, dtype=x.dtype, device=x.device).as_strided(x.shape, strides[::-1])


def row_groups(x: torch.Tensor) -> list[tuple[int, int]]:
    """(count, stride) of the leading dimensions of x, outermost first, neighbours that lie in one run taken together."""
    groups: list[tuple[int, int]] = []
    for count, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if count == 1:
            continue
        if groups and groups[-1][1] == count * stride:
            groups[-1] = (groups[-1][0] * count, stride)
        else:
            groups.append((count, stride))
    return groups
