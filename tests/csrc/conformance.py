"""Runs every instruction that the host body models on a GPU too, on random data, and compares what they give.

    python -m tests.csrc.conformance [--only NAME]... [--repeats N] [--seed N] [--dry]

One line an instruction: how many values were compared, how many differ, the worst error of approximate ones. Bits must be equal
(of NaN in fp32 only that it is one), errors within what csrc/device/cuda.h states. Exit status 0 if all agree, 1 if any differ or
the GPU failed, 2 if nothing could be run: no GPU, no compiler. --dry takes the host body in another order for the GPU.

A case is a launcher of a .cu file here and a function that makes its arguments; to add one, add a row to CASES. Libraries are
kept in build/conformance: a folder built elsewhere serves a machine without nvcc and g++.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import hashlib
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.csrc.host_library import CSRC, FLAGS, ROOT, Both, HostError, HostLibrary, In, Out
from tests.wheels import build_library

BUILT = ROOT / "build" / "conformance"
HERE = Path(__file__).parent
DRY = "the host body, threads in random order, asynchronous work late"
_DRY_ORDER = "random, copies late, products late"


class CannotRun(Exception):
    """Something a comparison needs is not on this machine."""


class DeviceError(Exception):
    """A launch or a kernel failed on the GPU."""


# --- comparing ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Found:
    """What a comparison counted."""

    values: int = 0
    wrong: int = 0
    worst: float = 0.0  # relative, of approximate values
    example: str = ""


def exact(found: Tensor, want: Tensor) -> tuple[Tensor, float]:
    """Which values have other bits. Any NaN of fp32 is as good as any other: the host body does not model what it carries."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    wrong = found.view(bits) != want.view(bits)
    if found.dtype == torch.float32:
        wrong &= ~(found.isnan() & want.isnan())
    return wrong, 0.0


def within(error: float, floor: float = 2.0**-126) -> Callable[[Tensor, Tensor], tuple[Tensor, float]]:
    """A comparison that allows a relative error, or `floor` where the wanted value is too small for that. Half a rounding is
    added for the host body's own."""
    allowed = error + 2.0**-24

    def compare(found: Tensor, want: Tensor) -> tuple[Tensor, float]:
        f, w = found.double(), want.double()
        same = (f == w) | (f.isnan() & w.isnan())
        off = (f - w).abs() / w.abs().clamp_min(floor / error)
        off = torch.where(same, 0.0, off).nan_to_num(math.inf, math.inf)
        return off > allowed, off.max().item() if off.numel() else 0.0

    return compare


def sorted_rows(*outputs: Tensor) -> Sequence[Tensor]:
    """Each row in ascending order: of values that threads got in the order in which they came."""
    return [t.sort(-1).values for t in outputs]


