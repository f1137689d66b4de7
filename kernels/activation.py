"""Activations, plain and gated (act(gate) * up): one kernel for each direction of both.

Memory-bound: every element is read once and written once, a tile is about 16 elements a thread. Tensors are matrices of
rows of unit stride at any distance, so the halves of one product are read where they lie; contiguous ones are one long row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import rows


@triton.jit
def _sigmoid_and_slope(x):
    e = tl.exp(-tl.abs(x))  # never overflows, and 1 - s needs no subtraction
    s = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * s, s), e * s * s


@triton.jit
def value_and_slope(x, KIND: tl.constexpr):
    """act(x) and act'(x); the compiler drops the one that is not used."""
    if KIND == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * share, share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        s, slope = _sigmoid_and_slope(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        return x * s, s + x * slope * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif KIND == "silu":
        s, slope = _sigmoid_and_slope(x)
        return x * s, s + x * slope
    else:
        r = tl.where(x < 0, 0.0, x)  # keeps NaN, as maximum would not
        if KIND == "relu2":
            return r * r, 2.0 * r
        else:
            tl.static_assert(KIND == "relu")
            return r, tl.where(x > 0, 1.0, 0.0)


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows [BLOCK_M, 1] and columns [1, BLOCK_N] of this program, in 64 bits, and which of their elements exist."""
    blocks = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return row, col, (row < M) & (col < N)


@triton.jit(do_not_specialize=["M"])  # one compile, whatever the batch
def _activation_fwd_kernel(
    x_ptr, up_ptr, y_ptr, stride_xm, stride_um, M, N,
    KIND: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, col, live = _tile(M, N, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + row * stride_xm + col, mask=live, other=0.0).to(tl.float32)
    y, _ = value_and_slope(x, KIND)
    if GATED:
        y *= tl.load(up_ptr + row * stride_um + col, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + col, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["M"])  # one compile, whatever the batch
def _activation_bwd_kernel(
    dy_ptr, x_ptr, up_ptr, dx_ptr, dup_ptr, y_ptr, stride_dym, stride_xm, stride_um, stride_dxm, M, N,
    KIND: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, col, live = _tile(M, N, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + row * stride_xm + col, mask=live, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride_dym + col, mask=live, other=0.0).to(tl.float32)
    value, slope = value_and_slope(x, KIND)
    if GATED:
        tl.store(dup_ptr + row * stride_dxm + col, (dy * value).to(dup_ptr.dtype.element_ty), mask=live)
        up = tl.load(up_ptr + row * stride_um + col, mask=live, other=0.0).to(tl.float32)
        dy *= up
        value *= up
    tl.store(dx_ptr + row * stride_dxm + col, (dy * slope).to(dx_ptr.dtype.element_ty), mask=live)
    if y_ptr is not None:
        tl.store(y_ptr + row * N + col, value.to(y_ptr.dtype.element_ty), mask=live)


def _matrices(*tensors):
    """The tensors, all of one shape, as matrices with unit stride along their rows; one row if all are contiguous."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    return [rows(t) for t in tensors]


def _launch(kernel, pointers, strided, kind, gated):
    M, N = strided[0].shape
    # A row that is not a power of two leaves part of its last tile idle; 1024 keeps that small.
    block_n = 2048 if M == 1 else min(1024, max(16, triton.next_power_of_2(N)))
    block_m = 1 if M == 1 else 2048 // block_n
    kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
        *pointers, *(t.stride(0) for t in strided), M, N,
        KIND=kind, GATED=gated, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip


def _forward(x, up, kind):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() > 0:
        x2, up2 = _matrices(x, x if up is None else up)
        _launch(_activation_fwd_kernel, (x2, up2, y), (x2, up2), kind, up is not None)
    return y


def _backward(dy, x, up, kind):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dup = torch.empty(x.shape if up is not None else 0, dtype=x.dtype, device=x.device)
    slopes_and_values(dy, x, up, kind, dx, dup, None)
    return dx, dup


def slopes_and_values(dy, x, up, kind, dx, dup, y):
    """Writes the gradients dx and dup (unused if up is None), alike in strides, and y, the op's result, unless that is None."""
    if x.numel() > 0:
        dy2, x2, up2, dx2 = _matrices(dy, x, x if up is None else up, dx)
        strided = (dy2, x2, up2, dx2)
        _launch(_activation_bwd_kernel, (dy2, x2, up2, dx, dup, y), strided, kind, up is not None)


def activation_fwd(x, kind):
    """-> act(x), contiguous, in x's dtype."""
    return _forward(x, None, kind)


def activation_bwd(dy, x, kind):
    """-> dx, contiguous, in x's dtype."""
    return _backward(dy, x, None, kind)[0]


def glu_fwd(gate, up, kind):
    """-> act(gate) * up, contiguous, in gate's dtype."""
    return _forward(gate, up, kind)


def glu_bwd(dy, gate, up, kind):
    """-> dgate, dup, contiguous, in gate's dtype."""
    return _backward(dy, gate, up, kind)
