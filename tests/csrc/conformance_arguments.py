"""Random arguments for the cases of tests.csrc.conformance: each function gives those of one launcher but the stream."""

from __future__ import annotations

import math

import torch

from tests.csrc.host_library import Both, In, Out


def _ints(g, *shape, low=-(2**31), high=2**31, dtype=torch.int32):
    return torch.randint(low, high, shape, generator=g).to(dtype)


def any_floats(g, *shape):
    """Every pattern of 32 bits is as likely."""
    return _ints(g, *shape).view(torch.float32)


def _subset(g, group: int) -> int:
    """A mask made of whole groups of lanes, as int32, other than none."""
    groups = _ints(g, 32 // group, low=0, high=2).tolist()
    lanes = sum((1 << group) - 1 << i * group for i, taken in enumerate(groups) if taken) or 0xFFFFFFFF
    return lanes - (lanes >> 31 << 32)


def shuffle(g: torch.Generator, dtype: torch.dtype, rounds: int = 96) -> list:
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
    x = _ints(g, rounds, 32, low=info.min, high=info.max, dtype=dtype) if info else any_floats(g, rounds, 32)
    return [In(x), In(argument), In(widths), In(kinds), In(masks), Out(torch.zeros(4, rounds, 32, dtype=dtype)), rounds]


def vote(g: torch.Generator, rounds: int = 256) -> list:
    """Random predicates (every fourth round all alike) of random sets of lanes."""
    predicate = _ints(g, rounds, 32, low=0, high=2)
    predicate[::8], predicate[4::8] = 1, 0
    masks = torch.tensor([_subset(g, 1) for _ in range(rounds)], dtype=torch.int32)
    return [In(predicate), In(masks), Out(torch.zeros(rounds, 32, 3, dtype=torch.int32)), rounds]


def warp_barrier(g: torch.Generator, rounds: int = 64) -> list:
    """Random sets of lanes, each passing on to a random cycle of its own."""
    masks = torch.tensor([_subset(g, 1) for _ in range(rounds)], dtype=torch.int32)
    following = torch.zeros(rounds, 32, dtype=torch.int32)
    for i, word in enumerate(masks.tolist()):
        for part in (word, ~word):
            lanes = torch.tensor([j for j in range(32) if part >> j & 1], dtype=torch.long)
            lanes = lanes[torch.randperm(len(lanes), generator=g)]
            following[i, lanes] = lanes.roll(1).int()
    return [In(_ints(g, rounds, 32)), In(following), In(masks), Out(torch.zeros(rounds, 32, dtype=torch.int32)), rounds]


def reduction(g: torch.Generator) -> list:
    """A block of any size, now and then with NaN and infinities."""
    threads = 32 * int(_ints(g, 1, low=1, high=33))
    x = torch.randn(threads, generator=g) * 10.0 ** float(_ints(g, 1, low=-20, high=20))
    for value in (math.nan, math.inf, -math.inf):
        if int(_ints(g, 1, low=0, high=3)) == 0:
            x[int(_ints(g, 1, low=0, high=threads))] = value
    return [In(x), Out(torch.zeros(9, threads)), threads]


def vector(g: torch.Generator, dtype: torch.dtype, count: int) -> list:
    size = 4 * 64 * count * torch.empty(0, dtype=dtype).element_size()
    x = _ints(g, size, low=0, high=256, dtype=torch.uint8).view(dtype)
    return [In(x), Out(torch.zeros_like(x))]


def named_barrier(g: torch.Generator, rounds: int = 33) -> list:
    return [In(_ints(g, rounds, 32)), Out(torch.zeros(rounds, 2, 32, dtype=torch.int32)), rounds]


def extreme(g: torch.Generator) -> list:
    """Pairs of any numbers, equal ones and NaN; no zeros, of which either may be the larger."""
    a, b = any_floats(g, 4096), any_floats(g, 4096)
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


def function(g: torch.Generator, low: float, high: float) -> list:
    """Numbers of the interesting range, powers of two with their neighbours, and any numbers."""
    range_ = torch.rand(20000, generator=g) * (high - low) + low
    powers = (torch.arange(1, 255, dtype=torch.int32) << 23)[:, None] + torch.tensor([-1, 0, 1], dtype=torch.int32)
    x = torch.cat([range_, powers.flatten().view(torch.float32), any_floats(g, 20000)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40])])
    return [In(x), Out(torch.zeros(x.numel())), x.numel()]


def philox(g: torch.Generator, n: int = 4096) -> list:
    seeds = _ints(g, n, low=-(2**63), high=2**63 - 1, dtype=torch.int64)
    counters = _ints(g, n, 4, low=0, high=2**32, dtype=torch.int64)
    return [In(seeds), In(counters), Out(torch.zeros(n, 4, dtype=torch.int64)), n]


def atomic(g: torch.Generator, dtype: torch.dtype, low: int, blocks: int = 7) -> list:
    """Of unsigned cells, which torch's signed dtypes stand for, only values that both order alike."""
    n = blocks * 128
    x = _ints(g, n, low=low, high=torch.iinfo(dtype).max, dtype=dtype)
    outputs = [torch.zeros(2, n, dtype=dtype), torch.zeros(blocks, 3, dtype=dtype)]
    return [In(x), Both(torch.zeros(5, dtype=dtype)), *map(Out, outputs), blocks]