# --- cases --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """An instruction, the launcher of a kernel made of it, and its arguments.

    make(generator) gives the launcher's arguments but the stream: In, Both, Out, ints and tuples of ints. canonical(*outputs)
    turns what the Boths and Outs hold afterwards into what is the same in every order of threads; compare says how near it must
    be. majors: compute capabilities that have the instruction; none for all.
    """

    name: str
    launcher: str
    make: Callable[[torch.Generator], list]
    compare: Callable[[Tensor, Tensor], tuple[Tensor, float]] = exact
    canonical: Callable[..., Sequence[Tensor]] = lambda *outputs: outputs
    source: str = "conformance.cu"
    majors: tuple[int, ...] = ()


def _ints(g, *shape, low=-(2**31), high=2**31, dtype=torch.int32):
    return torch.randint(low, high, shape, generator=g).to(dtype)


def _any_floats(g, *shape):
    """Every pattern of 32 bits is as likely."""
    return _ints(g, *shape).view(torch.float32)


def _subset(g, group: int) -> int:
    """A mask made of whole groups of lanes, as int32, other than none."""
    groups = _ints(g, 32 // group, low=0, high=2).tolist()
    lanes = sum((1 << group) - 1 << i * group for i, taken in enumerate(groups) if taken) or 0xFFFFFFFF
    return lanes - (lanes >> 31 << 32)


def shuffle_arguments(g: torch.Generator, dtype: torch.dtype, rounds: int = 96) -> list:
    """Random values, lanes, distances, widths and masks. Whoever is read is in the reader's mask, as the instruction asks: any
    mask for a shuffle from a lane, whole groups for the others, and a group's own lanes for shuffle_xor under a mask."""
    argument, widths, kinds, masks = (torch.zeros(rounds, n, dtype=torch.int32) for n in (32, 1, 1, 1))
    for i in range(rounds):
        width = 1 << int(_ints(g, 1, low=0, high=6))
        kind = (1, 14, 14, 8)[i % 4]
        if kind == 1:
            masks[i] = _subset(g, 1)
            word = int(masks[i]) & 0xFFFFFFFF
            for lane in range(32):
                mine = word if word >> lane & 1 else ~word
                group = [j for j in range(lane & -width, (lane & -width) + width) if mine >> j & 1]
                argument[i, lane] = group[int(_ints(g, 1, low=0, high=len(group)))] + 32 * (
                    lane % 3
                )  # the width wraps it
        elif kind == 14:
            masks[i], argument[i] = _subset(g, width), int(_ints(g, 1, low=0, high=width))
        else:  # bits that lead out of the group: lanes of groups before it are read
            masks[i], argument[i] = -1, int(_ints(g, 1, low=0, high=32))
        widths[i], kinds[i] = width, kind
    info = torch.iinfo(dtype) if not dtype.is_floating_point else None
    x = _ints(g, rounds, 32, low=info.min, high=info.max, dtype=dtype) if info else _any_floats(g, rounds, 32)
    return [In(x), In(argument), In(widths), In(kinds), In(masks), Out(torch.zeros(4, rounds, 32, dtype=dtype)), rounds]


def vote_arguments(g: torch.Generator, rounds: int = 256) -> list:
    """Random predicates (every fourth round all alike) of random sets of lanes."""
    predicate = _ints(g, rounds, 32, low=0, high=2)
    predicate[::8], predicate[4::8] = 1, 0
    masks = torch.tensor([_subset(g, 1) for _ in range(rounds)], dtype=torch.int32)
    return [In(predicate), In(masks), Out(torch.zeros(rounds, 32, 3, dtype=torch.int32)), rounds]


def warp_barrier_arguments(g: torch.Generator, rounds: int = 64) -> list:
    """Random sets of lanes, each passing on to a random cycle of its own."""
    masks = torch.tensor([_subset(g, 1) for _ in range(rounds)], dtype=torch.int32)
    following = torch.zeros(rounds, 32, dtype=torch.int32)
    for i, word in enumerate(masks.tolist()):
        for part in (word, ~word):
            lanes = torch.tensor([j for j in range(32) if part >> j & 1], dtype=torch.long)
            lanes = lanes[torch.randperm(len(lanes), generator=g)]
            following[i, lanes] = lanes.roll(1).int()
    return [In(_ints(g, rounds, 32)), In(following), In(masks), Out(torch.zeros(rounds, 32, dtype=torch.int32)), rounds]


def reduction_arguments(g: torch.Generator) -> list:
    """A block of any size, now and then with NaN and infinities."""
    threads = 32 * int(_ints(g, 1, low=1, high=33))
    x = torch.randn(threads, generator=g) * 10.0 ** float(_ints(g, 1, low=-20, high=20))
    for value in (math.nan, math.inf, -math.inf):
        if int(_ints(g, 1, low=0, high=3)) == 0:
            x[int(_ints(g, 1, low=0, high=threads))] = value
    return [In(x), Out(torch.zeros(9, threads)), threads]


def vector_arguments(g: torch.Generator, dtype: torch.dtype, count: int) -> list:
    size = 4 * 64 * count * torch.empty(0, dtype=dtype).element_size()
    x = _ints(g, size, low=0, high=256, dtype=torch.uint8).view(dtype)
    return [In(x), Out(torch.zeros_like(x))]


