"""The battery of checks that every op passes on every backend: what design and CONTRIBUTING.md promise of all ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.ops._op import REGISTRY, Op
from fastlm.testing.accuracy import Case, as_tuple, fresh, grad_inputs, outputs_and_gradients
from fastlm.testing.guards import bands_intact, guarded, poison_empty


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
        outputs_and_gradients(lambda *a: case.fn(*a, backend=backend), case.empty(torch.float32, device))
    if device == "cuda":
        check_cuda_graph(case, backend)


def check_reference(case: Case) -> None:
    """The maths alone: fp64 gradcheck and gradgradcheck of the reference."""
    args = fresh(case.tiny(torch.float64, "cpu"))
    fn = lambda *a: case.fn(*a, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(fn, args)
    assert torch.autograd.gradgradcheck(fn, args)


def check_safety(case: Case, backend: str, device: str) -> None:
    """Inputs bitwise unchanged, a second backward equal to the first, two runs bitwise equal."""
    args = fresh(case.make(torch.float32, device))
    before = [a.detach().clone() for a in args if isinstance(a, Tensor)]
    outs = [o for o in as_tuple(case.fn(*args, backend=backend)) if o.requires_grad]
    loss = sum(o.double().square().sum() for o in outs)
    first = torch.autograd.grad(loss, grad_inputs(args), retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, grad_inputs(args), allow_unused=True)
    for a, b in zip(first, second):
        assert a is b is None or torch.equal(a, b), f"{case.op} {backend}: a second backward gave other gradients"
    for a, b in zip([a for a in args if isinstance(a, Tensor)], before):
        assert torch.equal(a, b), f"{case.op} {backend}: an input was changed"
    one, two = (outputs_and_gradients(lambda *a: case.fn(*a, backend=backend), args) for _ in range(2))
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
        outs, grads = outputs_and_gradients(lambda *a: case.fn(*a, backend=backend), tuple(args))
    clean_outs, clean_grads = outputs_and_gradients(lambda *a: case.fn(*a, backend=backend), tuple(args))
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
    want = outputs_and_gradients(lambda *a: case.fn(*a, backend=backend), args)
    for kind in ("permuted", "sliced", "row_slice"):
        views = tuple(_strided(a, kind) if isinstance(a, Tensor) else a for a in args)
        got = outputs_and_gradients(lambda *a: case.fn(*a, backend=backend), views)
        for g, w in zip(got[0] + got[1], want[0] + want[1]):
            if w is not None:
                torch.testing.assert_close(g, w, msg=lambda m, kind=kind: f"{case.op} {backend}, {kind} inputs: {m}")
    expanded = fresh(args)
    outs = [o for o in as_tuple(case.fn(*expanded, backend=backend)) if o.requires_grad]
    grads = torch.autograd.grad([o.sum() for o in outs], grad_inputs(expanded), allow_unused=True)
    dense = torch.autograd.grad(
        [o for o in as_tuple(case.fn(*expanded, backend=backend)) if o.requires_grad],
        grad_inputs(expanded), [torch.ones_like(o).contiguous() for o in outs], allow_unused=True,
    )  # fmt: skip
    for g, w in zip(grads, dense):
        if w is not None:
            torch.testing.assert_close(g, w, msg=lambda m: f"{case.op} {backend}, zero-stride cotangent: {m}")


def check_autocast(case: Case, backend: str, device: str) -> None:
    """Under bf16 autocast fp32 inputs give bf16 outputs (products, attention) or keep fp32 (norms, losses)."""
    with torch.autocast(device, dtype=torch.bfloat16):
        outs = as_tuple(case.fn(*case.make(torch.float32, device), backend=backend))
    want = torch.bfloat16 if case.autocast == "cast" else torch.float32
    assert outs[0].dtype == want, f"{case.op} {backend}: {outs[0].dtype} under autocast, expected {want}"


def check_transforms(case: Case, backend: str, device: str) -> None:
    """vmap(grad) over the first argument equals a loop; jvp runs."""
    first, *rest = case.tiny(torch.float32, device)
    stack = torch.stack([first, first * 0.5, first + 1])

    def total(a: Tensor) -> Tensor:
        return as_tuple(case.fn(a, *rest, backend=backend))[0].sum()

    got = torch.func.vmap(torch.func.grad(total))(stack)
    want = torch.stack([torch.func.grad(total)(a) for a in stack])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(total, (first,), (torch.ones_like(first),))
    torch.testing.assert_close(tangent, want[0].sum(), rtol=1e-3, atol=1e-4)


def check_compile(case: Case, backend: str, device: str) -> None:
    """torch.compile(fullgraph=True, dynamic=True), forward and backward at two shapes, equals eager."""
    torch._dynamo.reset()
    fn = lambda *a: as_tuple(case.fn(*a, backend=backend))  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for make in (case.tiny, case.make):
        args = make(torch.float32, device)
        got, want = outputs_and_gradients(compiled, args), outputs_and_gradients(fn, args)
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
        outputs_and_gradients(lambda *a: case.fn(*a, backend=backend), case.make(torch.float32, device))
    finally:
        op.forward, op.backward = real_forward, real_backward
    return seen["forward"], seen.get("backward")


def check_dispatcher(case: Case, backend: str, device: str) -> None:
    """torch.library.opcheck of the op with and without grad, and of its backward."""
    op = REGISTRY[case.op]
    forward, backward = _recorded(op, case, backend, device)
    without = tuple(a.detach() if isinstance(a, Tensor) else a for a in forward)
    torch.library.opcheck(op.forward, without)
    torch.library.opcheck(op.forward, fresh(without))
    if backward is not None:
        torch.library.opcheck(op.backward, tuple(a.detach() if isinstance(a, Tensor) else a for a in backward))


def check_double_backward(case: Case, backend: str, device: str) -> None:
    """Second derivatives through the kernel equal those of the reference."""
    values = case.tiny(torch.float32, device)

    def second(name: str) -> tuple:
        args = fresh(values)
        outs = [o for o in as_tuple(case.fn(*args, backend=name)) if o.requires_grad]
        inputs = grad_inputs(args)
        first = torch.autograd.grad(sum(o.sin().sum() for o in outs), inputs, create_graph=True, allow_unused=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), inputs, allow_unused=True)

    for got, want in zip(second(backend), second("reference")):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4, msg=lambda m: f"{case.op} double backward: {m}")


def check_cuda_graph(case: Case, backend: str) -> None:
    """No host-device sync, and a captured graph replays to the same result (GPU only)."""
    args = fresh(case.make(torch.float32, "cuda"))
    fn = lambda: outputs_and_gradients(lambda *a: case.fn(*a, backend=backend), args)  # noqa: E731
    want = fn()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    outs = lambda: as_tuple(case.fn(*args, backend=backend))  # noqa: E731
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
