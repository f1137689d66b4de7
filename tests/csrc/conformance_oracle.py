"""What each case of tests.csrc.conformance must give, in torch: a function of the launcher's arguments without the stream."""

import torch

from fastlm.ops.random_bits import philox

LANE = torch.arange(32)


def words(t):
    """int32 masks as numbers of 32 bits."""
    return t.flatten().long() & 0xFFFFFFFF


def lanes_in(masks):
    """bool [rounds, 32, 32]: whether the second lane is in the mask of the first, or among the others with it."""
    inside = words(masks)[:, None] >> LANE & 1
    return inside[:, :, None] == inside[:, None, :]


def shuffles(x, argument, widths, kinds, masks, out, rounds):
    width, kinds, argument = widths.long(), kinds.long(), argument.long()
    first = LANE & -width
    from_lanes = (
        first + argument % width,
        torch.where(LANE - argument >= first, LANE - argument, LANE),
        torch.where(LANE + argument < first + width, LANE + argument, LANE),
        torch.where((LANE ^ argument) < first + width, LANE ^ argument, LANE),
    )
    return [torch.stack([torch.where(kinds >> i & 1 == 1, x.gather(1, f), x) for i, f in enumerate(from_lanes)])]


def votes(predicate, masks, out, rounds):
    mine, said = lanes_in(masks), predicate.bool()[:, None, :]
    ballot = ((mine & said).long() << LANE).sum(-1)
    signed = ballot - (ballot >> 31 << 32)
    return [torch.stack([signed, (mine & said).any(-1), (said | ~mine).all(-1)], -1).int()]


def warp_barriers(x, following, masks, out, rounds):
    for i in range(3):
        x = torch.zeros_like(x).scatter(1, following.long(), x) * 3 + i
    return [x]


