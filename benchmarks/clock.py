"""Clocks: calls timed in turns, on a GPU by device events behind an L2 flush, on a CPU by the monotonic clock."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU so far


def balanced_order(count: int, turn: int) -> list[int]:
    """The order of `count` providers in one turn: rotated, and reversed every other turn."""
    order = [(i + turn // 2) % count for i in range(count)]
    return order[::-1] if turn % 2 else order


def time_calls(calls: Sequence[Callable], device: str, seconds: float) -> list[list[float]]:
    """Milliseconds of each call, a list of samples each, taken in turns for about `seconds` in all (at least 7 turns)."""
    return _time_cuda(calls, seconds) if device == "cuda" else _time_cpu(calls, seconds)


def _time_cpu(calls: Sequence[Callable], seconds: float) -> list[list[float]]:
    def clock(call: Callable, repeats: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        return (time.perf_counter_ns() - start) / repeats / 1e6

    def estimate(call: Callable) -> float:
        call()
        found = clock(call, 1)
        return found if found > 20 else min(found, clock(call, 1), clock(call, 1))  # slow calls vary less, and are dear

    estimates = [estimate(call) for call in calls]
    repeats = [max(1, math.ceil(1.0 / max(e, 1e-4))) for e in estimates]  # a sample lasts a millisecond or more
    turn_ms = sum(e * r for e, r in zip(estimates, repeats))
    turns = int(min(max(seconds * 1e3 / turn_ms, 7), 200))
    samples: list[list[float]] = [[] for _ in calls]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(turns):
            for i in balanced_order(len(calls), turn):
                samples[i].append(clock(calls[i], repeats[i]))
    finally:
        if collecting:
            gc.enable()
    return samples


def host_us(call: Callable) -> float:
    """Microseconds the host needs to queue the call on the GPU, with the queue empty before."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return sorted(times)[2]


def _time_cuda(calls: Sequence[Callable], seconds: float) -> list[list[float]]:
    buffer = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def event_pair() -> tuple:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def clock(work: Callable, before: Callable = lambda: None) -> tuple:
        before()
        start, end = event_pair()
        start.record()
        work()
        end.record()
        return start, end

    def ms(pair: tuple) -> float:
        torch.cuda.synchronize()
        return pair[0].elapsed_time(pair[1])

    buffer.zero_()
    flush_us = 1e3 * min(ms(clock(buffer.zero_)) for _ in range(3))
    passes, estimates = [], []
    for call in calls:
        for _ in range(3):
            call()
        # The flush outlasts the host, or a slow host would be counted as a slow kernel.
        passes.append(max(1, math.ceil(1.5 * host_us(call) / flush_us)))
        estimates.append(min(ms(clock(call)) for _ in range(3)))
    turn_ms = sum(e + p * flush_us / 1e3 for e, p in zip(estimates, passes))
    turns = int(min(max(seconds * 1e3 / turn_ms, 7), 200))

    def flush(times: int) -> None:
        for _ in range(times):
            buffer.zero_()

    pairs: list[list[tuple]] = [[] for _ in calls]
    for turn in range(turns):
        for i in balanced_order(len(calls), turn):
            pairs[i].append(clock(calls[i], partial(flush, passes[i])))
        torch.cuda.synchronize()
    return [[start.elapsed_time(end) for start, end in column] for column in pairs]


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    q = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return tuple(q.tolist())


def peak_mb(call: Callable) -> float:
    """Device memory in MiB that the call needs at its peak, beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def launches(call: Callable) -> int:
    """How many kernels, copies and fills the call puts on the GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in recorded.events())
