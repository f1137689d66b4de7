"""The measuring harness: what a benchmark file declares (`Bench`), the accuracy gate, and the run of one cell.

A benchmark file, benchmarks/ops/bench_<stem>.py, defines one `BENCH`; see bench_rms_norm.py. Rules of the house:

- A provider that fails the accuracy gate gets no time, and one that is missing is a row that says why.
- Providers are timed in turns within one process, in an order that changes from round to round, so that clocks, heat and
  neighbours touch all alike; the result is the median with its quartiles.
- On a GPU: device events, the L2 cache flushed before every call, and the flush long enough that the host has queued the
  call before it ends. On a CPU: a monotonic clock.
- Data are random. Zeros draw less power and run faster than any real tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.clock import host_us, launches, peak_mb, quartiles, time_calls
from fastlm.ops._op import REGISTRY
from fastlm.testing import assert_accurate

MODES = ("forward", "backward", "both")
OURS = "fastlm:"  # how the names of our own providers begin
_FOREIGN = 5
_NEED_A_GPU = {
    OURS + "triton": "missing: no CUDA GPU; times of Triton's interpreter mean nothing",
    OURS + "cuda": "missing: no CUDA GPU",
}


@dataclass(frozen=True)
class Provider:
    """One way to compute the op. `build()` returns fn(*args) -> output(s); an ImportError there means "not installed"."""

    name: str
    build: Callable[[], Callable]


@dataclass(frozen=True)
class Bench:
    """One op to measure.

    Attributes:
        op: name in fastlm.ops._op.REGISTRY.
        make: make(dtype, device, **size) -> args, random; tensors that get a gradient have requires_grad set. Lists of
            tensors are allowed.
        reference: fn(*args) in any dtype up to fp64: what is right.
        providers: what is timed. The first one in plain torch (see `plain`) is the yardstick of accuracy and speed.
        sizes: suite -> list of keyword arguments of `make`: "tiny" (rehearsals and tests), "cpu", "quick" and, if it
            differs from quick, "full" (the last two on a GPU).
        traffic: traffic(mode, *args) -> bytes that must be read and written at least, for mode "forward" and "backward".
        flops: like traffic, in floating point operations. Where given, the rate shown is TFLOP/s, else GB/s.
        peak: the dtype whose product's rate the forward is set against, where that is not the inputs' own.
        plain: name of the yardstick among the providers.
        modes: subset of MODES; an op without gradient has only "forward".
        dtypes: device type -> dtypes measured there.
        gate_size: size -> the size at which accuracy is checked, where the reference cannot run at the full one.
    """

    op: str
    make: Callable[..., tuple]
    reference: Callable[..., Any]
    providers: Sequence[Provider]
    sizes: dict[str, list[dict]]
    traffic: Callable[..., float] | None = None
    flops: Callable[..., float] | None = None
    peak: str | None = None
    plain: str = "torch"
    modes: tuple[str, ...] = MODES
    dtypes: dict[str, tuple[torch.dtype, ...]] = field(
        default_factory=lambda: {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
    )
    gate_size: Callable[[dict], dict] = lambda size: size

    def sizes_of(self, suite: str, device: str) -> list[dict]:
        """The sizes of a suite ("tiny", "quick" or "full") on a device."""
        if suite != "tiny":
            suite = "cpu" if device == "cpu" else suite
        return self.sizes.get(suite) or self.sizes["quick"]


def ours(op: str, fn: Callable) -> list[Provider]:
    """A provider "fastlm:<backend>" for every backend of the op but the reference; fn(*args, backend=...) calls the op."""
    backends = [b for b in REGISTRY[op].backends if b != "reference"]
    return [Provider(OURS + b, partial(partial, fn, backend=b)) for b in backends]


def plain(fn: Callable, name: str = "torch") -> Provider:
    """The provider that calls fn(*args), a user's plain torch."""
    return Provider(name, lambda: fn)


def compiled(fn: Callable, name: str = "torch.compile") -> Provider:
    """The provider that calls torch.compile(fn), compiled anew for every size (static shapes: torch's best case)."""
    return Provider(name, lambda: torch.compile(fn, dynamic=False))


class Aot:
    """One ahead-of-time compile case of benchmarks/aot.py: a launcher of fastlm.kernels and its arguments.

    Args:
        launcher: "module:function" below fastlm.kernels, as in the op's definition.
        args: what the launcher takes; tensors from `meta`, with the shapes, dtypes and strides of a real call.
        archs: compute capabilities times ten to compile for, where not all can run it (80 has no fp8).
    """

    def __init__(self, launcher: str, *args: Any, archs: Sequence[int] | None = None) -> None:
        self.launcher, self.args, self.archs = launcher, args, archs

    def __str__(self) -> str:
        return " ".join([self.launcher.split(":")[1], *map(_signature, self.args)])


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without data, for `Aot`."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _signature(a: Any) -> str:
    if isinstance(a, (list, tuple)):
        kinds = [_signature(item) for item in a]
        if len(set(kinds)) <= 1:
            return f"({len(a)} x {kinds[0]})" if a else "()"
        return f"({' '.join(f'{i}:{kind}' for i, kind in enumerate(kinds) if kind != '-')})"
    if not isinstance(a, Tensor):
        return "-" if a is None else str(a)
    name = str(a.dtype)[6:].replace("bfloat", "bf").replace("float", "fp").replace("int", "i")
    strides = "" if a.is_contiguous() else f"@{','.join(map(str, a.stride()))}"
    return f"{name}[{','.join(map(str, a.shape))}]{strides}"


