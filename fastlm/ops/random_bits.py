"""The random numbers of dropout: Philox 4x32-10, the same bits on every backend, and the seed they come from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words in [0, 2^32) as int64, for each counter; ten rounds (Salmon et al. 2011,
    doi:10.1145/2063384.2063405)."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = (c & low for c in (c0, c1, c2, c3))
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps modulo 2^64: the bits are right
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


_FACTORS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_ROUNDS = np.arange(10, dtype=np.uint32)[:, None] * np.array([0x9E3779B9, 0xBB67AE85], np.uint32)  # added to the key


def philox_words(seed: int, c0: np.ndarray, c1: np.ndarray | int, c2: int, c3: np.ndarray | int) -> np.ndarray:
    """The same for a seed and counters that the host knows: uint32 [4, *shape of c0]; the others are broadcast to it.

    In a tenth of the calls: a round is a product and two exclusive ors over both halves, and no half is cut out of a product.
    """
    halves = (2, *c0.shape, 2)
    even, odd = np.empty(halves[:-1], np.uint32), np.empty(halves[:-1], np.uint32)
    even[0], even[1], odd[0], odd[1] = c0, c2 & 0xFFFFFFFF, c1, c3 & 0xFFFFFFFF
    each = (2,) + (1,) * c0.ndim
    factors = _FACTORS.reshape(each)
    keys = (np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], np.uint32) + _ROUNDS).reshape(10, *each)
    products = [np.empty(halves[:-1], np.uint64) for _ in range(2)]  # in turns: half of the last one is still read
    parts = [(p[::-1, ..., 0], p[::-1, ..., 1]) for p in (p.view("<u4").reshape(halves) for p in products)]
    for turn, key in enumerate(keys):
        low, high = parts[turn & 1]
        np.multiply(even, factors, products[turn & 1])
        np.bitwise_xor(high, odd, even)
        np.bitwise_xor(even, key, even)
        odd = low
    return np.stack((even, odd), 1).reshape(4, *c0.shape)


def seed_tensor(op: str, seed: int | Tensor | None, like: Tensor) -> Tensor:
    """The seed of a call of `op` as int64 [2] (seed, offset) on the device of `like`; None draws one.

    Raises TypeError, ValueError for other seeds.
    """
    if seed is None:
        return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=like.device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (2,):
            raise ValueError(
                f"{op}: seed must be an int or an int64 tensor [2] (seed, offset), got {seed.dtype} {list(seed.shape)}"
            )
        if seed.device != like.device:
            raise ValueError(f"{op}: seed must be on {like.device}, got {seed.device}; move it with .to(...)")
        return seed
    if not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"{op}: seed must be an int or an int64 tensor [2], got {type(seed).__name__}")
    seed = seed if -(2**63) <= seed < 2**63 else (seed + 2**63) % 2**64 - 2**63  # torch.seed() gives unsigned ones
    found = torch.full((2,), seed, dtype=torch.int64, device=like.device)  # filled there: no copy that a GPU waits for
    found[1] = 0
    return found
