"""`python -m benchmarks tune`: measures attention's launch settings on the GPU at hand.

The library never tunes at run time: what a kernel is launched with stands in the tables of kernels/attention.py and
kernels/attention_bwd.py. For a kernel, a class of calls and a padded head width this command tries other settings in their place.
A setting that does not compile, or whose result is off, gets no time but a reason; the others are timed in turns with the
table's own, and listed best first with the line for the table.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.clock import quartiles, time_calls
from benchmarks.harness import failure
from benchmarks.lines import Lines
from benchmarks.machine import machine

Setting = tuple[int, int, int, int]  # BLOCK_M, BLOCK_N, num_warps, num_stages

KERNELS = {"fwd": ("fwd",), "bwd": ("dkdv", "dq")}
KINDS = ("hot", "blocks", "heavy")  # fastlm.kernels.attention_call.settings_class
WIDTHS = (16, 32, 64, 128, 256)
GRID: list[Setting] = list(itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)))
_WORTH = 0.98  # below this share of the table's time a setting is said to be better


def _module(kernel: str):
    return importlib.import_module("fastlm.kernels.attention" + ("" if kernel == "fwd" else "_bwd"))


# --- the calls that are timed -------------------------------------------------------------------------------------


def calls(kind: str, width: int, device: str, dtype: torch.dtype, B: int, S: int, H: int, block: int = 128) -> list:
    """The Calls (fastlm.ops.attention_reference) that stand for a class; a setting is judged by their geometric mean."""
    from fastlm import ops
    from fastlm.ops.attention_options import make_call

    q, k, v = (torch.randn(B, S, H, width, device=device).to(dtype) for _ in range(3))
    if kind == "hot":
        options = [{"causal": True}, {}]
    elif kind == "blocks":
        lines = -(-S // block)
        order = torch.rand(lines, lines, generator=torch.Generator().manual_seed(0)).argsort(1)
        live = (order < max(1, lines // 4)).to(device)
        options = [{"block_mask": ops.BlockMask.from_blocks(live, S, S, block=block)}]
    else:
        slopes = 2.0 ** -torch.linspace(1, 8, H, device=device)
        options = [
            {"causal": True, "alibi_slopes": slopes, "dropout_p": 0.1, "seed": 1},
            {"bias": torch.randn(1, H, S, S, device=device).to(dtype)},
        ]
    names = inspect.signature(make_call).parameters
    defaults = {n: p.default for n, p in inspect.signature(ops.attention).parameters.items() if n in names}
    return [make_call(q, k, v, **{n: d for n, d in defaults.items() if n not in "qkv"} | o) for o in options]


class Work:
    """One call, with what its backward needs."""

    def __init__(self, call) -> None:
        self.call = call
        self.dout = torch.randn_like(call.v[..., :1].expand(*call.q.shape[:3], call.v.shape[3]))
        self.o, self.lse = _module("fwd").attention_fwd(*call)

    def run(self, kernel: str) -> list[torch.Tensor]:
        """The tensors that a kernel writes."""
        if kernel == "fwd":
            return list(_module("fwd").attention_fwd(*self.call))
        dq, dk, dv, *_ = _module("dq").attention_bwd(self.dout, None, self.o, self.lse, [False] * 3, *self.call)
        return [dk, dv] if kernel == "dkdv" else [dq]

    def exact(self) -> dict[str, list[torch.Tensor]]:
        """The same by the reference, more exactly: kernel -> tensors."""
        from fastlm.ops.attention_reference import reference

        wide = torch.float64 if self.call.q.dtype == torch.float32 else torch.float32
        q, k, v = (x.to(wide).requires_grad_() for x in self.call[:3])
        o, lse = reference(*self.call._replace(q=q, k=k, v=v), True)
        dq, dk, dv = torch.autograd.grad(o, (q, k, v), self.dout.to(wide))
        return {"fwd": [o.detach(), lse.detach()], "dkdv": [dk, dv], "dq": [dq]}


# --- settings -----------------------------------------------------------------------------------------------------


class _NotLaunched:
    """In the place of a kernel: kernel[grid](...) does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@contextmanager
def using(kernel: str, setting: Setting) -> Iterator[None]:
    """In here the launchers take `setting` for this kernel; the other one of the backward is not launched."""
    module = _module(kernel)
    with ExitStack() as stack:
        chosen = setting if kernel == "fwd" else (setting, setting)
        stack.enter_context(patch.object(module, "_settings", lambda a, block: chosen))
        if kernel != "fwd":
            other = "_attention_dq_kernel" if kernel == "dkdv" else "_attention_dkdv_kernel"
            stack.enter_context(patch.object(module, other, _NotLaunched()))
        yield


def table_setting(kernel: str, call, width: int) -> Setting:
    """What the launcher takes for a call by itself."""
    from fastlm.kernels.attention_call import Arguments

    found = _module(kernel)._settings(Arguments.of(*call), width)
    return found if kernel == "fwd" else found[kernel == "dq"]


