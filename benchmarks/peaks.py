"""What the machine can do, measured: the rates that a share of is shown beside every time."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.clock import quartiles, time_calls
from benchmarks.harness import Row

# Several times any cache, and a product large enough to run at full rate.
_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
_SIDE = {"cuda": 8192, "cpu": 1024}


DTYPES = (torch.float32, torch.bfloat16)
FP8 = "float8_e4m3fn"


def rates(device: str, kept: Path | None = None) -> dict[str, float]:
    """`peaks` of all dtypes; read from the file `kept` if there is one, else measured and written there."""
    if kept is not None and kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    found = peaks(DTYPES, device)
    if kept is not None:
        partly = kept.with_suffix(".partly")
        partly.write_text(json.dumps(found), encoding="utf-8")
        partly.replace(kept)
    return found


def peaks(dtypes: tuple[torch.dtype, ...], device: str = "cuda") -> dict[str, float]:
    """{"copy_gbps": bytes read and written by a plain copy, in GB/s, "<dtype>_tflops": a large square product's rate}.

    On a CPU the copy is one of its memory: an op whose tensors lie in a cache shows a share above 1. A GPU with 8-bit products
    has their rate too.
    """
    found = {"copy_gbps": _copy_gbps(device)}
    side = _SIDE[device]
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        found[f"{str(dtype)[6:]}_tflops"] = 2 * side**3 / _ms(partial(torch.mm, a, b, out=out), device) / 1e9
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        try:
            found[f"{FP8}_tflops"] = 2 * side**3 / _ms(_fp8_product(side), device) / 1e9
        except RuntimeError as error:  # a private function of torch's: without it one op has no share
            print(f"peaks: no rate of {FP8} products: {error}")
    return found


def _fp8_product(side: int) -> Callable:
    """torch's scaled product with one scale for each operand."""
    a, b = (torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    return partial(torch._scaled_mm, a, b.t(), one, one, out_dtype=torch.bfloat16)


def _copy_gbps(device: str) -> float:
    source = torch.randn(_BYTES[device] // 4, device=device)
    return 2 * source.nbytes / _ms(partial(torch.empty_like(source).copy_, source), device) / 1e6


def _ms(call: Callable, device: str) -> float:
    return quartiles(time_calls([call], device, 0.2)[0])[1]


def set_shares(rows: list[Row], found: dict[str, float]) -> None:
    """Each row's share: of a product's rate if it has FLOPs, else of the copy's. Nothing without the rates."""
    for row in rows:
        rate = row.gbps if row.tflops is None else row.tflops
        peak = found.get("copy_gbps" if row.tflops is None else f"{row.peak or row.dtype}_tflops")
        row.share = rate / peak if rate and peak else None
