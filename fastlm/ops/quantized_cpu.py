"""int8 and int4 weights on the CPU by torch's products of integers, which read a fourth of what fp32 ones read, or less.

fp32 activations are not rounded to 8 bits for it. A row is written as three digits to the base 254, each an int8 number from
-127 to 127: x = (largest / 127) * (d0 + d1 / 254 + d2 / 254^2), off by at most 2^-24 of the row's largest value. A product of
digits and codes is a sum of integers, which int32 holds exactly, and the three are put together in fp32: the idea of Ozaki et
al. 2012 (doi:10.1007/s11075-011-9478-1). So the error does not depend on the number of threads, and is that of an fp32 product as
long as the row's largest values meet weights of some size: an output whose weights are 0 wherever x is large is off by up to
2^-24 of the row's largest value times the sum of its weights' sizes, where an fp32 product is off by as much of its own terms.
Measured on one core of an EPYC 9004 (K = N = 4096, fp32): 1.7 ms for one row, 3.2 by F.linear with an fp32 weight, 40 where that
is dequantised first; 62 ms for 256 rows, 96 by F.linear.
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops import _native
from fastlm.ops.quantize import dequantize_weight, unpack_int4

BASE = 254
_STEPS = torch.tensor([0.0, 127, 127 * BASE, 127 * BASE**2]).view(4, 1, 1)
_PLACES = torch.tensor([[1 / 127, 1 / 127 / BASE, 1 / 127 / BASE**2]])
_MOST_COLUMNS = 2**31 // (127 * 128)  # of which int32 holds the sum
_SMALLEST = 2.0**-126  # of a row's largest value
# torch's product of bf16 and int8 (fp32 sums) reads the codes once, but is no match for tiled products beyond these rows.
BF16_ROWS = 16
_BF16_COLUMNS = 32  # in other widths it reads beyond its tensors: wrong results, or a crash (torch 2.13)
# One row takes a path of its own in torch's int8 product, which does not copy the weight first. For a few rows of a weight of so
# many elements, row by row is faster than at once.
_FEW, _LARGE = 4, 1 << 23
# Digits are not worth their making for smaller weights, and take three times the memory of y.
_SMALL, _DIGIT_ROWS = 1 << 18, 256


def few_rows_product(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor | None:
    """ops.quantized_linear for what torch's int8 products serve: 8 bits, one scale a row, no zeros. None for all else, where
    the dequantised weight is the better way, and on CPUs whose products of int8 saturate."""
    if not _scaled_by_row(zero, bits, group_size) or x.dtype == torch.float64 or not x.numel() or not codes.numel():
        return None
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype != torch.bfloat16:
        y = _digits(rows, codes, scale, bias)
    elif rows.shape[0] > BF16_ROWS:
        y = None
    elif (
        bias is not None
    ):  # sums that were rounded to bf16 first may be 0 but for the error where the bias cancels them
        y = _digits(rows, codes, scale, bias)
    else:
        y = _bf16(rows, codes, scale) if x.shape[-1] % _BF16_COLUMNS == 0 else None
    return None if y is None else y.view(*x.shape[:-1], codes.shape[0])


def by_codes(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor | None:
    """The product with the codes cast to x's dtype, where they are exact, and the scale on the sums: one pass over the codes, not
    two or three. For what `few_rows_product` may serve. None for all else: fp16, whose range does not hold such sums, bf16 with a
    bias, which must be added before the sums are rounded, and where a sum is beyond the dtype (or x has an inf or NaN)."""
    bf16 = x.dtype == torch.bfloat16
    if not _scaled_by_row(zero, bits, group_size) or x.dtype == torch.float16 or (bf16 and bias is not None):
        return None
    y = torch.nn.functional.linear(x, codes.to(x.dtype))
    if not math.isfinite(y.sum().item()):  # of a sum that is inf or NaN it is so as well
        return None
    if bf16:
        return (y * scale.float()).to(x.dtype)
    y = y.mul_(scale)
    return y if bias is None else y.add_(bias)


def gradient_by_codes(
    dy: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int
) -> Tensor | None:
    """dy W likewise, with the scale on dy."""
    if not _scaled_by_row(zero, bits, group_size) or dy.dtype == torch.float16:
        return None
    return torch.matmul((dy * scale).to(dy.dtype), codes.to(dy.dtype))


def _scaled_by_row(zero, bits, group_size):
    return bits == 8 and not group_size and zero is None


def _bf16(x, codes, scale):
    # The scale is applied in fp32 to sums that were rounded once: rounding the scale itself to bf16 would bend whole rows.
    sums = _native.int8_weight_product(x.contiguous(), codes.contiguous(), scale.new_ones(len(scale), dtype=x.dtype))
    return (sums * scale.float()).to(x.dtype)


def _digits(x, codes, scale, bias):
    M, K = x.shape
    if codes.numel() < _SMALL or M > _DIGIT_ROWS or K > _MOST_COLUMNS or not _native.int8_products_are_exact():
        return None
    if 1 in codes.shape:  # the product takes [K, 1] for its transpose
        return None
    wide = x.float()
    largest = torch.linalg.vector_norm(wide, math.inf, -1, keepdim=True).clamp_(min=_SMALLEST)
    # Rounded to 0, 1, 2 and 3 digits; what each adds to 254 times the one before is a digit.
    rounded = (wide / largest * _STEPS).round_()
    digits = torch.sub(rounded[1:], rounded[:3], alpha=BASE).to(torch.int8).reshape(3 * M, K)
    sums = _sums(digits, codes).to(torch.float32)
    # The scale first: sums of codes times the largest value of x may be beyond fp32.
    y = torch.mm(_PLACES, sums.view(3, -1)).view(M, -1).mul_(scale)
    y = y.mul_(largest) if bias is None else torch.addcmul(bias.float(), y, largest)
    if not math.isfinite(largest.max().item()):  # what an inf or NaN gives depends on the weights that it meets
        bad = largest.isfinite().logical_not_().view(M)
        y[bad] = _plain(wide[bad], codes, scale, bias)
    return y if y.dtype is x.dtype else y.to(x.dtype)


def _plain(x, codes, scale, bias):
    weight = dequantize_weight(codes, scale, bits=8)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.float())


def _product_takes(codes):
    """Whether torch's int8 product reads codes [N, K] rightly: rows or columns one after the other, none of them twice."""
    (N, K), (row, column) = codes.shape, codes.stride()
    return (column == 1 and row >= K) or (row == 1 and column >= N)