# --- one measured cell --------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One provider in one cell (op, size, dtype, mode): a time, or the reason why there is none."""

    op: str
    provider: str
    size: dict
    dtype: str
    mode: str
    ms: float | None = None  # median, with the quartiles below
    q1: float | None = None
    q3: float | None = None
    samples: int = 0
    gbps: float | None = None
    tflops: float | None = None
    share: float | None = (
        None  # of the machine's own rate: a large product's in this dtype (or `peak`), or a copy's (benchmarks/peaks.py)
    )
    peak: str | None = None  # the dtype of that product, where it is not `dtype`; "mixed" is set against none
    speedup: float | None = None  # over the plain provider of the same cell
    host_us: float | None = None  # time for the host to queue the call (GPU only)
    peak_mb: float | None = None  # device memory the call needs beyond its arguments (GPU only)
    launches: int | None = None  # kernels, copies and fills (GPU only, where asked for)
    reason: str | None = None  # "missing: ...", "failed: ..." or "wrong: ..."


def copy_args(args: tuple, dtype: torch.dtype | None = None) -> tuple:
    """Fresh leaves with the same values; floating ones cast to dtype if given."""

    def copy(a: Any) -> Any:
        if isinstance(a, (list, tuple)):
            return type(a)(copy(item) for item in a)
        if not isinstance(a, Tensor):
            return a
        twin = a.detach().clone()
        if dtype is not None and a.is_floating_point():
            twin = twin.to(dtype)
        return twin.requires_grad_(a.requires_grad)

    return tuple(copy(a) for a in args)


def _flat(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for v in values for t in _flat(v)] if isinstance(values, (list, tuple)) else []


def _evaluate(fn: Callable, args: tuple, with_grad: bool) -> list[Tensor]:
    """Outputs, followed by the gradients under fixed random cotangents if with_grad."""
    with torch.set_grad_enabled(with_grad):
        outs = _flat(fn(*args))
    if not with_grad:
        return outs
    live = [o for o in outs if o.requires_grad]
    inputs = [a for a in _flat(args) if a.requires_grad]
    grads = torch.autograd.grad(live, inputs, _cotangents(live), allow_unused=True)
    return [o.detach() for o in outs] + [g for g in grads if g is not None]


def _cotangents(outs: Sequence[Tensor]) -> list[Tensor]:
    """Random, and the same for every provider and dtype on a device: drawn in fp32, then cast."""
    found = []
    for o in outs:
        generator = torch.Generator(o.device).manual_seed(1)
        found.append(torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype))
    return found


def gate(bench: Bench, fns: dict[str, Callable], args: tuple, with_grad: bool) -> dict[str, str]:
    """The accuracy gate: provider -> why it gets no time, for those that fail or are wrong.

    The rule is fastlm.testing.assert_accurate's: at most twice the error of plain torch in the same dtype. Others than
    ours may have ten times that error: they are refused for being wrong, not for summing in another order.
    """
    dtype = next(t.dtype for t in _flat(args) if t.is_floating_point())
    exact_dtype = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    exact = _evaluate(bench.reference, copy_args(args, exact_dtype), with_grad)
    yardstick = _evaluate(fns[bench.plain], copy_args(args), with_grad)
    against = {}
    for name, fn in fns.items():
        try:
            got = _evaluate(fn, copy_args(args), with_grad)
            assert len(got) == len(exact), f"{len(got)} results, expected {len(exact)}"
            for i, (g, e, p) in enumerate(zip(got, exact, yardstick)):
                allowed = p if name.startswith(OURS) else e + _FOREIGN * (p.to(e.dtype) - e)
                assert_accurate(g, e, allowed, f"result {i}")
        except AssertionError as error:
            against[name] = "wrong: " + _first_line(error)
        except Exception as error:  # whatever a foreign provider throws is its row's text, not our end
            against[name] = failure(error)
    return against


def failure(error: Exception) -> str:
    """The reason of a row whose provider raised."""
    return f"failed: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def prepare(fn: Callable, args: tuple, mode: str) -> Callable[[], Any]:
    """A call without arguments that does the mode's work once."""
    if mode == "forward":

        def forward():
            with torch.no_grad():
                return fn(*args)

        return forward
    inputs = [a for a in _flat(args) if a.requires_grad]
    outs = [o for o in _flat(fn(*args)) if o.requires_grad]
    cotangents = _cotangents(outs)
    if mode == "backward":
        return lambda: torch.autograd.grad(outs, inputs, cotangents, retain_graph=True, allow_unused=True)

    def both():
        live = [o for o in _flat(fn(*args)) if o.requires_grad]
        return torch.autograd.grad(live, inputs, cotangents, allow_unused=True)

    return both


