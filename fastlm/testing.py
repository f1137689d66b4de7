"""What tests and benchmarks share: the accuracy rule, guard bands, the battery of checks every op passes, planted bugs.

A test file describes its op once (`Case`) and calls `check_op(case, backend)`; see tests/ops/test_rms_norm.py.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm._interpreter import repair_interpreter
from fastlm.ops._op import REGISTRY, Op

__all__ = [
    "Case",
    "assert_accurate",
    "check_accuracy",
    "check_op",
    "check_reference",
    "guarded",
    "planted_bug",
    "poison_empty",
    "repair_interpreter",
]

# The "tiny atol" of the accuracy rule, in units of the dtype's eps times the largest reference value.
_ULPS = {torch.float64: 16.0, torch.float32: 4.0, torch.bfloat16: 0.25, torch.float16: 0.25}
_GUARD = 64  # elements on either side of a guarded tensor
_SENTINEL = 113


@dataclass(frozen=True)
class Case:
    """One op as the checks see it.

    Attributes:
        op: name in fastlm.ops._op.REGISTRY.
        fn: the public function, called as fn(*args, backend=...); wrap keyword options in a lambda.
        make: make(dtype, device) -> args at a small shape of at most four tiles (random, odd sizes).
        tiny: like make, small enough for fp64 gradcheck (a few dozen elements).
        plain: fn(*args) as a user of plain torch would write it, computed in the inputs' own dtype: its error against fp64
            is the yardstick of the accuracy rule. Default: the reference in that dtype.
        autocast: "cast" (products, attention) or "keep" (norms, losses).
        dtypes: dtypes whose accuracy is checked.
        empty: make(dtype, device) -> args without elements, or None.
    """

    op: str
    fn: Callable[..., Any]
    make: Callable[..., tuple]
    tiny: Callable[..., tuple]
    plain: Callable[..., Any] | None = None
    autocast: str = "keep"
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32, torch.bfloat16, torch.float16))
    empty: Callable[..., tuple] | None = None


# --- the accuracy rule --------------------------------------------------------------------------------------------


def assert_accurate(actual: Tensor, exact: Tensor, plain: Tensor, what: str = "output") -> None:
    """|actual - exact| <= 2 max|plain - exact| + tiny atol; inf and NaN patterns must match (flash-attention's rule).

    Args:
        actual: the result under test. exact: the fp64 (or fp32) reference. plain: plain torch in actual's dtype.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if actual.numel() == 0:
        return
    a, e, p = (t.detach().to(actual.device, torch.float64) for t in (actual, exact, plain))
    finite = torch.isfinite(e)
    assert torch.equal(torch.isfinite(a), finite), f"{what}: NaN or inf where the reference is finite (or the reverse)"
    assert torch.equal(a[~finite].nan_to_num(nan=7.0), e[~finite].nan_to_num(nan=7.0)), f"{what}: inf patterns differ"
    a, e, p = a.where(finite, 0), e.where(finite, 0), p.where(finite, 0)
    error, allowed = (a - e).abs(), 2 * (p - e).nan_to_num().abs().max().item()
    allowed += _ULPS[actual.dtype] * torch.finfo(actual.dtype).eps * e.abs().max().item()
    if error.max().item() <= allowed:
        return
    worst = error.flatten().topk(min(5, error.numel())).indices.tolist()
    lines = [
        f"  {tuple(int(i) for i in torch.unravel_index(torch.tensor(k), error.shape))}: "
        f"{a.flatten()[k].item():.6g}, expected {e.flatten()[k].item():.6g}"
        for k in worst
    ]
    wrong = (error > allowed).sum().item()
    raise AssertionError(
        f"{what}: max error {error.max().item():.3g} > allowed {allowed:.3g} "
        f"({wrong} of {error.numel()} elements); worst:\n" + "\n".join(lines)
    )


def _as_tuple(out: Any) -> tuple:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _grad_inputs(args: tuple) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]