def _sums(digits, codes):
    """digits [R, K] times codes [N, K] transposed, int32 [R, N]."""
    codes = codes if _product_takes(codes) else codes.contiguous()
    weight, R = codes.t(), digits.shape[0]
    if R > 3 and (R > 3 * _FEW or codes.numel() < _LARGE):
        return _native.int8_product(digits, weight)
    out = torch.empty((R, weight.shape[1]), dtype=torch.int32)
    for row, to in zip(digits.split(1), out.split(1)):
        _native.int8_product(row, weight, out=to)
    return out


class PackedInt4(NamedTuple):
    """int4 codes and scales in the order of torch's int4 product for CPUs, whose scales are bf16."""

    packed: Tensor
    scales_and_offsets: Tensor
    group_size: int

    @classmethod
    def of(
        cls, codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int, round_scales: bool
    ) -> PackedInt4 | None:
        """None where torch's product does not take the shape: N must be a multiple of 16, K one of group_size. None for scales
        that bf16 does not hold, unless round_scales: it bends whole groups, by up to 2^-9. And None with zero points, whose
        share of a group the product takes in bf16 as well: all its weights, 0 among them, would be off by the same."""
        if not codes.shape[0] or codes.shape[0] % 16 or columns % group_size or codes.device.type != "cpu":
            return None
        narrow = scale.t().to(torch.bfloat16)
        if zero is not None or not (round_scales or torch.equal(narrow.float(), scale.t().float())):
            return None
        both = torch.stack((narrow, torch.zeros_like(narrow)), -1).contiguous()
        return cls(_native.pack_int4_for_cpu(unpack_int4(codes, group_size).int()), both, group_size)

    def product(self, x: Tensor) -> Tensor:
        """x [M, K] bf16 -> [M, N] bf16, sums in fp32."""
        return _native.int4_weight_product(x.contiguous(), self.packed, self.group_size, self.scales_and_offsets)


