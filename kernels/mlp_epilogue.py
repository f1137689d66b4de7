"""The MLP's two products around the activation, with the activation in their epilogues; the chain they are part of is mlp.py.

_mlp_hidden_kernel: a tile of x first^T (gate and up side by side, from the same tile of x), then bias, activation and gate while
the sums are in registers; pre is written if the backward will want it, h once.
_mlp_slopes_kernel: a tile of dh = dy down, then the slope of the activation at pre: dh itself is never written.
The products without an activation next to them are torch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import mlp
from .activation import activation_fwd, glu_fwd, slopes_and_values, value_and_slope
from .attention_common import dot_precision
from .common import rows
from .products import add_product, add_two_products, dense, grid, readable, settings, tile_of_grid


@triton.jit
def _with_bias(acc, bias_ptr, col, dtype: tl.constexpr):
    """acc + bias, rounded to `dtype`, the pre-activation's, and back: the activation is of what the backward will see."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col).to(tl.float32)[None, :]
    return acc.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["M"])  # one compile, whatever the batch
def _mlp_hidden_kernel(
    x_ptr, first_ptr, second_ptr, first_bias_ptr, second_bias_ptr, pre_ptr, h_ptr,
    stride_xm, stride_fk, stride_fn, stride_sk, stride_sn, M, F, D,
    KIND: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, col = tile_of_grid(M, F, BLOCK_M, BLOCK_N, GROUP)
    read_row, read_col = readable(row, col, M, F, WIDE, BLOCK_N)
    live = (row < M)[:, None] & (col < F)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dtype = h_ptr.dtype.element_ty
    if second_ptr is None:
        acc = add_product(
            acc, x_ptr, first_ptr, read_row, read_col, stride_xm, stride_fk, stride_fn, D, EVEN_K, BLOCK_K, PRECISION
        )
        pre = _with_bias(acc, first_bias_ptr, read_col, dtype)
        if pre_ptr is not None:
            tl.store(pre_ptr + row[:, None] * F + col[None, :], pre.to(dtype), mask=live)
        h, _ = value_and_slope(pre, KIND)
    else:
        acc2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc, acc2 = add_two_products(
            acc, acc2, x_ptr, first_ptr, second_ptr, read_row, read_col, stride_xm, stride_fk, stride_fn, stride_sk,
            stride_sn, D, EVEN_K, BLOCK_K, PRECISION,
        )  # fmt: skip
        gate = _with_bias(acc, first_bias_ptr, read_col, dtype)
        up = _with_bias(acc2, second_bias_ptr, read_col, dtype)
        if pre_ptr is not None:
            place = pre_ptr + row[:, None] * (2 * F) + col[None, :]
            tl.store(place, gate.to(dtype), mask=live)
            tl.store(place + F, up.to(dtype), mask=live)
        h, _ = value_and_slope(gate, KIND)
        h *= up
    tl.store(h_ptr + row[:, None] * F + col[None, :], h.to(dtype), mask=live)


@triton.jit(do_not_specialize=["M"])  # one compile, whatever the batch
def _mlp_slopes_kernel(
    dy_ptr, down_ptr, pre_ptr, dpre_ptr, h_ptr, stride_dym, stride_dk, stride_dn, M, F, K,
    KIND: tl.constexpr, GATED: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, col = tile_of_grid(M, F, BLOCK_M, BLOCK_N, GROUP)
    read_row, read_col = readable(row, col, M, F, WIDE, BLOCK_N)
    live = (row < M)[:, None] & (col < F)[None, :]
    dtype = dpre_ptr.dtype.element_ty
    width = 2 * F if GATED else F
    place = row[:, None] * width + col[None, :]
    if h_ptr is not None:  # before the product, whose sums take the registers that this needs
        h, _ = value_and_slope(tl.load(pre_ptr + place, mask=live, other=0.0).to(tl.float32), KIND)
        if GATED:
            h *= tl.load(pre_ptr + place + F, mask=live, other=0.0).to(tl.float32)
        tl.store(h_ptr + row[:, None] * F + col[None, :], h.to(dtype), mask=live)
    dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dh = add_product(
        dh, dy_ptr, down_ptr, read_row, read_col, stride_dym, stride_dk, stride_dn, K, EVEN_K, BLOCK_K, PRECISION
    )
    if GATED:  # one half of dpre after the other, with pre read twice: both at once would spill
        value, _ = value_and_slope(tl.load(pre_ptr + place, mask=live, other=0.0).to(tl.float32), KIND)
        tl.store(dpre_ptr + place + F, (dh * value).to(dtype), mask=live)
        dh *= tl.load(pre_ptr + place + F, mask=live, other=0.0).to(tl.float32)
    _, slope = value_and_slope(tl.load(pre_ptr + place, mask=live, other=0.0).to(tl.float32), KIND)
    tl.store(dpre_ptr + place, (dh * slope).to(dtype), mask=live)


def _empty(x, *shape):
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _halves(weights, biases, gated):
    """weights and biases with gate and up apart: views where they share a matrix."""
    if not gated or weights[1] is not None:
        return weights, biases
    return weights[0].chunk(2), (None, None) if biases[0] is None else biases[0].chunk(2)


def _hidden(x, weights, biases, kind, gated, keep):
    (first, second), (first_bias, second_bias) = _halves(weights, biases, gated)
    (M, D), F = x.shape, first.shape[0]
    if M * F * D == 0:
        return mlp.PLAIN.hidden(x, weights, biases, kind, gated, keep)
    x = rows(x)
    h, pre = _empty(x, M, F), None
    if keep:
        pre = _empty(x, M, 2, F) if gated else _empty(x, M, F)
    options = settings(M, F, D, x.dtype, x.device, "gated" if gated else "activation")
    # The matrices are read as their transposes [D, F].
    _mlp_hidden_kernel[grid(M, F, options)](
        x, first, second, dense(first_bias), dense(second_bias), pre, h,
        x.stride(0), *first.stride()[::-1], *(second if gated else first).stride()[::-1], M, F, D,
        KIND=kind, PRECISION=dot_precision(x.dtype), **options,
    )  # fmt: skip
    return pre, h


def _slopes(dy, down, pre, kind, gated, need_h):
    (M, K), F = dy.shape, down.shape[1]
    if M * F * K == 0:
        return mlp.PLAIN.slopes(dy, down, pre, kind, gated, need_h)
    dy = rows(dy)
    dpre, h = _empty(dy, *pre.shape), _empty(dy, M, F) if need_h else None
    options = settings(M, F, K, dy.dtype, dy.device, "gated" if gated else "activation")
    _mlp_slopes_kernel[grid(M, F, options)](
        dy, down, pre, dpre, h, dy.stride(0), *down.stride(), M, F, K,
        KIND=kind, GATED=gated, PRECISION=dot_precision(dy.dtype), **options,
    )  # fmt: skip
    return dpre, h


def _value(pre, kind, gated):
    return glu_fwd(*pre.unbind(1), kind) if gated else activation_fwd(pre, kind)


FUSED = mlp.Form(_hidden, _value, _slopes)


def _library_hidden(x, weights, biases, kind, gated, keep):
    pre = mlp.pre_activations(x, weights, biases, gated)
    return pre if keep else None, _value(pre, kind, gated)


def _library_slopes(dy, down, pre, kind, gated, need_h):
    dh, dpre = torch.mm(dy, down), _empty(dy, *pre.shape)
    h = _empty(dy, *dh.shape) if need_h else None
    gate, up = pre.unbind(1) if gated else (pre, None)
    dgate, dup = dpre.unbind(1) if gated else (dpre, None)
    slopes_and_values(dh, gate, up, kind, dgate, dup, h)
    return dpre, h


ELEMENTWISE = mlp.Form(_library_hidden, _value, _library_slopes)


def mlp_fwd(*args):
    """-> y, pre; see mlp.forward."""
    return mlp.forward(FUSED, *args)


def mlp_bwd(*args):
    """-> gradients; see mlp.backward."""
    return mlp.backward(FUSED, *args)
