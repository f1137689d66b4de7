"""What every kernel over rows of logits shares: reading a logit, the online softmax, writing a gradient over the logits.

Logits z are as a product wrote them; x is what the loss is taken of, x = scale z, bounded by softcap tanh(x / softcap). A program
owns a row and walks it in tiles; the first pass keeps a running maximum and, per lane, running sums that are rescaled when the
maximum grows (online softmax, arXiv:1805.02867), the second writes the gradient over the logits, which by then mostly come
from L2. `mask` is None for a full tile, whose accesses are then 16 bytes wide.

Rows of odd width, as of a vocabulary of 50,257, begin anywhere. If all tensors of a kernel have them alike (PEEL), their tiles
begin at a multiple of 16 bytes before the row, and only the first and the last tile, which have a mask, are narrow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import row_start, tanh_and_slope

# The maximum before the first tile, the lowest number of fp32: finite, as a whole tile of -inf must not give inf - inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)


def peels(*tensors):
    """PEEL for tensors as at_two_strides of common.py returns them: rows between multiples of 16 bytes, in all of them alike."""
    inner = max(n for _, n, _, _ in tensors)
    places = {
        (n, outer % 8, near % 8) if n > 1 else (inner, inner * outer % 8, outer % 8) for _, n, outer, near in tensors
    }
    return len(places) == 1 and any(places.pop()[1:]) and all(x.data_ptr() % 16 == 0 for x, *_ in tensors)


def strides(tensor):
    """The three arguments of row_of for a tensor as at_two_strides returns it. Rows of one run divide nothing: a division's
    registers took linear_kl_div's reverse divergence from 80 to 96, from three blocks an SM to two."""
    _, inner, outer, near = tensor
    return None if inner == 1 else inner, outer, near


@triton.jit
def row_of(row, inner, stride_outer, stride_inner, PEEL: tl.constexpr):
    """-> the offset of a row, or of the multiple of 8 elements before it, and the elements between the two. inner None is 1."""
    if inner is None:
        offset = row * stride_outer
    else:
        offset = row_start(row, inner, stride_outer, stride_inner)
    first = 0
    if PEEL:
        first = (offset % 8).to(tl.int32)
        offset = tl.multiple_of(offset - first, 8)
    return offset, first


@triton.jit
def ends_of(first, V, PEEL: tl.constexpr, BLOCK_V: tl.constexpr):
    """-> where the last tile without a mask ends, and the row, from where its tiles begin. The first such tile is the second if
    PEEL."""
    end = first + V
    full = end // BLOCK_V * BLOCK_V
    if PEEL:
        full = tl.maximum(full, BLOCK_V)
    return full, end


def kind_of_softcap(softcap):
    """SOFTCAP of a kernel: 0 none, 1 a usual one (30, 50), 2 one so far above the logits that tanh must be exact in 16 bits too:
    its error of 1e-7 is multiplied by the softcap. Not always, as linear_cross_entropy would spill 48 bytes."""
    return 0 if softcap is None else 1 if softcap <= 100 else 2


@triton.jit
def logit_and_slope(z_ptr, mask, scale, softcap, SOFTCAP: tl.constexpr):
    """x of the logits at z_ptr (a pointer or a tile of pointers) in fp32, and the slope of the softcap there; softcap is read
    only if SOFTCAP."""
    x = tl.load(z_ptr, mask=mask).to(tl.float32) * scale
    slope = 1.0
    if SOFTCAP:
        x /= softcap
        exact: tl.constexpr = (z_ptr.dtype.element_ty == tl.float32) or SOFTCAP == 2
        x, slope = tanh_and_slope(x, 2.8853900817779268 * x, exact)
        x *= softcap
    return x, slope


@triton.jit
def logit(z_ptr, mask, scale, softcap, SOFTCAP: tl.constexpr):
    """x alone."""
    x, _ = logit_and_slope(z_ptr, mask, scale, softcap, SOFTCAP)
    return x


@triton.jit
def add_to_softmax(x, mask, peak, sums, MASKED: tl.constexpr):
    """One tile of the first pass: peak (scalar) and sums (per lane) of exp(x - peak), from LOWEST and zeros -> both anew.

    sum(sums) is then sum_v exp(x_v - peak), and its logarithm plus peak the log-sum-exp.
    """
    if MASKED:
        x = tl.where(mask, x, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(x, 0))
    return new_peak, sums * tl.exp(peak - new_peak) + tl.exp(x - new_peak)


@triton.jit
def add_to_moments(x, mask, peak, sums, moments, MASKED: tl.constexpr):
    """add_to_softmax that also keeps moments: per lane, the sum of exp(x - peak) (x - peak), never positive.

    The entropy is then log(sum(sums)) - sum(moments) / sum(sums): two terms >= 0, so nothing cancels.
    """
    if MASKED:
        x = tl.where(mask, x, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(x, 0))
    step = tl.maximum(peak - new_peak, -1000.0)  # not -3e38, whose product with a sum is infinite
    shrink = tl.exp(step)
    below = x - new_peak
    below = tl.where(below < -1000.0, -1000.0, below)  # -inf times its exp of 0 would be NaN; a NaN stays one
    e = tl.exp(below)
    return new_peak, sums * shrink + e, (moments + step * sums) * shrink + e * below


@triton.jit
def store_gradient(z_ptr, mask, gradient, slope, factor, live, scale):
    """One tile of the second pass: factor (of the row) times d(loss)/dz over the logits, from the gradient of the loss by x."""
    # A choice, not a product: a row that is not live may hold anything.
    gradient = tl.where(live, gradient * slope * (factor * scale), 0.0)
    tl.store(z_ptr, gradient.to(z_ptr.dtype.element_ty), mask=mask)