# --- the run ------------------------------------------------------------------------------------------------------


def measure(
    bench: Bench,
    size: dict,
    dtype: torch.dtype,
    device: str,
    *,
    seconds: float,
    wanted: Callable[[str], bool] = lambda provider: True,
    left_out: Mapping[str, str] | None = None,
    count_launches: bool = False,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Every mode and provider at one size and dtype: the gate first, then the times.

    Args:
        seconds: time to spend on each mode.
        wanted: names of the providers to measure; the plain one always is.
        left_out: providers that get a row with this reason instead of a time.
        count_launches: on a GPU, by the profiler, which takes a second each.
        keep: gets the rows of each mode as soon as they are there: what comes after may hang.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    # A compiled backward then allows retain_graph, which timing it alone needs.
    torch._functorch.config.donated_buffer = False
    args = bench.make(dtype, device, **size)
    for i, a in enumerate(_flat(args)):
        if a.is_floating_point() and a.numel() > 1 and bool((a == a.flatten()[0]).all()):
            raise ValueError(f"bench {bench.op}: tensor {i} is constant; constants run faster than any real data")
    cell = {"op": bench.op, "size": size, "dtype": str(dtype)[6:]}
    fns, reasons = {}, {}
    for p in bench.providers:
        if p.name != bench.plain and not wanted(p.name):
            continue
        if left_out and p.name in left_out:
            reasons[p.name] = left_out[p.name]
            continue
        if device == "cpu" and p.name in _NEED_A_GPU:
            reasons[p.name] = _NEED_A_GPU[p.name]
            continue
        try:
            fns[p.name] = p.build()
        except ImportError as error:
            reasons[p.name] = f"missing: {_first_line(error)}"
    gate_at = bench.gate_size(size)
    gate_args = args if gate_at == size else bench.make(dtype, device, **gate_at)
    try:
        reasons |= gate(bench, fns, gate_args, with_grad=len(bench.modes) > 1)
    except Exception as error:  # the reference or the yardstick itself: without them nobody can be judged
        reasons |= dict.fromkeys(fns, f"no gate: {failure(error)}")
    del gate_args
    rows = [Row(**cell, mode="all", provider=name, reason=reason) for name, reason in reasons.items()]
    keep(rows)
    names = [name for name in fns if name not in reasons]
    for mode in bench.modes:
        found = _measure_mode(bench, cell, mode, {n: fns[n] for n in names}, args, device, seconds, count_launches)
        keep(found)
        rows += found
    return rows


def _measure_mode(
    bench: Bench, cell: dict, mode: str, fns: dict, args: tuple, device: str, seconds: float, count_launches: bool
) -> list[Row]:
    rows, calls = [], {}
    peak = bench.peak and {"forward": bench.peak, "backward": None, "both": "mixed"}[mode]
    for name, fn in fns.items():
        try:
            calls[name] = prepare(fn, copy_args(args), mode)
            calls[name]()
        except Exception as error:  # passed the gate, yet fails here: for want of memory, most likely
            calls.pop(name, None)
            rows.append(Row(**cell, mode=mode, provider=name, reason=failure(error)))
    try:
        samples = time_calls(list(calls.values()), device, seconds) if calls else []
    except Exception as error:  # whose call it was is not known: nobody gets a time
        return rows + [Row(**cell, mode=mode, provider=name, reason=failure(error)) for name in calls]
    parts = ("forward", "backward") if mode == "both" else (mode,)
    work = {key: sum(fn(part, *args) for part in parts) for key, fn in
            (("traffic", bench.traffic), ("flops", bench.flops)) if fn is not None}  # fmt: skip
    for (name, call), column in zip(calls.items(), samples):
        q1, ms, q3 = quartiles(column)
        row = Row(**cell, mode=mode, provider=name, ms=ms, q1=q1, q3=q3, samples=len(column), peak=peak)
        if "traffic" in work:
            row.gbps = work["traffic"] / ms / 1e6
        if "flops" in work:
            row.tflops = work["flops"] / ms / 1e9
        rows.append(row)
        if device == "cuda":
            try:
                row.host_us, row.peak_mb = host_us(call), peak_mb(call)
                row.launches = launches(call) if count_launches else None
            except Exception as error:  # a call that fails now and then: its time is worth nothing
                rows[-1] = Row(**cell, mode=mode, provider=name, reason=failure(error))
    base = next((r.ms for r in rows if r.provider == bench.plain), None)
    for row in rows:
        row.speedup = base / row.ms if base and row.ms else None
    return rows
