"""The Euclidean norm of a list of tensors: one launch per dtype, and one program that adds up.

Every program sums the squares of its share of the blocks, in an order that depends on the sizes alone, into one place of a
small array; the last launch adds that array. A ticket that lets the last program to finish do so would save this launch, but
needs a counter that is zero before every call: filling it is a launch too, and one kept between calls is wrong as soon as two
streams use it or a kernel is cut off.

Squares of fp32 and bf16 numbers overflow from 1.8e19 on. A program whose sum is not finite reads its share again, scaled down.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .adamw import _BLOCK as BLOCK
from .adamw import _TL as TL_TYPES
from .adamw import _tables as tables
from .common import num_sms

_PROGRAMS_PER_SM = 8
_CHUNK = 1024


@triton.jit
def _share(address_ptr, size_ptr, owner_ptr, block_ptr, blocks, scale, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """The sum of (scale * x)^2 over blocks pid, pid + programs, ... of all tensors."""
    col = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for index in range(tl.program_id(0), blocks, tl.num_programs(0)):
        owner = tl.load(owner_ptr + index)
        start = tl.load(block_ptr + index).to(tl.int64) * BLOCK
        size = tl.load(size_ptr + owner)
        x_ptr = tl.load(address_ptr + owner).to(tl.pointer_type(TYPE)) + start
        if ALIGNED:
            x_ptr = tl.multiple_of(x_ptr, 16)
        if start + BLOCK <= size:  # without a mask: 16-byte accesses
            x = tl.load(x_ptr + col).to(tl.float32) * scale
            total += x * x
        else:
            x = tl.load(x_ptr + col, mask=start + col < size, other=0.0).to(tl.float32) * scale
            total += x * x
    return tl.sum(total)


@triton.jit
def _square_sums_kernel(address_ptr, size_ptr, owner_ptr, block_ptr, blocks, sum_ptr, scaled_ptr, TYPE: tl.constexpr,
                        ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program's sum of squares, or if that overflows (or is not finite) the sum of (x / 2^96)^2 and 0."""
    total = _share(address_ptr, size_ptr, owner_ptr, block_ptr, blocks, 1.0, TYPE, ALIGNED, BLOCK)
    scaled = total * 0.0
    if not total < float("inf"):
        scaled = _share(
            address_ptr, size_ptr, owner_ptr, block_ptr, blocks, 1.262177448353619e-29, TYPE, ALIGNED, BLOCK
        )
        total = 0.0
    tl.store(sum_ptr + tl.program_id(0), total)
    tl.store(scaled_ptr + tl.program_id(0), scaled)


@triton.jit
def _norm_kernel(sum_ptr, scaled_ptr, norm_ptr, count, CHUNK: tl.constexpr):
    tiny = 1.262177448353619e-29  # 2^-96
    col = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    scaled = tl.zeros([CHUNK], tl.float32)
    large = tl.zeros([CHUNK], tl.float32)
    for start in range(0, count, CHUNK):
        plain = tl.load(sum_ptr + start + col, mask=start + col < count, other=0.0)
        extra = tl.load(scaled_ptr + start + col, mask=start + col < count, other=0.0)
        total += plain
        scaled += extra + plain * tiny * tiny
        large += extra
    total = tl.sum(total)
    large = tl.sum(large)
    # Plain sums may overflow together. `large` is NaN or infinite if a number is.
    fits = (total < float("inf")) & (large == 0)
    tl.store(norm_ptr, tl.where(fits, tl.sqrt(total), tl.sqrt(tl.sum(scaled)) * 7.922816251426434e28))


def global_norm(tensors):
    """fp32 0-d norm of contiguous (or dense) tensors with elements, of fp32, bf16 and fp16, on one device."""
    device = tensors[0].device
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for t in tensors:
        groups.setdefault(t.dtype, []).append(t)
    launches, count = [], 0
    for dtype, group in groups.items():
        pointers = tuple(t.data_ptr() for t in group)
        table = tables(pointers, tuple(t.numel() for t in group), device)
        programs = min(table[2].numel(), _PROGRAMS_PER_SM * num_sms(device))
        launches.append((dtype, table, programs, all(p % 16 == 0 for p in pointers)))
        count += programs
    sums = torch.empty(2, count, dtype=torch.float32, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    begin = 0
    for dtype, table, programs, aligned in launches:
        part = sums[:, begin : begin + programs]
        _square_sums_kernel[(programs,)](
            *table, table[2].numel(), part[0], part[1], TL_TYPES[dtype], ALIGNED=aligned, BLOCK=BLOCK, num_warps=8
        )
        begin += programs
    _norm_kernel[(1,)](sums[0], sums[1], norm, count, CHUNK=_CHUNK, num_warps=4)
    return norm
