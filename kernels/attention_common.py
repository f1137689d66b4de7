"""What the attention kernels share: who sees whom, the order of tiles, row views, launch settings.

Every kernel walks a one-dimensional grid of (head, tile) pairs; see `head_and_tile`. Scores live in base 2: with
`scale_log2 = scale * log2(e)` the softmax is exp2(score * scale_log2 - max), one fused multiply-add and one exp2.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LARGE_MEMORY = 227 << 10  # shared memory of a program on Hopper and data-centre Blackwell, bytes
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def head_and_tile(tiles, heads, section, LAST_FIRST: tl.constexpr):
    """The (head, tile) of this program, 0 <= head < heads, 0 <= tile < tiles.

    Heads come in sections whose keys and values fit in the L2 cache together. Within a section the heads alternate and the
    longest tiles of a causal mask come first, so that the short ones fill the gaps at the end.
    """
    pid = tl.program_id(0)
    first = pid // (section * tiles) * section
    width = tl.minimum(heads - first, section)
    rest = pid - first * tiles
    tile = rest // width
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return first + rest % width, tile


@triton.jit
def key_limits(lengths_ptr, b, S, T, CORNER: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """(limit, offset): query i sees key j where j < limit and, if causal, j <= i + offset."""
    limit = T
    if HAS_LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), T).to(tl.int32)
    offset = 0
    if CORNER == 1:
        offset = limit - S
    return limit, offset


@triton.jit
def visible(query, key, limit, offset, CORNER: tl.constexpr):
    """Boolean tile; query and key are positions, broadcast against each other."""
    seen = key < limit
    if CORNER != 0:
        seen = seen & (key <= query + offset)
    return seen


@triton.jit
def live(position, limit, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Load mask of a tile [ROWS, BLOCK]: rows below limit (if MASK_ROWS), columns below WIDTH. Folds away if all true."""
    mask = tl.full((ROWS, BLOCK), True, tl.int1)
    if MASK_ROWS:
        mask = mask & (position < limit)[:, None]
    if WIDTH != BLOCK:
        mask = mask & (tl.arange(0, BLOCK) < WIDTH)[None, :]
    return mask


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] with unit stride along D; itself wherever its strides allow."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def padded(width: int) -> int:
    """The power of two (at least 16, what tl.dot takes) in which a head of this width is computed."""
    return max(16, triton.next_power_of_2(width))


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products follow torch's own setting; 16-bit ones have a single precision."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def heads_per_section(heads: int, length: int, row_bytes: int) -> int:
    """How many heads to work on at once so that the rows they all read (length * row_bytes each) stay in L2."""
    return max(1, min(heads, (24 << 20) // max(1, length * row_bytes)))


@cache
def _device_shared_memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may use; 0 on the CPU (the interpreter, which wants small tiles)."""
    if device.type == "cuda":
        return _device_shared_memory(device.index)
    if device.type == "cpu":
        return 0
    # Meta tensors: kernels are being compiled ahead of time for the driver's target.
    return LARGE_MEMORY if triton.runtime.driver.active.get_current_target().arch in (90, 100, 103) else 99 << 10