class Int4RowProduct:
    """RowProduct for int4 codes; their scales are rounded to bf16."""

    def __init__(self, weight: PackedInt4, bias: Tensor | None, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.weight = x, y, weight
        self.bias = None if bias is None else bias.detach().float()
        self.narrow = torch.zeros((1, len(x)), dtype=torch.bfloat16)

    def __call__(self) -> None:
        self.narrow.copy_(self.x)
        self.y.copy_(self.weight.product(self.narrow)[0])
        if self.bias is not None:
            self.y.add_(self.bias)

    def add(self) -> None:
        self.narrow.copy_(self.x)
        self.y.add_(self.weight.product(self.narrow)[0])
        if self.bias is not None:
            self.y.add_(self.bias)


class RowProduct:
    """y = W x + bias or, by `add`, y += W x + bias, for fp32 vectors x [K] and y [N] that stay where they are: for decoding. W is
    int8 codes with one scale a row.

    x and W x are rounded to bf16, an eighth of the error that W's codes have. One pass over the codes: in a whole step, where
    every weight comes from beyond the cache, the fastest way there is.
    """

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.codes = x, y, codes.contiguous()
        self.scale, self.bias = scale.float(), None if bias is None else bias.detach().float()
        self.narrow = torch.zeros((1, len(x)), dtype=torch.bfloat16)
        self.ones = torch.ones(len(y), dtype=torch.bfloat16)
        self.change = torch.zeros(len(y))

    @staticmethod
    def reason_against(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, x: Tensor) -> str | None:
        """Why this weight must do without, or None."""
        if bits != 8 or zero is not None or scale.ndim != 1:
            return "it is for int8 codes with one scale a row and no zeros"
        if x.dtype != torch.float32 or codes.shape[1] % _BF16_COLUMNS:
            return f"it is for fp32 vectors of a multiple of {_BF16_COLUMNS} elements, got {x.dtype} [{codes.shape[1]}]"
        return None

    def __call__(self) -> None:
        if self.bias is None:
            self.y.copy_(self._sums()).mul_(self.scale)
        else:
            torch.addcmul(self.bias, self.change.copy_(self._sums()), self.scale, out=self.y)

    def add(self) -> None:
        self.y.addcmul_(self.change.copy_(self._sums()), self.scale)
        if self.bias is not None:
            self.y.add_(self.bias)

    def _sums(self) -> Tensor:
        """In units of the scales, which are not rounded to bf16: that would bend whole rows."""
        self.narrow.copy_(self.x)
        return _native.int8_weight_product(self.narrow, self.codes, self.ones)[0]


class FineRowProduct:
    """RowProduct for logits, whose order must not depend on bf16: x has 16 bits, a 65,024th of its largest value, and y 24.

    Two products of integers, one for either byte of x.
    """

    # Added to a number below 2^22 they leave its integer part, rounded, in the low bits of the sum's mantissa: the second byte of
    # the first sum and the first byte of the other one are its two digits to the base 256, from -128 to 127.
    _ROUND = torch.tensor([[1.5 * 2**23 + 128], [1.5 * 2**23]])
    _RANGE = 127.0 * 256

    def __init__(self, codes: Tensor, scale: Tensor, x: Tensor, y: Tensor) -> None:
        N, K = codes.shape
        self.x, self.y, self.weight, self.scale = x, y, codes.contiguous().t(), scale.float()
        self.shifted = torch.zeros(2, K)
        self.bytes = self.shifted.view(torch.int8).as_strided((2, K), (4 * K - 1, 4), 1)
        self.digits = torch.zeros((2, K), dtype=torch.int8)
        self.sums = torch.zeros((2, N), dtype=torch.int32)
        self.wide = torch.zeros(2, N)
        self.pairs = tuple(zip(self.digits.split(1), self.sums.split(1)))

    @staticmethod
    def reason_against(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, x: Tensor) -> str | None:
        """Why this CPU or this weight must do without, or None."""
        if bits != 8 or zero is not None or scale.ndim != 1:
            return "it is for int8 codes with one scale a row and no zeros"
        if x.dtype != torch.float32 or codes.shape[1] > _MOST_COLUMNS:
            return f"it is for fp32 vectors of at most {_MOST_COLUMNS} elements, got {x.dtype} [{codes.shape[1]}]"
        if 1 in codes.shape:
            return "torch's int8 product takes [K, 1] for its transpose"
        if sys.byteorder != "little" or not _native.int8_products_are_exact():
            return "this CPU's int8 products saturate, or its numbers begin with their last byte"
        return None

    def __call__(self) -> None:
        least, most = torch.aminmax(self.x)
        largest = max(-least.item(), most.item(), 1e-30)
        torch.add(self._ROUND, self.x, alpha=self._RANGE / largest, out=self.shifted)
        self.digits.copy_(self.bytes)
        for digits, sums in self.pairs:
            _native.int8_product(digits, self.weight, out=sums)
        self.wide.copy_(self.sums)
        torch.add(self.wide[1], self.wide[0], alpha=256, out=self.y)
        self.y.mul_(self.scale).mul_(largest / self._RANGE)