def named_barrier_arguments(g: torch.Generator, rounds: int = 33) -> list:
    return [In(_ints(g, rounds, 32)), Out(torch.zeros(rounds, 2, 32, dtype=torch.int32)), rounds]


def extreme_arguments(g: torch.Generator) -> list:
    """Pairs of any numbers, equal ones and NaN; no zeros, of which either may be the larger."""
    a, b = _any_floats(g, 4096), _any_floats(g, 4096)
    b[::5] = a[::5]
    a[::7], b[::11] = math.nan, math.inf
    a[a == 0], b[b == 0] = 1.0, 1.0
    return [In(a), In(b), Out(torch.zeros(2, 4096)), 4096]


def every_half(g: torch.Generator, dtype: torch.dtype) -> list:
    """All 2^16 of them."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return [In(x), Out(torch.zeros(2**16)), 2**16]


def floats_to_halves(g: torch.Generator, dtype: torch.dtype) -> list:
    """Any numbers, every value of the dtype, what lies halfway between two, and a step to either side of both."""
    values = torch.arange(-(2**15), 2**15, 3).to(torch.int16).view(dtype).float().view(torch.int32)
    half = {torch.bfloat16: 1 << 15, torch.float16: 1 << 12}[dtype]
    near = (values[:, None] + torch.tensor([0, 1, -1, half, half + 1, half - 1], dtype=torch.int32)).flatten()
    small = (torch.randn(4096, generator=g) * 2.0**-20).view(torch.int32)
    x = torch.cat([near, small, _ints(g, 40000)]).view(torch.float32)
    return [In(x), Out(torch.zeros(x.numel(), dtype=dtype)), x.numel()]


def function_arguments(g: torch.Generator, low: float, high: float) -> list:
    """Numbers of the interesting range, powers of two with their neighbours, and any numbers."""
    range_ = torch.rand(20000, generator=g) * (high - low) + low
    powers = (torch.arange(1, 255, dtype=torch.int32) << 23)[:, None] + torch.tensor([-1, 0, 1], dtype=torch.int32)
    x = torch.cat([range_, powers.flatten().view(torch.float32), _any_floats(g, 20000)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40])])
    return [In(x), Out(torch.zeros(x.numel())), x.numel()]


def philox_arguments(g: torch.Generator, n: int = 4096) -> list:
    seeds = _ints(g, n, low=-(2**63), high=2**63 - 1, dtype=torch.int64)
    counters = _ints(g, n, 4, low=0, high=2**32, dtype=torch.int64)
    return [In(seeds), In(counters), Out(torch.zeros(n, 4, dtype=torch.int64)), n]


def atomic_arguments(g: torch.Generator, dtype: torch.dtype, low: int, blocks: int = 7) -> list:
    """Of unsigned cells, which torch's signed dtypes stand for, only values that both order alike."""
    n = blocks * 128
    x = _ints(g, n, low=low, high=torch.iinfo(dtype).max, dtype=dtype)
    outputs = [torch.zeros(2, n, dtype=dtype), torch.zeros(blocks, 3, dtype=dtype)]
    return [In(x), Both(torch.zeros(5, dtype=dtype)), *map(Out, outputs), blocks]


def atomic_results(cells: Tensor, old: Tensor, sums: Tensor) -> Sequence[Tensor]:
    """The last exchanged value belongs to those that others got; who got which is open."""
    exchanged = torch.cat([old[0], cells[3:4]])
    return [cells[[0, 1, 2, 4]], *sorted_rows(exchanged, old[1]), sums]


def wrap_arguments(g: torch.Generator, blocks: int = 5) -> list:
    last = int(_ints(g, 1, low=0, high=100))
    return [Both(torch.zeros(1, dtype=torch.int32)), Out(torch.zeros(blocks * 128, dtype=torch.int32)), blocks, last]