def reductions(x, out, threads):
    """Sums of pairs of lanes, then of pairs of pairs; warps' sums likewise."""

    def sums(t, width):
        lanes = t.view(-1, 32)
        while width > 1:
            width //= 2
            lanes = lanes + lanes[:, LANE ^ width]
        return lanes.flatten()

    def tops(t, width):
        top = t.view(-1, width).amax(1, keepdim=True)
        return top.expand(-1, width).flatten()

    warps = torch.zeros(32)
    warps[: threads // 32] = sums(x, 32)[::32]
    rows = [sums(x, n) for n in (1, 2, 8, 32)] + [tops(x, n) for n in (4, 16, 32)]
    return [torch.stack([*rows, sums(warps, 32)[:1].expand(threads), x.max().expand(threads)])]


def vectors(x, out):
    return [x]


def named_barriers(x, out, rounds):
    return [torch.stack([x[:, (LANE + warp) % 32] for warp in (1, 2)], 1)]


def extremes(a, b, out, n):
    return [torch.stack([torch.where(b < a, b, a), torch.maximum(a, b)])]


def from_float(x, out, n):
    return [torch.where(x.isnan(), torch.tensor(0x7FFF).short().view(out.dtype), x.to(out.dtype))]


def functions(function):
    def exact(x, out, n):
        flushed = torch.where(x.abs() < 2.0**-126, torch.copysign(torch.zeros(()), x), x).double()
        return [function(flushed).float()]

    return exact


def atomics(x, cells, old, sums, blocks):
    by_block = x.view(blocks, -1)
    tops = [t.clamp_min(0) for t in (x.max(), by_block.amax(1))]
    total, totals = x.sum(dtype=x.dtype), by_block.sum(1, dtype=x.dtype)
    cells = torch.stack([total, tops[0], total, x[-1], torch.tensor(3 * x.numel(), dtype=x.dtype)])
    drawn = torch.cat([torch.zeros(1, dtype=x.dtype), x[:-1]])  # as if the threads had come one after the other
    return [
        cells,
        torch.stack([drawn, 3 * torch.arange(x.numel(), dtype=x.dtype)]),
        torch.stack([totals, tops[1], totals], 1),
    ]


def wraps(cell, old, blocks, last):
    drawn = torch.arange(blocks * 128) % (last + 1)
    return [torch.tensor([blocks * 128 % (last + 1)]).int(), drawn.int()]


def tickets(x, partial, counter, out, blocks):
    total = torch.zeros(256)
    for row in x:
        total = total + row
    return [x, counter, total]


def grid_barriers(a, b, state, blocks, rounds):
    grids = [a, b]
    for i in range(rounds):
        grids[1 - i % 2] = 3 * grids[i % 2].roll(1, 0).flip(1) - grids[i % 2].roll(-1, 0) + i + 1
    return [*grids, torch.tensor([0, rounds]).int()]


def flags(x, out, box, state, pairs, rounds):
    return [x.flip(2), x[:, -1], torch.full_like(state, rounds)]


def ranks(out, cluster):
    block = torch.arange(8).int()[:, None].expand(3, 8, 64)
    return [torch.stack([block % cluster, torch.full_like(block, cluster), block], -1)]


def ring(x, out, blocks, cluster):
    rows = x.view(-1, cluster, 64)
    for _ in range(3):
        rows = rows.roll(-1, 1).flip(2)
    return [rows.reshape(blocks, 64)]


def halves(x, out, blocks, cluster):
    return [x.sum(1, keepdim=True) + x.view(-1, cluster, 64).flip(1).reshape(blocks, 64)]


def cluster_sums(x, out, blocks, cluster, threads):
    rows = x.view(-1, cluster * threads)
    lanes = torch.full((len(rows),), cluster * threads * (threads - 1) / 2)
    sums = torch.stack([rows.sum(1), rows.amax(1), rows.square().sum(1), lanes], 1)
    return [sums[:, None, :, None].expand(-1, cluster, 4, threads).reshape(blocks, 4, threads)]


def counts(x, out, blocks, cluster):
    found = torch.stack([torch.bincount(row, minlength=8) for row in x.view(-1, cluster * 64).long()])
    return [found.repeat_interleave(cluster, 0).int()]


def mma(dtype):
    def oracle(a, b, d, blocks):
        g, t = LANE // 4, LANE % 4
        left, right = torch.zeros(len(a), 16, 16), torch.zeros(len(a), 16, 8)
        a, b = (x.view(dtype).view(len(x), 32, -1, 2).float() for x in (a, b))
        for i in range(4):
            for half in range(2):
                left[:, g + 8 * (i % 2), 2 * t + 8 * (i // 2) + half] = a[:, :, i, half]
        for i in range(2):
            for half in range(2):
                right[:, 2 * t + 8 * i + half, g] = b[:, :, i, half]
        product = 2 * left @ right
        return [d + torch.stack([product[:, g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)], -1)]

    return oracle


def pairs(dtype):
    def oracle(a, b, c, out, blocks):
        x, y = a.view(dtype).float(), b.view(dtype).float()
        (less,) = from_float(x - y, torch.zeros((), dtype=dtype), None)
        swapped = a.view(torch.int16).view(-1, 2).flip(1).flatten().view(torch.int32)
        eight = torch.stack([a, b], 1).view(torch.uint8).view(-1, 8)
        chosen = eight.gather(1, torch.stack([c >> 4 * i & 7 for i in range(4)], 1).long()).flatten().view(torch.int32)
        return [torch.stack([less.view(torch.int32), swapped, chosen])]

    return oracle


def bitwise(x, y, z, out, blocks):
    majority = x & y | x & z | y & z
    return [torch.stack([majority, x & y | ~x & z, majority & ~(x & y & z), x ^ y ^ z])]


def copies_ahead(x, out, n, wide):
    padded = torch.zeros(len(out))
    padded[:n] = x
    return [padded.view(-1, 256).flip(1).flatten()]


def between_threads(out, rounds):
    handed = 2 * (100 * torch.arange(rounds)[:, None] + LANE)
    return [torch.cat([handed.flatten(), torch.arange(4)]).int()]


def pipeline(x, y, rows, columns, stride, blocks):
    return [torch.cat([2 * x[:, :columns], y[:, columns:]], 1)]


def boxes(x, corner, out, rank, swizzle, sizes, strides, box):
    shaped = x.as_strided(sizes[:rank][::-1], (1, *strides[: rank - 1])[::-1])
    filled, inside = torch.zeros(box[:rank][::-1], dtype=x.dtype), []
    for n, c, b in zip(sizes[:rank], corner.tolist(), box):
        inside.insert(0, (slice(max(c, 0), max(min(c + b, n), 0)), slice(max(-c, 0), max(min(n - c, b), 0))))
    if all(a.start < a.stop for a, _ in inside):
        filled[tuple(b for _, b in inside)] = shaped[tuple(a for a, _ in inside)]
    pieces = filled.view(-1, 16 // x.element_size())
    number = torch.arange(len(pieces))
    moved = number ^ (number // 8 % 2**swizzle)  # 16-byte pieces change places within 128 bytes
    return [pieces[moved].flatten() if swizzle else filled.flatten()]


def additions(x, y, rows, columns, stride):
    total = y.double()
    for i, row in enumerate(x[:, :columns].double()):
        total[i % 8, :columns] += row
    return [total.to(y.dtype)]


def relay(scratch, out, counter):
    return [torch.arange(128.0), torch.arange(128.0), counter]


ORACLES = {
    "shuffles": shuffles,
    "votes": votes,
    "warp_barriers": warp_barriers,
    "reductions": reductions,
    "vectors": vectors,
    "named_barriers": named_barriers,
    "extremes": extremes,
    "pointers": lambda x, out: [x.view(torch.int32) + (torch.arange(64).int() + 4) // 5],
    "cleared": lambda x, n: [torch.where(torch.arange(999) < n, 0, x)],
    "to_float": lambda x, out, n: [x.float()],
    "from_float": from_float,
    "exp2": functions(torch.exp2),
    "log2": functions(torch.log2),
    "rsqrt": functions(torch.rsqrt),
    "reciprocal": functions(torch.reciprocal),
    "tanh": functions(torch.tanh),
    "random_words": lambda seed, counter, out, n: [torch.stack(philox(seed, *counter.unbind(1)), -1)],
    "atomics": atomics,
    "wraps": wraps,
    "tickets": tickets,
    "grid_barriers": grid_barriers,
    "flags": flags,
    "ranks": ranks,
    "ring": ring,
    "halves": halves,
    "sums": cluster_sums,
    "counts": counts,
    "mma_bf16": mma(torch.bfloat16),
    "mma_fp16": mma(torch.float16),
    "pairs_bf16": pairs(torch.bfloat16),
    "pairs_fp16": pairs(torch.float16),
    "bitwise_of": bitwise,
    "ahead": copies_ahead,
    "threads": between_threads,
    "pipeline": pipeline,
    "box_": boxes,
    "add_": additions,
    "bulk_": lambda x, out, total, pieces: [x, total + x.sum(0).to(x.dtype)],
    "relay": relay,
    "pass_on": lambda out, fence: [100.0 * torch.tensor([2, 0, 1, 5, 3, 4])[:, None] + LANE],
    "groups": lambda out: [(1000 * (torch.arange(384) // 128) + torch.arange(384) % 128).int()],
    **dict.fromkeys(("bf16_", "fp16_"), lambda a, b, d, accumulate: [a.float() @ b.float().T + accumulate * d]),
}  # fmt: skip
