"""x weight^T + scale u b^T + bias in one pass: the product over the concatenated inner dimension [x | u] [weight | b]^T.

The low-rank part comes first, is scaled in fp32 where it was summed, and the main part is added to it: no rounding of
`scale u`, no second pass over y. The chain it is part of, forward and backward, is lora_linear.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import lora_linear
from .attention_common import dot_precision
from .common import rows
from .products import add_product, dense, grid, readable, settings, tile_of_grid


@triton.jit(do_not_specialize=["M", "scale"])  # one compile, whatever the batch
def _lora_product_kernel(
    x_ptr, w_ptr, u_ptr, b_ptr, bias_ptr, y_ptr, stride_xm, stride_wk, stride_wn, stride_um, stride_bk, stride_bn,
    M, N, K, R, scale,
    EVEN_K: tl.constexpr, EVEN_R: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, col = tile_of_grid(M, N, BLOCK_M, BLOCK_N, GROUP)
    read_row, read_col = readable(row, col, M, N, WIDE, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = add_product(
        acc, u_ptr, b_ptr, read_row, read_col, stride_um, stride_bk, stride_bn, R, EVEN_R, BLOCK_R, PRECISION
    )
    acc *= scale
    acc = add_product(
        acc, x_ptr, w_ptr, read_row, read_col, stride_xm, stride_wk, stride_wn, K, EVEN_K, BLOCK_K, PRECISION
    )
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + read_col).to(tl.float32)[None, :]
    live = (row < M)[:, None] & (col < N)[None, :]
    tl.store(y_ptr + row[:, None] * N + col[None, :], acc.to(y_ptr.dtype.element_ty), mask=live)


def _product(x, weight, u, b, bias, scale):
    (M, K), (N, R) = x.shape, b.shape
    if M * N * K == 0:
        return lora_linear.library_product(x, weight, u, b, bias, scale)
    x, u = rows(x), rows(u)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    options = settings(M, N, K, x.dtype, x.device, "none")
    block_r = max(16, min(options["BLOCK_K"], triton.next_power_of_2(R)))
    # The matrices are read as their transposes [K, N] and [R, N].
    _lora_product_kernel[grid(M, N, options)](
        x, weight, u, b, dense(bias), y, x.stride(0), *weight.stride()[::-1], u.stride(0), *b.stride()[::-1], M, N, K, R, scale,
        EVEN_R=R % block_r == 0, PRECISION=dot_precision(x.dtype), BLOCK_R=block_r, **options,
    )  # fmt: skip
    return y


def lora_linear_fwd(*args):
    """-> y, u; see lora_linear.forward."""
    return lora_linear.forward(_product, *args)


def lora_linear_bwd(*args):
    """-> gradients; see lora_linear.backward."""
    return lora_linear.backward(_product, *args)