def ticket_arguments(g: torch.Generator) -> list:
    blocks = int(_ints(g, 1, low=1, high=12))
    x, counter = torch.randn(blocks, 256, generator=g), torch.zeros(1, dtype=torch.int32)
    return [In(x), Out(torch.zeros(blocks, 256)), Both(counter), Out(torch.zeros(256)), blocks]


def grid_barrier_arguments(g: torch.Generator, blocks: int = 9, rounds: int = 6) -> list:
    state = torch.zeros(2, dtype=torch.int32)
    rows = [Both(_ints(g, blocks, 128, low=-1000, high=1000)) for _ in range(2)]
    return [*rows, Both(state), blocks, rounds]


def flag_arguments(g: torch.Generator, pairs: int = 4, rounds: int = 8) -> list:
    x, box, flags = _ints(g, pairs, rounds, 64), torch.zeros(pairs, 64), torch.zeros(pairs, 2)
    return [In(x), Out(torch.zeros_like(x)), Both(box.int()), Both(flags.int()), pairs, rounds]


def product_arguments(g: torch.Generator, dtype: torch.dtype, n: int) -> list:
    """Whole numbers small enough that fp32 holds every sum: in which order the hardware adds makes no difference."""
    a, b = (_ints(g, rows, 128, low=-16, high=17).to(dtype) for rows in (64, n))
    return [In(a), In(b), Both(_ints(g, 64, n, low=-999, high=999).float()), int(_ints(g, 1, low=0, high=2))]


_PRODUCTS = re.findall(r"^CASE\((\w+), (\w+), (\d+)", (HERE / "wgmma_cases.cu").read_text(), re.MULTILINE)


def cluster_arguments(g: torch.Generator, threads: int = 64) -> list:
    """Whole numbers, whose sums fp32 holds: in which order they are added is the compiler's as well."""
    cluster = 2 ** int(_ints(g, 1, low=0, high=5))
    x = _ints(g, 3 * cluster, threads, low=-100, high=100).float()
    return [In(x), Out(torch.zeros_like(x)), 3 * cluster, cluster]


def cluster_sum_arguments(g: torch.Generator) -> list:
    threads = 32 * int(_ints(g, 1, low=1, high=9))
    x, out, blocks, cluster = cluster_arguments(g, threads)
    return [x, Out(torch.zeros(blocks, 4, threads)), blocks, cluster, threads]


def cluster_count_arguments(g: torch.Generator) -> list:
    blocks, cluster = cluster_arguments(g)[2:]
    x = _ints(g, blocks, 64, low=0, high=8)
    return [In(x), Out(torch.zeros(blocks, 8, dtype=torch.int32)), blocks, cluster]


def rank_arguments(g: torch.Generator) -> list:
    return [Out(torch.zeros(3, 8, 64, 3, dtype=torch.int32)), 2 ** int(_ints(g, 1, low=0, high=4))]