def wrap(g: torch.Generator, blocks: int = 5) -> list:
    last = int(_ints(g, 1, low=0, high=100))
    return [Both(torch.zeros(1, dtype=torch.int32)), Out(torch.zeros(blocks * 128, dtype=torch.int32)), blocks, last]


def ticket(g: torch.Generator) -> list:
    blocks = int(_ints(g, 1, low=1, high=12))
    x, counter = torch.randn(blocks, 256, generator=g), torch.zeros(1, dtype=torch.int32)
    return [In(x), Out(torch.zeros(blocks, 256)), Both(counter), Out(torch.zeros(256)), blocks]


def grid_barrier(g: torch.Generator, blocks: int = 9, rounds: int = 6) -> list:
    state = torch.zeros(2, dtype=torch.int32)
    rows = [Both(_ints(g, blocks, 128, low=-1000, high=1000)) for _ in range(2)]
    return [*rows, Both(state), blocks, rounds]


def flag(g: torch.Generator, pairs: int = 4, rounds: int = 8) -> list:
    x, box, flags = _ints(g, pairs, rounds, 64), torch.zeros(pairs, 64), torch.zeros(pairs, 2)
    return [In(x), Out(torch.zeros_like(x)), Both(box.int()), Both(flags.int()), pairs, rounds]


def product(g: torch.Generator, dtype: torch.dtype, n: int) -> list:
    """Whole numbers small enough that fp32 holds every sum: in which order the hardware adds makes no difference."""
    a, b = (_ints(g, rows, 128, low=-16, high=17).to(dtype) for rows in (64, n))
    return [In(a), In(b), Both(_ints(g, 64, n, low=-999, high=999).float()), int(_ints(g, 1, low=0, high=2))]


def cluster(g: torch.Generator, threads: int = 64) -> list:
    """Whole numbers, whose sums fp32 holds: in which order they are added is the compiler's as well."""
    cluster = 2 ** int(_ints(g, 1, low=0, high=5))
    x = _ints(g, 3 * cluster, threads, low=-100, high=100).float()
    return [In(x), Out(torch.zeros_like(x)), 3 * cluster, cluster]


def cluster_sum(g: torch.Generator) -> list:
    threads = 32 * int(_ints(g, 1, low=1, high=9))
    x, out, blocks, size = cluster(g, threads)
    return [x, Out(torch.zeros(blocks, 4, threads)), blocks, size, threads]


def cluster_count(g: torch.Generator) -> list:
    blocks, size = cluster(g)[2:]
    x = _ints(g, blocks, 64, low=0, high=8)
    return [In(x), Out(torch.zeros(blocks, 8, dtype=torch.int32)), blocks, size]


def rank(g: torch.Generator) -> list:
    return [Out(torch.zeros(3, 8, 64, 3, dtype=torch.int32)), 2 ** int(_ints(g, 1, low=0, high=4))]


def fragment(g: torch.Generator, dtype: torch.dtype, warps: int = 6) -> list:
    """A lane's registers, two small whole numbers in each; and sums."""
    a, b = (_ints(g, warps, 32, 2 * n, low=-16, high=17).to(dtype).view(torch.int32) for n in (4, 2))
    return [In(a), In(b), Both(_ints(g, warps, 32, 4, low=-999, high=999).float()), warps // 2]


def word(g: torch.Generator, results: int, blocks: int = 16) -> list:
    a, b, c = (_ints(g, blocks * 64) for _ in range(3))
    return [In(a), In(b), In(c), Out(torch.zeros(results, blocks * 64).int()), blocks]


def pipeline(g: torch.Generator) -> list:
    """Rows that end within a tile, in a wider buffer; what lies beside them stays."""
    rows, columns, blocks = (int(_ints(g, 1, low=1, high=n)) for n in (100, 300, 6))
    stride = -(-columns // 8) * 8 + 8 * int(_ints(g, 1, low=0, high=3))
    x, y = (torch.randn(rows, stride, generator=g).bfloat16() for _ in range(2))
    return [In(x), Both(y), rows, columns, stride, blocks]


def box(g: torch.Generator, dtype: torch.dtype, rank: int) -> list:
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


def addition(g: torch.Generator, dtype: torch.dtype) -> list:
    """Whole numbers: in which order the memory adds them is open."""
    rows, columns = (int(_ints(g, 1, low=1, high=n)) for n in (60, 200))
    stride = -(-columns // 8) * 8
    x, y = (_ints(g, n, stride, low=-5, high=6).to(dtype) for n in (rows, 8))
    return [In(x), Both(y), rows, columns, stride]


def bulk(g: torch.Generator, dtype: torch.dtype, pieces: int = 9) -> list:
    x, total = (_ints(g, n, 32, low=-9, high=10).to(dtype) for n in (pieces, 1))
    return [In(x), Out(torch.zeros_like(x)), Both(total), pieces]


def copy_async(g: torch.Generator, wide: int) -> list:
    n = int(_ints(g, 1, low=1, high=1500))
    return [In(any_floats(g, n)), Out(torch.zeros(-(-n // 256) * 256)), n, wide]


def relay(g: torch.Generator) -> list:
    return [Out(torch.zeros(128)), Out(torch.zeros(128)), Both(torch.zeros(1).int())]