def place(kernel: str, kind: str, generation: int, width: int) -> str:
    """Where a setting stands: the file and the entry (of the backward a pair: dK dV, dQ)."""
    heavy = kind == "heavy" or (kind == "blocks" and width > 128)
    if kernel == "fwd":
        if not heavy and kind == "blocks" and generation == 80:
            return 'kernels/attention.py, the line `if kind == "blocks" and machine == 80` of _settings'
        return (
            f"kernels/attention.py, _HEAVY[{width}]" if heavy else f"kernels/attention.py, _HOT[{generation}][{width}]"
        )
    if kind == "blocks" and not heavy:
        return f"kernels/attention_bwd.py, _BLOCKS[{generation}]"
    return f"kernels/attention_bwd.py, {'_HEAVY' if heavy else '_HOT'}[{generation}][{width}]"


def too_large(kernel: str, setting: Setting, width: int, shared: int) -> str | None:
    """Why a setting cannot fit, from a lower bound of its shared memory: the 16-bit tiles that are on their way."""
    block_m, block_n, _, stages = setting
    need = (stages - 1) * (block_m if kernel == "dkdv" else block_n) * 2 * width * 2
    return f"too large: {need >> 10} KiB and more of {shared >> 10} KiB shared memory" if need > shared else None


# --- one kernel, class and width ----------------------------------------------------------------------------------


def _times(own: Callable, other: Callable, device: str, seconds: float) -> tuple[float, float]:
    """Milliseconds of both, in turns. On the CPU, where the times mean nothing, a single call."""
    if device == "cuda":
        samples = time_calls([own, other], device, seconds)
        return quartiles(samples[0])[1], quartiles(samples[1])[1]
    found = []
    for call in (own, other):
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e3)
    return found[0], found[1]


def _check(kernel: str, setting: Setting, checked: list, by_table: list) -> None:
    """Raises what compiling raises, and AssertionError if the result is not as good as the table's own."""
    from fastlm.testing import assert_accurate

    with using(kernel, setting):
        for number, ((work, exact), table) in enumerate(zip(checked, by_table)):
            for i, (got, e, t) in enumerate(zip(work.run(kernel), exact[kernel], table, strict=True)):
                assert_accurate(got, e, t, f"call {number} result {i}")


def measure_setting(
    kernel: str,
    setting: Setting,
    own: Setting,
    checked: list,
    by_table: list,
    timed: list[Work],
    device: str,
    seconds: float,
) -> dict:
    """{"ms": one per call, "ratio": geometric mean of time / time of the table's own} or {"reason": ...}."""
    try:
        _check(kernel, setting, checked, by_table)
        ms, ratio = [], 1.0
        for work in timed:

            def run(chosen: Setting, work: Work = work) -> None:
                with using(kernel, chosen):
                    work.run(kernel)

            a, b = _times(lambda run=run: run(own), lambda run=run: run(setting), device, seconds)
            ms.append(b)
            ratio *= b / a
        return {"ms": ms, "ratio": ratio ** (1 / len(timed))}
    except AssertionError as error:
        return {"reason": "wrong: " + (str(error) or "an assertion").splitlines()[0]}
    except Exception as error:  # the compiler, ptxas and the driver each have their own
        return {"reason": failure(error)}


def report(title: str, rows: list[dict], own: Setting) -> str:
    """The rows as text, best first, the reasons of the others counted."""
    timed = sorted((r for r in rows if "ratio" in r), key=lambda r: r["ratio"])
    lines = [title, f"{'BLOCK_M':>8} {'BLOCK_N':>8} {'warps':>6} {'stages':>7} {'x table':>8}  ms of each call"]
    for r in timed:
        m, n, warps, stages = r["setting"]
        mark = "  (the table's)" if tuple(r["setting"]) == own else ""
        times = "  ".join(f"{ms:.4f}" for ms in r["ms"])
        lines.append(f"{m:8} {n:8} {warps:6} {stages:7} {r['ratio']:8.3f}  {times}{mark}")
    reasons: dict[str, list] = {}
    for r in rows:
        if "reason" in r:
            reasons.setdefault(r["reason"], []).append(",".join(map(str, r["setting"])))
    lines += [f"no time for {' '.join(settings)}: {reason}" for reason, settings in reasons.items()]
    return "\n".join(lines)


def best(rows: list[dict], own: Setting) -> Setting:
    """The fastest setting, or the table's own where nothing is clearly faster."""
    timed = [r for r in rows if "ratio" in r]
    fastest = min(timed, key=lambda r: r["ratio"], default=None)
    return fastest["setting"] if fastest and fastest["ratio"] < _WORTH else own


