"""How the optimizers store: dtypes of states, what a new parameter needs, and what a state dict becomes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.errors import UserError

PRECISIONS = ("nearest", "stochastic", "remainder", "master")
KEPT = ("precision", "state_bits", "average_decay")  # options that a state dict does not change
SMALLEST_8_BIT = 4096  # elements: below, the codes would save nothing worth having and norms are sensitive
_HALF = (torch.bfloat16, torch.float16)


def check_group(name: str, group: dict[str, Any]) -> None:
    """Raises UserError for storage options that are unknown or do not fit the group's parameters."""
    precision, bits, decay = (group.get(option) for option in KEPT)
    if precision is not None and precision not in PRECISIONS:
        raise UserError(f"{name}: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if bits not in (None, 8, 32):
        raise UserError(f"{name}: state_bits must be None, 32 or 8, got {bits!r}")
    if decay is not None and not 0 <= decay < 1:
        raise UserError(f"{name}: average_decay must be in [0, 1) or None, got {decay}")
    for p in group["params"]:
        if not p.is_floating_point():
            raise UserError(f"{name}: parameters must be real floating point, got {p.dtype}")
        if p.dtype == torch.float16 and precision in ("stochastic", "remainder"):
            raise UserError(f"{name}: precision {precision!r} is for bfloat16 parameters, got float16; use 'master'")


def moment_dtype(p: Tensor, group: dict[str, Any]) -> torch.dtype:
    """The dtype of a moment that is not in 8-bit codes."""
    if group.get("state_bits") is None and group.get("precision", "nearest") == "nearest":
        return p.dtype
    return torch.promote_types(p.dtype, torch.float32)


def complete(optimizer: Any, p: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Adds to a parameter's state, in place, what it lacks for its next step."""
    for name in optimizer._moments(group):
        if name not in state:
            state[name] = torch.zeros_like(p, dtype=moment_dtype(p, group), memory_format=torch.preserve_format)
    precision = group.get("precision")
    if precision == "master" and p.dtype in _HALF and "master" not in state:
        state["master"] = p.detach().to(torch.float32, memory_format=torch.preserve_format)
    if precision == "remainder" and p.dtype == torch.bfloat16 and "remainder" not in state:
        state["remainder"] = torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format)
    if group.get("average_decay") is not None and "average" not in state:
        dtype = torch.promote_types(p.dtype, torch.float32)
        state["average"] = p.detach().to(dtype, memory_format=torch.preserve_format, copy=True)


def step_seed(seed: int, step: int | Tensor, device: torch.device) -> Tensor:
    """int64 [2] (seed, step) on the device: other random numbers at every step, the same after a resume. No host sync."""
    found = torch.full((2,), seed, dtype=torch.int64, device=device)
    if isinstance(step, Tensor):
        found[1].copy_(step)
    else:
        found[1].fill_(step)
    return found


def restore(optimizer: Any, state: dict[str, Any], groups: list[dict[str, Any]], loaded: dict[str, Any]) -> None:
    """Undoes, in place in `state`, what torch's load_state_dict did to dtypes and to options that stay: `groups` are the
    optimizer's own before, `loaded` the state dict as it was given."""
    for new, old in zip(state["param_groups"], groups):
        for option in KEPT:
            if option in old:
                new[option] = old[option]
            else:
                new.pop(option, None)
        for name, value in optimizer.defaults.items():
            new.setdefault(name, old.get(name, value))
    for saved, group in zip(loaded["param_groups"], groups):
        for key, p in zip(saved["params"], group["params"]):
            if key in loaded["state"]:
                state["state"][p] = _fitted(optimizer, p, group, loaded["state"][key])


def _fitted(optimizer: Any, p: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A parameter's saved state in the dtypes and kinds that its group asks for, on its device, not aliasing the saved one."""
    fitted: dict[str, Any] = {}
    precision, decay = group.get("precision"), group.get("average_decay")
    for name, value in saved.items():
        if not isinstance(value, Tensor):
            if value is not None:  # torch.optim.SGD without momentum saves a None
                fitted[name] = torch.tensor(float(value)) if name == "step" else value
        elif name == "step":  # a fused or capturable torch optimizer keeps it on the device
            fitted[name] = value.detach().to("cpu", torch.float32, copy=True)
        elif name in optimizer._moments(group):
            fitted[name] = value.to(p.device, moment_dtype(p, group), copy=True)
        elif (name == "average" and decay is None) or (name in ("master", "remainder") and name != precision):
            continue
        else:
            fitted[name] = value.to(p.device, copy=True)
    return fitted


def share_steps(optimizer: Any) -> None:
    """Gives parameters of a group with equal step counts one step tensor (see FusedOptimizer._counted)."""
    for group in optimizer.param_groups:
        shared: dict[float, Tensor] = {}
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = shared.setdefault(float(state["step"]), state["step"])
