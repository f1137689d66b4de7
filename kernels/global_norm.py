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

from .common import num_sms
from .multi_tensor import pointer, type_of
from .tensor_table import BLOCK, table_of

_PROGRAMS_PER_SM = 8
_CHUNK = 1024


@triton.jit
def _share(table, blocks, scale, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of (scale * x)^2 over blocks pid, pid + programs, ... of all tensors."""
    col = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for index in range(tl.program_id(0), blocks, tl.num_programs(0)):
        owner = tl.load(table.owner + index)
        start = tl.load(table.block + index).to(tl.int64) * BLOCK
        size = tl.load(table.size + owner)
        x_ptr = pointer(table, 0, owner, start, TYPE, 1, ALIGNED)
        if start + BLOCK <= size:  # without a mask: 16-byte accesses
            x = tl.load(x_ptr + col).to(tl.float32) * scale
            total += x * x
        else:
            x = tl.load(x_ptr + col, mask=start + col < size, other=0.0).to(tl.float32) * scale
            total += x * x
    return tl.sum(total)


@triton.jit
def _square_sums_kernel(table, blocks, sum_ptr, scaled_ptr, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """One program's sum of squares, or if that overflows (or is not finite) the sum of (x / 2^96)^2 and 0."""
    total = _share(table, blocks, 1.0, TYPE, ALIGNED, BLOCK)
    scaled = total * 0.0
    if not total < float("inf"):
        scaled = _share(table, blocks, 1.262177448353619e-29, TYPE, ALIGNED, BLOCK)
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
    for group in groups.values():
        table, aligned = table_of([group], None)
        programs = min(table.block.numel(), _PROGRAMS_PER_SM * num_sms(device))
        launches.append((table, programs, type_of(group), aligned))
        count += programs
    sums = torch.empty(2, count, dtype=torch.float32, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    begin = 0
    for table, programs, kind, aligned in launches:
        part = sums[:, begin : begin + programs]
        _square_sums_kernel[(programs,)](
            table, table.block.numel(), part[0], part[1], TYPE=kind, ALIGNED=aligned, BLOCK=BLOCK, num_warps=8
        )
        begin += programs
    _norm_kernel[(1,)](sums[0], sums[1], norm, count, CHUNK=_CHUNK, num_warps=4)
    return norm
