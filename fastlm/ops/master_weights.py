"""16-bit weights beside an exact fp32 master: the split into bf16 and a 16-bit remainder, and stochastic rounding."""

from __future__ import annotations

import torch
from torch import Tensor

_NAN = 0x7FC00000  # the quiet NaN whose lower 16 bits are 0


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 weights -> (bf16 weights, int16 remainders), of the same shape, from which `join_master` makes the same bits.

    The bf16 weight is the master rounded to nearest, ties away from zero, and the remainder what that added or took, in
    units of the fp32 mantissa. Ties must go one way: with ties to even, remainder -2^15 would stand for two masters, of
    which one comes back wrong (apex's issue 1842). NaN becomes the quiet NaN with remainder 0: its payload carried into
    the sign would make it -0.0. Raises TypeError for other dtypes. Idea: NVIDIA TransformerEngine, store_param_remainders.
    """
    if master.dtype != torch.float32:
        raise TypeError(f"split_master: master must be float32, got {master.dtype}")
    # Reading a sum costs nothing on the CPU, and it is finite where no NaN has to be looked for.
    if master.device.type != "cpu" or torch.compiler.is_compiling() or not master.sum().isfinite():
        master = torch.where(master == master, master, torch.nan)
    bits = master.contiguous().view(torch.int32)
    # The remainder is the lower half itself, as a signed number: where it is negative the upper half was rounded up.
    remainders = bits.to(torch.int16)
    params = ((bits + 0x8000) >> 16).to(torch.int16)
    return params.view(torch.bfloat16), remainders


def join_master(params: Tensor, remainders: Tensor) -> Tensor:
    """bf16 weights and int16 remainders -> the fp32 weights of `split_master`, bit for bit. Raises TypeError for other dtypes."""
    if params.dtype != torch.bfloat16 or remainders.dtype != torch.int16:
        raise TypeError(
            f"join_master: params must be bfloat16 and remainders int16, got {params.dtype} and {remainders.dtype}"
        )
    return params.view(torch.int16).to(torch.int32).mul_(65536).add_(remainders).view(torch.float32)


def random_halves(seed: Tensor, spans: list[tuple[int, int, int]], step: int | float | Tensor) -> list[Tensor]:
    """For each span (stream, start, count): random numbers in [0, 65536), int32 [count], number start, start + 1, ... of a
    stream at one step.

    Half words of Philox 4x32-10 (see random_bits) with counter (number // 8, stream, step, offset): none comes twice while
    stream, step and seed = int64 (seed, offset) are not all repeated. `start` is a multiple of 8, numbers are below 2^35.
    """
    low, device = 0xFFFFFFFF, seed.device
    quads = [(count + 7) // 8 for _, _, count in spans]
    c0 = torch.cat([torch.arange(start // 8, start // 8 + q, device=device) for (_, start, _), q in zip(spans, quads)])
    c1 = torch.cat([torch.full((q,), stream & low, device=device) for (stream, _, _), q in zip(spans, quads)])
    c2 = torch.full((), 0, device=device) + (step.to(torch.int64) if isinstance(step, Tensor) else int(step))
    c3 = seed[1] & low
    k0, k1 = seed[0] & low, (seed[0] >> 32) & low
    for _ in range(10):  # random_bits.philox without most of its temporaries: a third of the time
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = (b >> 32).bitwise_and_(low).bitwise_xor_(k0) ^ c1
        c2 = (a >> 32).bitwise_and_(low).bitwise_xor_(k1) ^ c3
        c1, c3 = b.bitwise_and_(low), a.bitwise_and_(low)
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack([c.to(torch.int32) for c in (c0, c1, c2, c3)], 1)
    halves = words.view(torch.int16).view(-1).to(torch.int32).bitwise_and_(0xFFFF)
    found, first = [], 0
    for (_, _, count), q in zip(spans, quads):
        found.append(halves[first : first + count])
        first += 8 * q
    return found


def round_stochastic(x: Tensor, halves: Tensor) -> Tensor:
    """fp32 -> bf16, up or down with probabilities that make the mean exact; `halves` from `random_halves`, of x's shape.

    The random number is added to the 16 bits that are then cut off. Inf and NaN stay, bf16 values stay, and what lies
    between the largest bf16 value and inf is cut, never raised to inf. Idea: Gupta et al. 2015, arXiv:1502.02551.
    """
    bits = x.view(torch.int32)
    raised = (bits + halves) >> 16
    raised = torch.where((raised & 0x7FFF) == 0x7F80, bits >> 16, raised)  # inf itself has nothing to cut
    raised = torch.where(x == x, raised, _NAN >> 16)
    return raised.to(torch.int16).view(torch.bfloat16)