def line(where: str, settings: list[Setting], own: list[Setting]) -> str:
    """What to do with the table."""
    if settings == own:
        return f"{where} stands: nothing is {1 - _WORTH:.0%} faster"
    return f"for {where}:\n    {settings[0] if len(settings) == 1 else tuple(settings)}"


def tune(
    kind: str, width: int, kernels: tuple[str, ...], options: argparse.Namespace, device: str, lines: Lines
) -> None:
    """Measures the kernels that share a table entry, printing and writing rows as they come."""
    from fastlm.kernels.attention_common import generation

    if device == "cuda":
        dtype, small, large = (
            torch.bfloat16,
            {"B": 1, "S": 1000, "H": 4},
            {"B": 4, "S": 4096, "H": max(8, 2048 // width)},
        )
        shared = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    else:
        dtype, small, shared = torch.float32, {"B": 1, "S": 20, "H": 1, "block": 16}, math.inf
        large = small
    checked = [(work, work.exact()) for work in map(Work, calls(kind, width, device, dtype, **small))]
    timed = [Work(call) for call in calls(kind, width, device, dtype, **large)]
    chosen, tables = [], []
    for kernel in kernels:
        own = table_setting(kernel, timed[0].call, width)
        with using(kernel, own):
            by_table = [work.run(kernel) for work, _ in checked]
        rows = []
        for setting in dict.fromkeys([own, *options.candidate]):
            reason = None if setting == own or device == "cpu" else too_large(kernel, setting, width, shared)
            found = {"reason": reason} if reason else measure_setting(
                kernel, setting, own, checked, by_table, timed, device, options.seconds)  # fmt: skip
            rows.append(
                {"kernel": kernel, "class": kind, "width": width, "setting": setting, "table": setting == own, **found}
            )
            lines.write([{"kind": "setting", **rows[-1]}])
            print(f"  {kernel} {kind} {width} {setting}: {found}", file=sys.stderr, flush=True)
            if "reason" in found and device == "cuda":
                _context_is_alive(setting)
        print(report(f"{kernel}, class {kind}, padded head width {width}", rows, own), flush=True)
        chosen.append(best(rows, own))
        tables.append(own)
    where = place(kernels[0], kind, generation(torch.device(device)), width)
    print(("" if device == "cuda" else "rehearsal, not a result: ") + line(where, chosen, tables) + "\n", flush=True)


def _context_is_alive(setting: Setting) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise SystemExit(
            f"benchmarks tune: {setting} broke the GPU's context ({error}); name others with --candidate"
        ) from None


def _setting(text: str) -> Setting:
    numbers = text.split(",")
    if len(numbers) != 4 or not all(n.isdecimal() for n in numbers):
        raise argparse.ArgumentTypeError(f"expected BLOCK_M,BLOCK_N,WARPS,STAGES, got {text!r}")
    setting = tuple(map(int, numbers))
    if (
        any(n & (n - 1) or n < 1 for n in setting[:3])
        or max(setting[:2]) > 128
        or min(setting[:2]) < 16
        or setting[3] < 1
    ):
        raise argparse.ArgumentTypeError(
            f"blocks are powers of two from 16 to 128, warps a power of two, stages >= 1, got {text!r}"
        )
    return setting


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=("attention",), default="attention", help="the op with settings to measure")
    parser.add_argument("--kernel", choices=tuple(KERNELS), help="fwd, or bwd: dK dV and dQ; default both")
    parser.add_argument("--kind", nargs="+", choices=KINDS, help="classes of calls; default all")
    parser.add_argument("--width", nargs="+", type=int, choices=WIDTHS, help="padded head widths; default 64 128 256")
    parser.add_argument(
        "--candidate", nargs="+", type=_setting, help="BLOCK_M,BLOCK_N,WARPS,STAGES; default a grid of 72"
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each setting and call")
    parser.add_argument("--out", type=Path, help="folder; rows are appended to tune.jsonl there")
    parser.add_argument(
        "--dry", action="store_true", help="rehearse on the CPU: tiny, interpreted, the times mean nothing"
    )
    options = parser.parse_args(argv)
    device = "cpu" if options.dry else "cuda"
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
        from fastlm._interpreter import repair_interpreter

        repair_interpreter()
        options.width, options.candidate = options.width or [16], options.candidate or [(32, 16, 4, 1)]
    elif not torch.cuda.is_available():
        raise SystemExit("benchmarks tune: torch sees no CUDA GPU; --dry rehearses on a CPU")
    options.candidate = options.candidate or GRID
    header = machine(device)
    print("  ".join(f"{k}: {v}" for k, v in header.items() if k != "kind"))
    lines = Lines(options.out and options.out / "tune.jsonl", header)
    groups = [KERNELS[options.kernel]] if options.kernel else list(KERNELS.values())
    for kind, width, kernels in itertools.product(options.kind or KINDS, options.width or (64, 128, 256), groups):
        torch.manual_seed(0)
        tune(kind, width, kernels, options, device, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