def _fresh(args: tuple, dtype: torch.dtype | None = None) -> tuple:
    """Leaves with the same values (and strides, unless cast) that require grad."""
    out = []
    for a in args:
        if isinstance(a, Tensor) and a.is_floating_point():
            a = a.detach().to(dtype) if dtype else a.detach()
            a = a.requires_grad_()
        out.append(a)
    return tuple(out)


def _run(fn: Callable, args: tuple, seed: int = 1) -> tuple[tuple, tuple]:
    """Outputs and the gradients of every floating input under fixed random cotangents."""
    args = _fresh(args)
    outs = _as_tuple(fn(*args))
    live = [o for o in outs if o.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype).to(o.device) for o in live]
    if not live:
        return outs, ()
    return outs, torch.autograd.grad(live, _grad_inputs(args), cotangents, allow_unused=True)


def check_accuracy(
    case: Case, backend: str, dtype: torch.dtype, device: str, args: tuple | list[tuple] | None = None
) -> None:
    """Forward and every gradient under the accuracy rule. A list of several args is judged together: for results of few
    elements, where the error of a single draw of plain torch may be small by chance."""
    draws = args if isinstance(args, list) else [case.make(dtype, device) if args is None else args]
    plain = case.plain or (lambda *a: case.fn(*a, backend="reference"))
    # Compared against what fp64 makes of the very same (rounded) inputs.
    exact = [_run(lambda *a: case.fn(*a, backend="reference"), _cast(a, torch.float64)) for a in draws]
    base = [_run(plain, a) for a in draws]
    found = [_run(lambda *a: case.fn(*a, backend=backend), a) for a in draws]
    for part, kind in enumerate(("output", "gradient")):
        columns = [list(zip(*(run[part] for run in runs))) for runs in (found, exact, base)]
        assert len(columns[0]) == len(columns[1]), f"{len(columns[0])} {kind}s, expected {len(columns[1])}"
        for i, (g, e, b) in enumerate(zip(*columns)):
            if e[0] is not None:
                assert g[0] is not None, f"{case.op} {backend}: {kind} {i} is missing"
                assert_accurate(*map(torch.stack, (g, e, b)), f"{case.op} {backend} {dtype}: {kind} {i}")


def _cast(args: tuple, dtype: torch.dtype) -> tuple:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


# --- guard bands and poison ---------------------------------------------------------------------------------------


def guarded(t: Tensor, band: float = float("nan")) -> tuple[Tensor, Tensor]:
    """A copy of t between bands of `band` (113 for integers), and the whole buffer to inspect with `bands_intact`."""
    band = band if t.is_floating_point() else _SENTINEL
    buffer = torch.full((t.numel() + 2 * _GUARD,), band, dtype=t.dtype, device=t.device)
    inner = buffer[_GUARD : _GUARD + t.numel()].view(t.shape)
    inner.copy_(t.detach())
    return inner, buffer


def bands_intact(buffer: Tensor) -> bool:
    """True if nothing was written into the bands of a guarded buffer."""
    bands = torch.cat([buffer[:_GUARD], buffer[-_GUARD:]])
    return bool(
        (bands.isnan() if bands.is_floating_point() else bands == _SENTINEL).all() or (bands == _SENTINEL).all()
    )


@contextmanager
def poison_empty() -> Iterator[None]:
    """Within the block torch.empty and torch.empty_like give NaN between guard bands: an unwritten output is seen as NaN,
    and a write outside a buffer fails when the block ends. Launchers allocate with these two only."""
    real_empty, real_like, buffers = torch.empty, torch.empty_like, []

    def empty(*size, dtype=None, device=None, **kwargs):
        shape = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)) else size
        proto = real_empty(shape, dtype=dtype, device=device, **kwargs)
        if proto.device.type == "meta" or type(proto) is not Tensor or proto.dtype is torch.bool:
            return proto
        proto.fill_(float("nan") if proto.is_floating_point() else _SENTINEL)
        # Not NaN bands here: a stray NaN, read from an input's band, would be written unseen.
        inner, buffer = guarded(proto, band=_SENTINEL)
        buffers.append(buffer)
        return inner

    def empty_like(t, *, dtype=None, device=None, **kwargs):
        return empty(t.shape, dtype=dtype or t.dtype, device=device or t.device)

    torch.empty, torch.empty_like = empty, empty_like
    try:
        yield
    finally:
        torch.empty, torch.empty_like = real_empty, real_like
    for buffer in buffers:
        assert bands_intact(buffer), f"a kernel wrote outside a buffer of {buffer.numel() - 2 * _GUARD} elements"


