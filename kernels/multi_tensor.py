"""One launch over whole lists of tensors, such as an optimizer's: how programs find their data in tensor_table.py's tables."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

_TL = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
    torch.int16: tl.int16, torch.int8: tl.int8, torch.uint8: tl.uint8,
}  # fmt: skip


class Numbers(NamedTuple):
    """The numbers of a step. Where a tensor is given its value is read on the device, and the float beside it means nothing."""

    lr_ptr: Any
    step_ptr: Any
    scale_ptr: Any
    found_ptr: Any  # nonzero: the step is skipped
    seed_ptr: Any  # int64 (seed, offset)
    lr: float
    step: float
    scale: float
    average_rest: float  # 1 - the decay of the averages


@triton.jit
def place(table, found_ptr, BLOCK: tl.constexpr):
    """-> this program's parameter, its first element, and the size of the parameter: 0, so that nothing is live, in a skipped
    step."""
    owner = tl.load(table.owner + tl.program_id(0))
    start = tl.load(table.block + tl.program_id(0)).to(tl.int64) * BLOCK
    size = tl.load(table.size + owner)
    if found_ptr is not None:
        size = tl.where(tl.load(found_ptr) != 0, 0, size)
    return owner, start, size


@triton.jit
def pointer(table, LIST: tl.constexpr, owner, start, TYPE: tl.constexpr, LISTS: tl.constexpr, ALIGNED: tl.constexpr):
    """Where element `start` of the parameter's tensor in this list lies; None if TYPE is, for a list that is absent."""
    if TYPE is None:
        found = None
    else:
        found = tl.load(table.address + owner * LISTS + LIST).to(tl.pointer_type(TYPE)) + start
        if ALIGNED:
            found = tl.multiple_of(found, 16)
    return found


@triton.jit
def number(ptr, value):
    """A number that is given by value, or on the device."""
    if ptr is not None:
        value = tl.load(ptr).to(tl.float32)
    return value


def type_of(tensors) -> tl.dtype | None:
    """Triton's type of a list's elements; None for an absent list."""
    return _TL[tensors[0].dtype] if tensors else None
