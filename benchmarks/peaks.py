"""What the machine can do, measured: the rates that a share of is shown beside every time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.clock import quartiles, time_calls
from benchmarks.harness import Row

_BYTES = 1 << 30  # several times any cache
_SIDE = 8192


def peaks(dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """{"copy_gbps": bytes read and written by a plain copy, in GB/s, "<dtype>_tflops": a large square product's rate}.

    Of the GPU at hand; not of a CPU, where what is small enough to be measured often lies in a cache.
    """
    found = {"copy_gbps": _copy_gbps()}
    for dtype in dtypes:
        a, b = (torch.randn(_SIDE, _SIDE, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        found[f"{str(dtype)[6:]}_tflops"] = 2 * _SIDE**3 / _ms(partial(torch.mm, a, b, out=out)) / 1e9
    return found


def _copy_gbps() -> float:
    source = torch.randn(_BYTES // 4, device="cuda")
    return 2 * source.nbytes / _ms(partial(torch.empty_like(source).copy_, source)) / 1e6


def _ms(call: Callable) -> float:
    return quartiles(time_calls([call], "cuda", 0.2)[0])[1]


def set_shares(rows: list[Row], found: dict[str, float]) -> None:
    """Each row's share: of a product's rate if it has FLOPs, else of the copy's. Nothing without the rates."""
    for row in rows:
        rate = row.gbps if row.tflops is None else row.tflops
        peak = found.get("copy_gbps" if row.tflops is None else f"{row.dtype}_tflops")
        row.share = rate / peak if rate and peak else None