# --- the battery --------------------------------------------------------------------------------------------------


def check_op(case: Case, backend: str, device: str) -> None:
    """Everything an op promises on one backend, but for accuracy per dtype (`check_accuracy`) and the maths of the
    reference (`check_reference`)."""
    check_safety(case, backend, device)
    check_guards(case, backend, device)
    check_strides(case, backend, device)
    check_autocast(case, backend, device)
    check_transforms(case, backend, device)
    check_compile(case, backend, device)
    if backend in REGISTRY[case.op].kernels:
        check_dispatcher(case, backend, device)
        check_double_backward(case, backend, device)
    if case.empty is not None:
        _run(lambda *a: case.fn(*a, backend=backend), case.empty(torch.float32, device))
    if device == "cuda":
        check_cuda_graph(case, backend)


def check_reference(case: Case) -> None:
    """The maths alone: fp64 gradcheck and gradgradcheck of the reference."""
    args = _fresh(case.tiny(torch.float64, "cpu"))
    fn = lambda *a: case.fn(*a, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(fn, args)
    assert torch.autograd.gradgradcheck(fn, args)


def check_safety(case: Case, backend: str, device: str) -> None:
    """Inputs bitwise unchanged, a second backward equal to the first, two runs bitwise equal."""
    args = _fresh(case.make(torch.float32, device))
    before = [a.detach().clone() for a in args if isinstance(a, Tensor)]
    outs = [o for o in _as_tuple(case.fn(*args, backend=backend)) if o.requires_grad]
    loss = sum(o.double().square().sum() for o in outs)
    first = torch.autograd.grad(loss, _grad_inputs(args), retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, _grad_inputs(args), allow_unused=True)
    for a, b in zip(first, second):
        assert a is b is None or torch.equal(a, b), f"{case.op} {backend}: a second backward gave other gradients"
    for a, b in zip([a for a in args if isinstance(a, Tensor)], before):
        assert torch.equal(a, b), f"{case.op} {backend}: an input was changed"
    one, two = (_run(lambda *a: case.fn(*a, backend=backend), args) for _ in range(2))
    for a, b in zip(one[0] + one[1], two[0] + two[1]):
        assert a is b is None or torch.equal(a, b), f"{case.op} {backend}: two runs differ"


def check_guards(case: Case, backend: str, device: str) -> None:
    """No read or write outside any tensor, no element left unwritten: NaN bands around inputs, poisoned torch.empty."""
    args, buffers = [], []
    for a in case.make(torch.float32, device):
        if isinstance(a, Tensor):
            a, buffer = guarded(a)
            buffers.append(buffer)
        args.append(a)
    with poison_empty():
        outs, grads = _run(lambda *a: case.fn(*a, backend=backend), tuple(args))
    clean_outs, clean_grads = _run(lambda *a: case.fn(*a, backend=backend), tuple(args))
    for got, want in zip(outs + grads, clean_outs + clean_grads):
        if want is not None:
            assert torch.equal(got, want), f"{case.op} {backend}: unwritten elements or a read outside a tensor"
    assert all(bands_intact(b) for b in buffers), f"{case.op} {backend}: wrote outside an input"


def _strided(t: Tensor, kind: str) -> Tensor:
    """The same values under other strides."""
    if kind == "permuted" and t.ndim >= 2:
        order = [*range(t.ndim - 2), t.ndim - 1, t.ndim - 2]
        return t.permute(order).contiguous().permute(order)
    if kind == "sliced" and t.ndim >= 1:
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan") if t.is_floating_point() else 1,
                          dtype=t.dtype, device=t.device)  # fmt: skip
        view = wide[..., 1 : 1 + 2 * t.shape[-1] : 2]
        return view.copy_(t)
    if kind == "row_slice" and t.ndim >= 2:
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), float("nan") if t.is_floating_point() else 1,
                          dtype=t.dtype, device=t.device)  # fmt: skip
        return wide[..., 2 : 2 + t.shape[-1]].copy_(t)
    return t


