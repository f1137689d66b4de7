"""What test_fuzz.py draws: shapes, strides, dtypes and options of one call of each op, and the plain torch it must equal.

A plan holds no tensors, only numbers, so that hypothesis can make a failing one smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

SIZES = (0, 1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33)
WIDTHS = (1, 2, 3, 5, 8, 16, 17, 31, 40, 64, 65, 100)
LAYOUTS = ("contiguous", "permuted", "steps", "rows_apart", "offset", "expanded")


@dataclass(frozen=True)
class Plan:
    """One call. `shapes` are those of its random floating tensors, by argument name; `call(backend, **tensors)` and
    `plain(**tensors)` take them."""

    shapes: dict[str, tuple[int, ...]]
    call: Callable[..., Any]
    plain: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)  # for the report of a failure only

    def __repr__(self) -> str:
        return f"Plan({self.shapes}, {self.options})"


def shape_of(
    draw: Callable, width: int | None = None, most: int = 512, dims: tuple[int, int] = (0, 3)
) -> tuple[int, ...]:
    """Leading sizes whose product is at most `most`, then `width` if given."""
    shape: list[int] = []
    for _ in range(draw(st.integers(*dims))):
        room = most // max(1, torch.Size(shape).numel())
        shape.append(draw(st.sampled_from([s for s in SIZES if s <= max(1, room)])))
    return (*shape, *(() if width is None else (width,)))


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The values under other strides. "expanded" repeats the first index along the first dimension: new values."""
    shape = values.shape
    if values.ndim == 0 or layout == "contiguous":
        return values.clone()
    if layout == "permuted":
        order = list(range(values.ndim))[::-1]
        return values.permute(order).contiguous().permute(order)
    if layout == "steps":
        room = values.new_full((*shape[:-1], 2 * shape[-1] + 1), float("nan"))[..., 1::2]
    elif layout == "rows_apart":
        room = values.new_full((*shape[:-1], shape[-1] + 3), float("nan"))[..., 1 : 1 + shape[-1]]
    elif layout == "offset":
        room = values.new_full((values.numel() + 1,), float("nan"))[1:].view(shape)
    else:
        return values[:1].expand(shape) if shape[0] else values.clone()
    return room.copy_(values)


def tensors_of(plan: Plan, layouts: dict[str, str], seed: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Random leaves that require grad, in the drawn layouts."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in plan.shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
        made[name] = laid_out(values, layouts[name]).detach().requires_grad_()
    return made


def outputs_and_gradients(fn: Callable, tensors: dict[str, Tensor], layout: str = "contiguous") -> list[Tensor | None]:
    """Outputs, then the gradient of each tensor (None where there is none), under cotangents that are always the same."""
    outs = fn(**tensors)
    outs = list(outs) if isinstance(outs, (tuple, list)) else [outs]
    live = [o for o in outs if o.requires_grad]
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        laid_out(torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype).to(o.device), layout)
        for o in live
    ]
    if not live:
        return outs
    return outs + list(torch.autograd.grad(live, list(tensors.values()), cotangents, allow_unused=True))
