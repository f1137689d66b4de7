"""The tables with which one launch works on whole lists of tensors, such as an optimizer's; Triton and CUDA kernels read them.

The tensors are cut into blocks. A table on the device holds the addresses of every parameter's tensors, one column for each
list; others hold the sizes, and the parameter and the block of each program. All are built on the host and kept, since the
same lists come back at every step.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

BLOCK = 2048  # elements of a program; FASTLM_TABLE_BLOCK in csrc/multi_tensor.h
# The pinned host memory from which CUDA graphs copy their tables anew at every replay. It lives as long as the process: nothing
# says when the last replay was. Some bytes per parameter and 8 per block of it, for each graph. The tables themselves lie in the
# graph's own pool and go with it: as with every tensor made during a capture, what may take their place there comes after their
# reader.
_captured: list = []
# Numbers of formats in csrc: fastlm_dtype (fastlm.h), and the integers of csrc/multi_tensor.h.
_FORMATS = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int16: 3, torch.int8: 4, torch.uint8: 5
}  # fmt: skip


class Table(NamedTuple):
    """What a program reads to find its data: address [tensors, lists], size and stream [tensors], owner and block [programs]."""

    address: Any
    size: Any
    stream: Any  # number of each parameter's random numbers; None where none are drawn
    owner: Any
    block: Any


def _to_device(host, device):
    if device.type != "cuda":
        return host.to(device)
    host = host.pin_memory()  # the copy does not wait for the device
    there = host.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.append(host)
    return there


# A cached table belongs to the CUDA stream it was copied on: a kernel on another could read it before the copy has ended, and
# once it was evicted its memory would be free for others while that kernel still read it. On one stream order settles both.


@functools.lru_cache(maxsize=32)
def _addresses(pointers: tuple[tuple[int, ...], ...], device: torch.device, cuda_stream: int):
    """-> the table of addresses, and whether all are multiples of 16 bytes."""
    table = _to_device(torch.tensor(pointers, dtype=torch.int64).t().contiguous(), device)
    return table, all(p % 16 == 0 for column in pointers for p in column)


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


@functools.lru_cache(maxsize=32)
def _formats(dtypes: tuple[torch.dtype, ...], device: torch.device, cuda_stream: int):
    return _to_device(torch.tensor([_FORMATS[dtype] for dtype in dtypes], dtype=torch.int32), device)


def _kept(device: torch.device, *cached):
    """The functions that make tables, and for which device and CUDA stream they are to do so."""
    if device.type != "cuda":
        return (device, 0), cached
    at = (device, torch.cuda.current_stream(device).cuda_stream)
    if torch.cuda.is_current_stream_capturing():
        # The copies become nodes of the graph: their results hold nothing before a replay and must not be found later.
        return at, [function.__wrapped__ for function in cached]
    return at, cached


def table_of(lists, streams: list[int] | None) -> tuple[Table, bool]:
    """The table of these lists (the first has all the parameters, absent ones are empty), and whether all addresses are multiples
    of 16 bytes. Each list has one dtype, and tensors of equal place are contiguous."""
    params = lists[0]
    pointers = tuple(tuple([t.data_ptr() for t in tensors]) if tensors else (0,) * len(params) for tensors in lists)
    sizes = tuple([t.numel() for t in params])
    at, (addresses, random, blocks) = _kept(params[0].device, _addresses, _streams, _blocks)
    size, owner, block = blocks(sizes, *at)
    address, aligned = addresses(pointers, *at)
    stream = None if streams is None else random(tuple(streams), *at)
    return Table(address, size, stream, owner, block), aligned


def formats_of(tensors) -> torch.Tensor:
    """The number of each tensor's dtype in csrc, int32 on its device, kept like the tables."""
    at, (formats,) = _kept(tensors[0].device, _formats)
    return formats(tuple([t.dtype for t in tensors]), *at)


def format_of(tensors) -> int:
    """The number in csrc of the dtype of a list; -1 for an absent one."""
    return _FORMATS[tensors[0].dtype] if tensors else -1


def draws(lists, states: int, seeded: bool) -> tuple[bool, bool]:
    """Whether an optimizer step on lists in the order of its op's schema (params, grads, the states, masters, remainders,
    averages, the states' scales) draws random numbers: for its weights, and for the codes of its states."""
    masters, remainders = lists[2 + states : 4 + states]
    weights = seeded and not masters and not remainders and lists[0][0].dtype == torch.bfloat16
    return weights, seeded and any(lists[5 + states :])