def check_strides(case: Case, backend: str, device: str) -> None:
    """Permuted, sliced and expanded inputs, and zero-stride cotangents, give what contiguous ones give."""
    args = case.make(torch.float32, device)
    want = _run(lambda *a: case.fn(*a, backend=backend), args)
    for kind in ("permuted", "sliced", "row_slice"):
        views = tuple(_strided(a, kind) if isinstance(a, Tensor) else a for a in args)
        got = _run(lambda *a: case.fn(*a, backend=backend), views)
        for g, w in zip(got[0] + got[1], want[0] + want[1]):
            if w is not None:
                torch.testing.assert_close(g, w, msg=lambda m, kind=kind: f"{case.op} {backend}, {kind} inputs: {m}")
    expanded = _fresh(args)
    outs = [o for o in _as_tuple(case.fn(*expanded, backend=backend)) if o.requires_grad]
    grads = torch.autograd.grad([o.sum() for o in outs], _grad_inputs(expanded), allow_unused=True)
    dense = torch.autograd.grad(
        [o for o in _as_tuple(case.fn(*expanded, backend=backend)) if o.requires_grad],
        _grad_inputs(expanded), [torch.ones_like(o).contiguous() for o in outs], allow_unused=True,
    )  # fmt: skip
    for g, w in zip(grads, dense):
        if w is not None:
            torch.testing.assert_close(g, w, msg=lambda m: f"{case.op} {backend}, zero-stride cotangent: {m}")


def check_autocast(case: Case, backend: str, device: str) -> None:
    """Under bf16 autocast fp32 inputs give bf16 outputs (products, attention) or keep fp32 (norms, losses)."""
    with torch.autocast(device, dtype=torch.bfloat16):
        outs = _as_tuple(case.fn(*case.make(torch.float32, device), backend=backend))
    want = torch.bfloat16 if case.autocast == "cast" else torch.float32
    assert outs[0].dtype == want, f"{case.op} {backend}: {outs[0].dtype} under autocast, expected {want}"


def check_transforms(case: Case, backend: str, device: str) -> None:
    """vmap(grad) over the first argument equals a loop; jvp runs."""
    first, *rest = case.tiny(torch.float32, device)
    stack = torch.stack([first, first * 0.5, first + 1])

    def total(a: Tensor) -> Tensor:
        return _as_tuple(case.fn(a, *rest, backend=backend))[0].sum()

    got = torch.func.vmap(torch.func.grad(total))(stack)
    want = torch.stack([torch.func.grad(total)(a) for a in stack])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(total, (first,), (torch.ones_like(first),))
    torch.testing.assert_close(tangent, want[0].sum(), rtol=1e-3, atol=1e-4)


def check_compile(case: Case, backend: str, device: str) -> None:
    """torch.compile(fullgraph=True, dynamic=True), forward and backward at two shapes, equals eager."""
    torch._dynamo.reset()
    fn = lambda *a: _as_tuple(case.fn(*a, backend=backend))  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for make in (case.tiny, case.make):
        args = make(torch.float32, device)
        got, want = _run(compiled, args), _run(fn, args)
        for g, w in zip(got[0] + got[1], want[0] + want[1]):
            if w is not None:
                torch.testing.assert_close(g, w, msg=lambda m: f"{case.op} {backend} under torch.compile: {m}")


