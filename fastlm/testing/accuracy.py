"""The accuracy rule, and how a call is run for it: outputs, and gradients under fixed random cotangents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# The "tiny atol" of the accuracy rule, in units of the dtype's eps times the largest reference value.
_ULPS = {torch.float64: 16.0, torch.float32: 4.0, torch.bfloat16: 0.25, torch.float16: 0.25}


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


def as_tuple(out: Any) -> tuple:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def grad_inputs(args: tuple) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]


def fresh(args: tuple, dtype: torch.dtype | None = None) -> tuple:
    """Leaves with the same values (and strides, unless cast) that require grad."""
    out = []
    for a in args:
        if isinstance(a, Tensor) and a.is_floating_point():
            a = a.detach().to(dtype) if dtype else a.detach()
            a = a.requires_grad_()
        out.append(a)
    return tuple(out)


def outputs_and_gradients(fn: Callable, args: tuple, seed: int = 1) -> tuple[tuple, tuple]:
    """Outputs and the gradients of every floating input under fixed random cotangents."""
    args = fresh(args)
    outs = as_tuple(fn(*args))
    live = [o for o in outs if o.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype).to(o.device) for o in live]
    if not live:
        return outs, ()
    return outs, torch.autograd.grad(live, grad_inputs(args), cotangents, allow_unused=True)


def check_accuracy(
    case: Case, backend: str, dtype: torch.dtype, device: str, args: tuple | list[tuple] | None = None
) -> None:
    """Forward and every gradient under the accuracy rule. A list of several args is judged together: for results of few
    elements, where the error of a single draw of plain torch may be small by chance."""
    draws = args if isinstance(args, list) else [case.make(dtype, device) if args is None else args]
    plain = case.plain or (lambda *a: case.fn(*a, backend="reference"))
    # Compared against what fp64 makes of the very same (rounded) inputs.
    exact = [outputs_and_gradients(lambda *a: case.fn(*a, backend="reference"), _cast(a, torch.float64)) for a in draws]
    base = [outputs_and_gradients(plain, a) for a in draws]
    found = [outputs_and_gradients(lambda *a: case.fn(*a, backend=backend), a) for a in draws]
    for part, kind in enumerate(("output", "gradient")):
        columns = [list(zip(*(run[part] for run in runs))) for runs in (found, exact, base)]
        assert len(columns[0]) == len(columns[1]), f"{len(columns[0])} {kind}s, expected {len(columns[1])}"
        for i, (g, e, b) in enumerate(zip(*columns)):
            if e[0] is not None:
                assert g[0] is not None, f"{case.op} {backend}: {kind} {i} is missing"
                assert_accurate(*map(torch.stack, (g, e, b)), f"{case.op} {backend} {dtype}: {kind} {i}")


def _cast(args: tuple, dtype: torch.dtype) -> tuple:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
