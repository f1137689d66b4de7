"""fp8 e4m3: matrix to codes in one pass over each row, and the product of codes with scales and bias where its sums are at hand.

Codes are made by integer arithmetic on the bits of the fp32 value, so that the interpreter (whose conversion to fp8 neither
rounds to even nor knows NaN) and every GPU give torch's, bit for bit. Rows are filled with zeros up to whole tiles of the inner
dimension: the loop of the product needs no mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import fp8_linear as steps
from .attention_common import generation
from .common import rows
from .products import GROUP, dense, grid, readable, tile_of_grid

# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages by generation, and for at most 64 rows; the largest that do not spill in the
# rows compiled ahead of time (benchmarks/ops/bench_fp8_linear.py); no GPU has timed them.
_SETTINGS = {80: (128, 128, 64, 8, 3), 90: (128, 128, 128, 8, 4), 100: (128, 128, 128, 8, 4)}
_FEW = {80: (64, 64, 64, 4, 4), 90: (64, 128, 128, 4, 4), 100: (64, 128, 128, 4, 4)}
_ODD = (64, 64, 64, 4, 3)  # columns of y that are no multiple of 16: their addresses, one by one, take registers
_PAD = 128  # rows of codes are multiples of it: a multiple of every BLOCK_K
_ROW = 4096  # elements of a row at a time


@triton.jit
def _e4m3(x):
    """The codes of fp32 values, as 8-bit integers: nearest, ties to even, at most 448; NaN is 127."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # From 2^-6 on: 3 bits of mantissa, the exponent's bias 7 in place of 127. The carry of rounding up runs into the exponent.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Below: multiples of 2^-9, which is the unit in the last place of the sum with 1.5 * 2^14.
    shifted = tl.abs(x) + 24576.0
    small = shifted.to(tl.int32, bitcast=True) - 0x46C00000
    code = tl.where(magnitude < 0x3C800000, small, tl.minimum(normal, 126))
    code = tl.where(magnitude > 0x7F800000, 127, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _codes(x, inverse):
    """The codes of x * inverse; infinity is NaN, and what only the product takes out of range is 448."""
    x = x.to(tl.float32)
    return _e4m3(tl.where(tl.abs(x) == float("inf"), float("nan"), x) * inverse)


@triton.jit
def _magnitude(x):
    """The bits of |x|, as integers in the order of the values; NaN is above infinity."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _amax(x_ptr, D, BLOCK: tl.constexpr):
    """The largest magnitude of a row; NaN if there is one."""
    col = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.int32)
    whole = D // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):  # without a mask: 16-byte accesses
        found = tl.maximum(found, _magnitude(tl.load(x_ptr + start + col)))
    if whole < D:
        found = tl.maximum(found, _magnitude(tl.load(x_ptr + whole + col, mask=whole + col < D, other=0.0)))
    return tl.max(found, 0).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["stride_given"])
def _quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, inverse_ptr, stride_xm, stride_given, D, PADDED,
    BLOCK: tl.constexpr, TINY: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One row of x [N, D] to codes [N, PADDED]. inverse_ptr: what to multiply by, per row or (stride_given = 0) for all; None:
    found here, and the row's scale is written."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    codes_ptr += row * PADDED
    if inverse_ptr is None:
        amax = _amax(x_ptr, D, BLOCK)
        amax = tl.where(amax < TINY, TINY, amax)
        amax += amax - amax  # infinity becomes NaN
        tl.store(scale_ptr + row, tl.div_rn(amax, LARGEST))
        inverse = tl.div_rn(1.0, amax) * LARGEST
    else:
        inverse = tl.load(inverse_ptr + row * stride_given)
    col = tl.arange(0, BLOCK)
    whole = D // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        tl.store(codes_ptr + start + col, _codes(tl.load(x_ptr + start + col), inverse))
    if whole < PADDED:
        tail = tl.load(x_ptr + whole + col, mask=whole + col < D, other=0.0)
        tl.store(codes_ptr + whole + col, _codes(tail, inverse), mask=whole + col < PADDED)


@triton.jit(do_not_specialize=["M"])  # one compile, whatever the batch
def _product_kernel(
    a_ptr, b_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, y_ptr, stride_scale_a, stride_scale_b, M, N, K,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y [M, N] = (a b^T) scale_a[row] scale_b[column] + bias for codes a [M, K] and b [N, K], K whole tiles."""
    row, col = tile_of_grid(M, N, BLOCK_M, BLOCK_N, GROUP)
    read_row, read_col = readable(row, col, M, N, WIDE, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + read_row[:, None] * K + k[None, :]
    b_tile = b_ptr + k[:, None] + read_col[None, :] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        # Hopper's tensor cores sum fp8 products in 14 bits: each tile's sum is added to acc in fp32.
        acc = tl.dot(tl.load(a_tile), tl.load(b_tile), acc, max_num_imprecise_acc=BLOCK_K)
        a_tile += BLOCK_K
        b_tile += BLOCK_K
    acc *= tl.load(scale_a_ptr + read_row * stride_scale_a)[:, None]
    acc *= tl.load(scale_b_ptr + read_col * stride_scale_b)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + read_col).to(tl.float32)[None, :]
    live = (row < M)[:, None] & (col < N)[None, :]
    tl.store(y_ptr + row[:, None] * N + col[None, :], acc.to(y_ptr.dtype.element_ty), mask=live)


def quantize(matrix, by_row, given=None):
    """As fp8_linear.quantize, but for zeros that fill the rows of codes up to a multiple of 128."""
    N, D = matrix.shape
    if N == 0 or D == 0:
        codes, scale = steps.quantize(matrix, by_row, given)
        return _padded(codes), scale
    padded = triton.cdiv(D, _PAD) * _PAD
    matrix = rows(matrix)
    codes = torch.empty((N, padded), dtype=torch.uint8, device=matrix.device)
    scale, inverse, stride = torch.empty((N, 1), dtype=torch.float32, device=matrix.device), None, 0
    if given is not None or not by_row:
        scale, inverse = steps.scale_and_inverse(matrix, by_row, given)
        stride = 1 if scale.shape[0] > 1 else 0
    # The largest power of two within the row, so that at most its tail takes a mask.
    block = max(_PAD, min(_ROW, 1 << (D.bit_length() - 1))) if generation(matrix.device) else _PAD
    _quantize_kernel[(N,)](
        matrix, codes, scale, inverse, matrix.stride(0), stride, D, padded,
        BLOCK=block, TINY=steps.TINY, LARGEST=steps.LARGEST, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return codes.view(steps.CODES), scale


def _padded(codes):
    """Codes [N, D] with zeros up to a multiple of 128 columns; as they are where they have no more and lie in one run."""
    N, D = codes.shape
    if D % _PAD == 0 and codes.is_contiguous():
        return codes
    out = torch.zeros((N, triton.cdiv(D, _PAD) * _PAD), dtype=torch.uint8, device=codes.device)
    out[:, :D].copy_(codes.view(torch.uint8))
    return out.view(steps.CODES)


def product(codes, scale, weight_codes, weight_scale, bias, dtype):
    """codes [M, K'] of x and [N, K] of the weight -> [M, N] in dtype."""
    weight_codes = _padded(weight_codes)
    (M, K), N = codes.shape, weight_codes.shape[0]
    if M * N * K == 0:
        return steps.wide_product(codes, scale, weight_codes, weight_scale, bias, dtype)
    y = torch.empty((M, N), dtype=dtype, device=codes.device)
    found = generation(codes.device)
    tile = (_FEW if M <= 64 else _SETTINGS)[found] if found else (32, 32, 128, 4, 1)
    if found and N % 16:
        tile = _ODD
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    options = dict(zip(names, tile)) | {"GROUP": GROUP, "WIDE": N % 16 == 0}
    _product_kernel[grid(M, N, options)](
        codes, weight_codes, scale, weight_scale, dense(bias), y,
        1 if scale.shape[0] > 1 else 0, 1 if weight_scale.shape[0] > 1 else 0, M, N, K, **options,
    )  # fmt: skip
    return y


def fp8_linear_fwd(x, weight, bias, weight_scale, input_scale, by_row):
    """-> y; see fp8_linear.forward."""
    return steps.forward(quantize, product, x, weight, bias, weight_scale, input_scale, by_row)