def fragment_arguments(g: torch.Generator, dtype: torch.dtype, warps: int = 6) -> list:
    """A lane's registers, two small whole numbers in each; and sums."""
    a, b = (_ints(g, warps, 32, 2 * n, low=-16, high=17).to(dtype).view(torch.int32) for n in (4, 2))
    return [In(a), In(b), Both(_ints(g, warps, 32, 4, low=-999, high=999).float()), warps // 2]


def word_arguments(g: torch.Generator, results: int, blocks: int = 16) -> list:
    a, b, c = (_ints(g, blocks * 64) for _ in range(3))
    return [In(a), In(b), In(c), Out(torch.zeros(results, blocks * 64).int()), blocks]


def pipeline_arguments(g: torch.Generator) -> list:
    """Rows that end within a tile, in a wider buffer; what lies beside them stays."""
    rows, columns, blocks = (int(_ints(g, 1, low=1, high=n)) for n in (100, 300, 6))
    stride = -(-columns // 8) * 8 + 8 * int(_ints(g, 1, low=0, high=3))
    x, y = (torch.randn(rows, stride, generator=g).bfloat16() for _ in range(2))
    return [In(x), Both(y), rows, columns, stride, blocks]


def box_arguments(g: torch.Generator, dtype: torch.dtype, rank: int) -> list:
    """A box anywhere, also beside the tensor. Strides are multiples of 16 bytes and of each other, as tensor maps ask."""
    size = dtype.itemsize
    sizes = [int(n) for n in _ints(g, rank, low=1, high=9)]
    sizes[0] *= int(_ints(g, 1, low=1, high=20))
    strides = []
    for n in sizes[:-1]:
        span = strides[-1] * n if strides else -(-n * size // 16) * 16 // size
        strides.append(span * int(_ints(g, 1, low=1, high=3)))
    swizzle = int(_ints(g, 1, low=0, high=4))
    width = 16 * 2**swizzle if swizzle else 16 * int(_ints(g, 1, low=1, high=9))
    box = [width // size, *(int(n) for n in _ints(g, rank - 1, low=1, high=5))]
    corner = torch.tensor([int(_ints(g, 1, low=-b, high=n + 2)) for b, n in zip(box, sizes)], dtype=torch.int32)
    x = torch.randn(1 + sum((n - 1) * s for n, s in zip(sizes, (1, *strides))), generator=g).to(dtype)
    five = (*sizes, *[0] * (5 - rank)), (*strides, *[0] * (5 - rank)), (*box, *[0] * (5 - rank))
    return [
        In(x),
        In(corner),
        Out(torch.zeros(math.prod(box), dtype=dtype)),
        rank,
        swizzle,
        five[0],
        five[1][:4],
        five[2],
    ]


def addition_arguments(g: torch.Generator, dtype: torch.dtype) -> list:
    """Whole numbers: in which order the memory adds them is open."""
    rows, columns = (int(_ints(g, 1, low=1, high=n)) for n in (60, 200))
    stride = -(-columns // 8) * 8
    x, y = (_ints(g, n, stride, low=-5, high=6).to(dtype) for n in (rows, 8))
    return [In(x), Both(y), rows, columns, stride]


def bulk_arguments(g: torch.Generator, dtype: torch.dtype, pieces: int = 9) -> list:
    x, total = (_ints(g, n, 32, low=-9, high=10).to(dtype) for n in (pieces, 1))
    return [In(x), Out(torch.zeros_like(x)), Both(total), pieces]


def copy_async_arguments(g: torch.Generator, wide: int) -> list:
    n = int(_ints(g, 1, low=1, high=1500))
    return [In(_any_floats(g, n)), Out(torch.zeros(-(-n // 256) * 256)), n, wide]


def relay_arguments(g: torch.Generator) -> list:
    return [Out(torch.zeros(128)), Out(torch.zeros(128)), Both(torch.zeros(1).int())]


def _with(make: Callable, *values, **named) -> Callable[[torch.Generator], list]:
    return lambda g: make(g, *values, **named)


CASES = [
    *(
        Case(f"shuffle, _up, _down, _xor {name}", f"shuffles_{name}", _with(shuffle_arguments, dtype))
        for name, dtype in (("i32", torch.int32), ("f32", torch.float32), ("i64", torch.int64))
    ),
    Case("warp_ballot, _any, _all", "votes", vote_arguments),
    Case("warp_barrier", "warp_barriers", warp_barrier_arguments),
    Case("warp_sum, _max, block_sum, _max", "reductions", reduction_arguments),
    *(
        Case(f"load_vector, store_vector {name}", f"vectors_{name}", _with(vector_arguments, dtype, count))
        for name, dtype, count in (
            ("u8x1", torch.uint8, 1), ("bf16x1", torch.bfloat16, 1), ("bf16x2", torch.bfloat16, 2),
            ("f32x2", torch.float32, 2), ("u8x16", torch.uint8, 16), ("fp16x8", torch.float16, 8),
            ("f32x4", torch.float32, 4),
        )
    ),
    Case("named_barrier, _arrive", "named_barriers", named_barrier_arguments),
    Case("minimum, maximum", "extremes", extreme_arguments),
    Case("pointer_at, pointer_cast", "pointers", lambda g: [In(_any_floats(g, 64)), Out(torch.zeros(64).int())]),
    Case("fill_zero", "cleared", lambda g: [Both(torch.rand(999, generator=g)), 700]),
    *(Case(f"to_float {n}", f"to_float_{n}", _with(every_half, d)) for n, d in
      (("bf16", torch.bfloat16), ("fp16", torch.float16))),
    *(Case(f"from_float {n}", f"from_float_{n}", _with(floats_to_halves, d)) for n, d in
      (("bf16", torch.bfloat16), ("fp16", torch.float16))),
    Case("fast_exp2", "exp2_of", _with(function_arguments, -130.0, 130.0), within(2.0**-22)),
    Case("fast_log2", "log2_of", _with(function_arguments, 0.4, 2.1), within(2.0**-22, 2.0**-22)),
    Case("fast_rsqrt", "rsqrt_of", _with(function_arguments, 0.5, 4.1), within(2.0**-22.9)),
    Case("fast_reciprocal", "reciprocal_of", _with(function_arguments, -2.1, 2.1), within(2.0**-23)),
    Case("fast_tanh", "tanh_of", _with(function_arguments, -10.0, 10.0), within(2.0**-11)),
    Case("philox", "random_words", philox_arguments),
    *(
        Case(f"atomic_add, _max, _cas, _exchange {n}", f"atomics_{n}", _with(atomic_arguments, d, low), canonical=atomic_results)
        for n, d, low in (("i32", torch.int32, -(2**31)), ("u32", torch.int32, 0), ("u64", torch.int64, 0))
    ),
    Case("atomic_wrap", "wraps", wrap_arguments, canonical=sorted_rows),
    Case("is_last_block", "tickets", ticket_arguments),
    Case("device_fence, grid of blocks that wait", "grid_barriers", grid_barrier_arguments),
    Case("load_acquire, store_release, spin_pause", "flags", flag_arguments),
    *(
        Case(name, launcher, make, source="cluster_cases.cu", majors=(9, 10))
        for name, launcher, make in (
            ("cluster_rank, _blocks", "ranks", rank_arguments),
            ("cluster_barrier, _pointer", "ring", cluster_arguments),
            ("cluster_arrive, _wait", "halves", cluster_arguments),
            ("cluster_sum, _max, _arrive_relaxed", "sums", cluster_sum_arguments),
            ("cluster_pointer, atomic_add", "counts", cluster_count_arguments),
        )
    ),
    *(
        Case(f"{what} {n}", f"{launcher}_{n}", _with(make, *values), source="mma_cases.cu")
        for n, d in (("bf16", torch.bfloat16), ("fp16", torch.float16))
        for what, launcher, make, *values in (
            ("mma", "mma", fragment_arguments, d), ("packed_subtract, pack, byte_permute", "pairs", word_arguments, 3),
        )
    ),
    Case("bitwise", "bitwise_of", _with(word_arguments, 4), source="mma_cases.cu"),
    *(
        Case(f"copy_async<{n}>, _commit, _wait", "ahead", _with(copy_async_arguments, n), source="async_cases.cu")
        for n in (1, 2, 4)
    ),
    *(
        Case(name, launcher, make, source="async_cases.cu", majors=(9, 10))
        for name, launcher, make in (
            ("mbarrier_arrive, _wait, _invalidate", "threads", lambda g: [Out(torch.zeros(9 * 32 + 4).int()), 9]),
            ("mbarrier, tensor_load, _store, elect_one", "pipeline", pipeline_arguments),
            *(
                (f"tensor_load {rank}d {n}", f"box_{n}", _with(box_arguments, d, rank))
                for rank in range(1, 6)
                for n, d in (("bf16", torch.bfloat16), ("float", torch.float32))
            ),
            *(
                (f"tensor_reduce_add {n}", f"add_{n}", _with(addition_arguments, d))
                for n, d in (("float", torch.float32), ("bf16", torch.bfloat16), ("int", torch.int32))
            ),
            *(
                (f"bulk_load, _store, _reduce_add {n}", f"bulk_{n}", _with(bulk_arguments, d))
                for n, d in (("float", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16))
            ),
            ("fence_async_global", "relay", relay_arguments),
            ("fence_async_shared, cluster_pointer", "pass_on", lambda g: [Out(torch.zeros(6, 32)), 2]),
            ("warpgroup_id, elect_one, setmaxnreg", "groups", lambda g: [Out(torch.zeros(384).int())]),
        )
    ),
    *(
        Case(f"wgmma {launcher}", launcher, _with(product_arguments, getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[t]),
                                                  int(n)), source="wgmma_cases.cu", majors=(9,))
        for launcher, t, n in _PRODUCTS
    ),
]  # fmt: skip


# --- running ------------------------------------------------------------------------------------------------------


def built(source: Path, architecture: str = "") -> Path:
    """The library of a file for the host body, or for a GPU (sm_90a). Compiled unless one of the same text and flags stands."""
    if architecture:
        command = ["-std=c++20", "-O3", f"-arch={architecture}", "-cudart", "static", "-Xcompiler", "-fPIC"]
    else:
        command = FLAGS
    command = [*command, f"-I{CSRC}", "-shared", str(source)]
    key = hashlib.sha256(repr([c.replace(str(ROOT), "") for c in command]).encode())
    for part in build_library.included(source):
        key.update(part.read_bytes())
    path = BUILT / f"{source.stem}-{architecture or 'host'}-{key.hexdigest()[:16]}.so"
    if not path.exists():
        try:
            command.insert(0, build_library.find_nvcc() if architecture else "g++")
            path.parent.mkdir(parents=True, exist_ok=True)
            partly = path.with_suffix(".partly.so")
            done = subprocess.run([*command, "-o", str(partly)], capture_output=True, text=True)
        except (build_library.CannotBuild, OSError) as error:
            raise CannotRun(f"{path.name} is not built, and cannot be here: {error}") from None
        if done.returncode:
            raise CannotRun(f"{source.name} does not compile: {done.stderr[-2000:]}")
        partly.replace(path)
    return path


def _results(values: Sequence) -> list[Tensor]:
    return [v.tensor for v in values if isinstance(v, Both | Out)]


def _argument(value: In | int | tuple[int, ...]) -> Any:
    if isinstance(value, In):
        return ctypes.c_void_p(value.tensor.data_ptr())
    return (ctypes.c_int64 * len(value))(*value) if isinstance(value, tuple) else ctypes.c_int64(value)


class Side:
    """One of the two that run launchers. `major` is its compute capability's, None for one that has every instruction."""

    major: int | None = None

    def __init__(self) -> None:
        self._opened: dict[str, Any] = {}

    def has(self, case: Case) -> bool:
        """Whether it has the instruction."""
        return self.major is None or not case.majors or self.major in case.majors

    def library(self, source: str) -> Any:
        """The library of a file, compiled when it is first asked for."""
        if source not in self._opened:
            self._opened[source] = self.open(HERE / source)
        return self._opened[source]

    def open(self, source: Path) -> Any:
        raise NotImplementedError

    def run(self, case: Case, values: Sequence) -> list[Tensor]:
        """What the Boths and Outs among the values hold after the launch; the values stay as they are."""
        raise NotImplementedError


class OnHost(Side):
    """The host body."""

    def __init__(self, order: str = "forward") -> None:
        super().__init__()
        self._order = order

    def open(self, source: Path) -> HostLibrary:
        return HostLibrary(built(source))

    def run(self, case: Case, values: Sequence) -> list[Tensor]:
        values = [type(v)(v.tensor.clone()) if isinstance(v, In) else v for v in values]
        self.library(case.source).run(case.launcher, *values, order=self._order)
        return _results(values)


class OnDevice(Side):
    """The GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.major, minor = torch.cuda.get_device_capability()
        self.architecture = f"sm_{self.major}{minor}" + "a" * (self.major >= 9)

    def open(self, source: Path) -> ctypes.CDLL:
        return ctypes.CDLL(str(built(source, self.architecture)))

    def run(self, case: Case, values: Sequence) -> list[Tensor]:
        values = [type(v)(v.tensor.cuda()) if isinstance(v, In) else v for v in values]
        arguments = [_argument(v) for v in values]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = getattr(self.library(case.source), case.launcher)(*arguments, stream)
        if code:
            raise DeviceError(f"the launch was refused with CUDA error {code}")
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceError(f"the kernel failed: {str(error).splitlines()[0]}") from None
        return [t.cpu() for t in _results(values)]


def compare(case: Case, device: Side, host: Side, seed: int, repeats: int) -> Found:
    """Runs a case on both with the same random data, `repeats` times."""
    total = Found()
    for i in range(repeats):
        values = case.make(torch.Generator().manual_seed(seed + i))
        pairs = zip(*(case.canonical(*side.run(case, values)) for side in (device, host)))
        for k, (found, want) in enumerate(pairs):
            wrong, worst = case.compare(found, want)
            total.values += wrong.numel()
            total.worst = max(total.worst, worst)
            if wrong.any() and not total.wrong:
                at = wrong.nonzero()[0].tolist()
                total.example = (
                    f"seed {seed + i}, result {k} at {at}: {found[tuple(at)]} where the host body has {want[tuple(at)]}"
                )
            total.wrong += int(wrong.sum())
    return total


def run(device: Side, host: Side, cases: Sequence[Case], seed: int, repeats: int) -> int:
    """Prints a line a case; 1 if any differs or fails, else 0."""
    bad, values, start = [], 0, time.perf_counter()
    with ThreadPoolExecutor() as pool:  # compiles
        for side in (device, host):
            list(pool.map(side.library, {case.source for case in cases if device.has(case)}))
    for case in cases:
        print(f"{case.name:<44}", end=" ", flush=True)  # before it runs: the last line names what hung
        if not device.has(case):
            print(f"not run: for compute capability {', '.join(f'{m}.x' for m in case.majors)}")
            continue
        try:
            found = compare(case, device, host, seed, repeats)
        except (HostError, DeviceError) as error:
            print(f"FAILED  {error}")
            bad.append(case.name)
            if isinstance(error, DeviceError):
                print("a GPU that failed runs nothing more in this process; name the others with --only")
                break
            continue
        values += found.values
        worst = f"  worst error 2^{math.log2(found.worst):.1f}" if found.worst else ""
        print(
            f"{found.values:>9} values  {found.wrong:>6} differ{worst}" + (f"  {found.example}" if found.wrong else "")
        )
        if found.wrong:
            bad.append(case.name)
    verdict = f"{len(bad)} of {len(cases)} cases differ or failed" if bad else f"all {len(cases)} cases agree"
    print(f"conformance: {verdict}; {values} values, {time.perf_counter() - start:.1f} s")
    return 1 if bad else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", action="append", help="cases whose name contains this; may be given again")
    parser.add_argument("--repeats", type=int, default=None, help="how often each case is run on other data (5; dry 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("--dry", action="store_true", help=f"for the GPU take {DRY}")
    options = parser.parse_args(arguments)
    cases = [c for c in CASES if not options.only or any(word in c.name for word in options.only)]
    if not cases:
        print(f"conformance: no case is named like {', '.join(options.only)}", file=sys.stderr)
        return 2
    try:
        if options.dry:
            device, name = OnHost(_DRY_ORDER), DRY
        elif torch.cuda.is_available():
            device = OnDevice()
            name = f"{torch.cuda.get_device_name()}, {device.architecture}"
        else:
            raise CannotRun("torch sees no CUDA GPU; run it where there is one, or --dry for a rehearsal")
        print(f"conformance of {name} with the host body", flush=True)
        repeats = options.repeats if options.repeats is not None else 1 if options.dry else 5
        return run(device, OnHost(), cases, options.seed, repeats)
    except CannotRun as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
