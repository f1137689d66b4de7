"""One launch over whole lists of tensors, such as an optimizer's.

The tensors are cut into blocks. A table on the device holds the addresses of every parameter's tensors, one column for each
list; others hold the sizes, and the parameter and the block of each program. All are built on the host and kept, since the
same lists come back at every step.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

BLOCK = 2048  # elements of a program
_TL = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
    torch.int16: tl.int16, torch.int8: tl.int8, torch.uint8: tl.uint8,
}  # fmt: skip
# What CUDA graphs read at every replay: the tables, and the pinned host memory their copies start from. It lives as long as the
# process: nothing says when the last replay was. Some bytes per parameter and 8 per block of it, for each graph.
_captured: list = []


class Table(NamedTuple):
    """What a program reads to find its data: address [tensors, lists], size and stream [tensors], owner and block [programs]."""

    address: Any
    size: Any
    stream: Any  # number of each parameter's random numbers; None where none are drawn
    owner: Any
    block: Any


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


def _to_device(host, device):
    if device.type != "cuda":
        return host.to(device)
    host = host.pin_memory()  # the copy does not wait for the device
    there = host.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.append((host, there))
    return there


# A cached table belongs to the CUDA stream it was copied on: a kernel on another could read it before the copy has ended, and
# once it was evicted its memory would be free for others while that kernel still read it. On one stream order settles both.


@functools.lru_cache(maxsize=32)
def _addresses(pointers: tuple[tuple[int, ...], ...], device: torch.device, cuda_stream: int):
    return _to_device(torch.tensor(pointers, dtype=torch.int64).t().contiguous(), device)


@functools.lru_cache(maxsize=32)
def _streams(streams: tuple[int, ...], device: torch.device, cuda_stream: int):
    return _to_device(torch.tensor([s & 0x7FFFFFFF for s in streams], dtype=torch.int32), device)


@functools.lru_cache(maxsize=32)
def _blocks(sizes: tuple[int, ...], device: torch.device, cuda_stream: int):
    """-> size of each tensor (int64), and for each program its tensor and its block within that tensor (int32)."""
    size = torch.tensor(sizes, dtype=torch.int64)
    count = (size + BLOCK - 1) // BLOCK
    owner = torch.repeat_interleave(torch.arange(len(sizes)), count)
    block = torch.arange(owner.numel()) - (count.cumsum(0) - count)[owner]
    return tuple(_to_device(t, device) for t in (size, owner.int(), block.int()))


def table_of(lists, streams: list[int] | None) -> tuple[Table, bool]:
    """The table of these lists (the first has all the parameters, absent ones are empty), and whether all addresses are multiples
    of 16 bytes. Each list has one dtype, and tensors of equal place are contiguous."""
    params, device = lists[0], lists[0][0].device
    pointers = tuple(tuple(t.data_ptr() for t in tensors) if tensors else (0,) * len(params) for tensors in lists)
    sizes = tuple(t.numel() for t in params)
    streams = None if streams is None else tuple(streams)
    at, make = (device, 0), (_addresses, _streams, _blocks)
    if device.type == "cuda":
        at = (device, torch.cuda.current_stream(device).cuda_stream)
        if torch.cuda.is_current_stream_capturing():
            # The copies become nodes of the graph: their results hold nothing before a replay and must not be found later.
            make = [cached.__wrapped__ for cached in make]
    addresses, random, blocks = make
    size, owner, block = blocks(sizes, *at)
    table = Table(addresses(pointers, *at), size, None if streams is None else random(streams, *at), owner, block)
    return table, all(p % 16 == 0 for column in pointers for p in column)


def type_of(tensors) -> tl.dtype | None:
    """Triton's type of a list's elements; None for an absent list."""
    return _TL[tensors[0].dtype] if tensors else None