def _recorded(op: Op, case: Case, backend: str, device: str) -> tuple[tuple, tuple | None]:
    """The arguments with which the public function calls the dispatcher, forward and backward."""
    seen: dict[str, tuple] = {}
    real_forward, real_backward = op.forward, op.backward

    def record(slot: str, real: Callable) -> Callable:
        def call(*args):
            seen.setdefault(slot, args)
            return real(*args)

        return call

    op.forward, op.backward = record("forward", real_forward), record("backward", real_backward)
    try:
        _run(lambda *a: case.fn(*a, backend=backend), case.make(torch.float32, device))
    finally:
        op.forward, op.backward = real_forward, real_backward
    return seen["forward"], seen.get("backward")


def check_dispatcher(case: Case, backend: str, device: str) -> None:
    """torch.library.opcheck of the op with and without grad, and of its backward."""
    op = REGISTRY[case.op]
    forward, backward = _recorded(op, case, backend, device)
    without = tuple(a.detach() if isinstance(a, Tensor) else a for a in forward)
    torch.library.opcheck(op.forward, without)
    torch.library.opcheck(op.forward, _fresh(without))
    if backward is not None:
        torch.library.opcheck(op.backward, tuple(a.detach() if isinstance(a, Tensor) else a for a in backward))


def check_double_backward(case: Case, backend: str, device: str) -> None:
    """Second derivatives through the kernel equal those of the reference."""
    values = case.tiny(torch.float32, device)

    def second(name: str) -> tuple:
        args = _fresh(values)
        outs = [o for o in _as_tuple(case.fn(*args, backend=name)) if o.requires_grad]
        inputs = _grad_inputs(args)
        first = torch.autograd.grad(sum(o.sin().sum() for o in outs), inputs, create_graph=True, allow_unused=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), inputs, allow_unused=True)

    for got, want in zip(second(backend), second("reference")):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4, msg=lambda m: f"{case.op} double backward: {m}")


def check_cuda_graph(case: Case, backend: str) -> None:
    """No host-device sync, and a captured graph replays to the same result (GPU only)."""
    args = _fresh(case.make(torch.float32, "cuda"))
    fn = lambda: _run(lambda *a: case.fn(*a, backend=backend), args)  # noqa: E731
    want = fn()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    outs = lambda: _as_tuple(case.fn(*args, backend=backend))  # noqa: E731
    with torch.cuda.stream(stream), torch.no_grad():
        outs()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outs()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = outs()
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, want[0]):
        assert torch.equal(got, expected), f"{case.op} {backend}: a CUDA graph replay differs"


# --- planted bugs -------------------------------------------------------------------------------------------------


@contextmanager
def planted_bug(op: str, old: str, new: str, *, backend: str = "triton", file: str | None = None) -> Iterator[None]:
    """Runs the block with the op's launchers taken from a copy of the kernel folder, in whose `file` (default: that of the
    forward launcher) `old` became `new`.

    For tests that show that a wrong kernel turns a check red. Raises ValueError if `old` is not in the file.
    """
    import fastlm.kernels

    target = REGISTRY[op]
    launchers = [launcher.split(":") if launcher else None for launcher in target.kernels[backend]]
    stem = file or launchers[0][0]
    folder = Path(fastlm.kernels.__path__[0])
    source = (folder / f"{stem}.py").read_text(encoding="utf-8")
    if old not in source:
        raise ValueError(f"planted_bug: {old!r} is not in kernels/{stem}.py")
    with tempfile.TemporaryDirectory() as copies:
        for path in folder.glob("*.py"):  # files: triton reads the source of its kernels
            (Path(copies) / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        (Path(copies) / f"{stem}.py").write_text(source.replace(old, new), encoding="utf-8")
        package = types.ModuleType("_planted_kernels")
        package.__path__ = [copies]
        sys.modules[package.__name__] = package
        before = dict(target._loaded)
        try:
            for slot, launcher in enumerate(launchers):
                if launcher:
                    module = importlib.import_module(f"{package.__name__}.{launcher[0]}")
                    target._loaded[backend, slot] = getattr(module, launcher[1])
            yield
        finally:
            target._loaded.clear()
            target._loaded.update(before)
            for name in [n for n in sys.modules if n.split(".")[0] == package.__name__]:
                del sys.modules[name]
