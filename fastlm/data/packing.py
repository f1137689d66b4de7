"""Shuffled orders and best-fit packing: integer arithmetic only, the same result on every platform.

Both functions exist twice: compiled (fastlm._host, from csrc/host.cpp) and as a numpy twin with identical results that
serves where the module is not built.
"""

from __future__ import annotations

import bisect

import numpy as np

try:
    from fastlm import _host
except ImportError:
    _host = None

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


def host_backend() -> str:
    """Which of the two serves: "compiled" or "numpy"."""
    return "numpy" if _host is None else "compiled"


def mix_seed(*words: int) -> int:
    """One 64-bit seed from any integers (seed, epoch, purpose, ...), by SplitMix64's finaliser after each word."""
    state = 0
    for word in words:
        state = _mix((state + _GAMMA + (int(word) & _MASK)) & _MASK)
    return state


def permutation(n: int, seed: int, *, backend: str = "auto") -> np.ndarray:
    """A seeded permutation of 0..n-1: the argsort of n SplitMix64 outputs.

    Element i has the key `mix(mix(seed) + (i + 1) * 0x9E3779B97F4A7C15 mod 2^64)`. The map is a bijection, so no two
    keys are equal and the order is defined without a rule for ties (Steele, Lea and Flood, OOPSLA 2014).

    Args:
        n: how many, >= 0.
        seed: any integer; its lowest 64 bits count.
        backend: "auto", "compiled" or "numpy".

    Returns:
        int64 [n].

    Raises:
        ValueError: n is negative, or the backend is not there.
    """
    if _use_compiled(backend):
        return _host.permutation(int(n), int(seed) & _MASK)
    if n < 0:
        raise ValueError(f"permutation: n must be >= 0, got {n}")
    start = _mix(int(seed) & _MASK)
    keys = np.arange(1, n + 1, dtype=np.uint64)
    keys *= np.uint64(_GAMMA)
    keys += np.uint64(start)
    keys ^= keys >> np.uint64(30)
    keys *= np.uint64(0xBF58476D1CE4E5B9)
    keys ^= keys >> np.uint64(27)
    keys *= np.uint64(0x94D049BB133111EB)
    keys ^= keys >> np.uint64(31)
    return np.argsort(keys).astype(np.int64, copy=False)


def best_fit(lengths: np.ndarray, capacity: int, *, backend: str = "auto") -> tuple[np.ndarray, np.ndarray]:
    """Packs pieces into rows of `capacity` by best-fit decreasing, in O(n log n).

    Pieces are taken by falling length, equal lengths in the order given; each goes to the row with the least space that
    still holds it (of equal rows, the one that came to that space last), or opens a new row
    (Ding et al., 2024, "Fewer truncations improve language modeling", arXiv 2404.10830).

    Args:
        lengths: int [n], each in 1..capacity.
        capacity: tokens in a row.
        backend: "auto", "compiled" or "numpy".

    Returns:
        (rows, offsets), int64 [n] each: piece i starts at `offsets[i]` of row `rows[i]`; rows count from 0 without gaps.
        The number of rows depends on the lengths alone, not on their order.

    Raises:
        ValueError: a length outside 1..capacity, or the backend is not there.
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    if _use_compiled(backend):
        return _host.best_fit(lengths, int(capacity))
    return _best_fit_numpy(lengths, int(capacity))


def _best_fit_numpy(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    if lengths.ndim != 1:
        raise ValueError("best_fit: lengths must have one dimension")
    if capacity < 1:
        raise ValueError(f"best_fit: capacity must be >= 1, got {capacity}")
    if lengths.size and (lengths.min() < 1 or lengths.max() > capacity):
        bad = lengths[(lengths < 1) | (lengths > capacity)][0]
        raise ValueError(f"best_fit: lengths must lie in 1..{capacity}, got {bad}")
    rows = np.empty(lengths.size, np.int64)
    offsets = np.empty(lengths.size, np.int64)
    open_rows: dict[int, list[int]] = {}  # rows by the space left in them
    spaces: list[int] = []  # the keys of open_rows, sorted
    row_count = 0
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist()):
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            space, row = capacity, row_count
            row_count += 1
        else:
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        rows[item], offsets[item] = row, capacity - space
        left = space - length
        if left:
            if left not in open_rows:
                open_rows[left] = []
                bisect.insort(spaces, left)
            open_rows[left].append(row)
    return rows, offsets


def _mix(z: int) -> int:
    """SplitMix64's finaliser on a Python integer."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _use_compiled(backend: str) -> bool:
    if backend not in ("auto", "compiled", "numpy"):
        raise ValueError(f"backend must be auto, compiled or numpy, got {backend!r}")
    if backend == "compiled" and _host is None:
        raise ValueError(
            "backend='compiled' needs the module fastlm._host; build it with `python setup.py build_ext --inplace`"
        )
    return backend != "numpy" and _host is not None
