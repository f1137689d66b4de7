"""How the optimizers store: dtypes of states, what a new parameter needs, and what a state dict becomes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastlm.errors import UserError
from fastlm.ops.block_quantize import BLOCK, block_dequantize, block_quantize
from fastlm.ops.master_weights import join_master, split_master
from fastlm.optim.huge_pages import zeros_like

PRECISIONS = ("nearest", "stochastic", "remainder", "master")
STORED = ("precision", "state_bits")  # options that decide how a parameter's states are stored
KEPT = (*STORED, "average_decay", "seed")  # options that a state dict does not change
SMALLEST_8_BIT = 4096  # elements: below, the codes would save nothing worth having and norms are sensitive
_CODES = (torch.int8, torch.uint8)  # of the first moment, which has a sign, and of the second
_HALF = (torch.bfloat16, torch.float16)


def check_group(name: str, group: dict[str, Any]) -> None:
    """Raises UserError for storage options that are unknown or do not fit the group's parameters."""
    precision, bits, decay = (group.get(option) for option in KEPT[:3])
    if precision is not None and precision not in PRECISIONS:
        raise UserError(f"{name}: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if bits not in (None, 8, 32):
        raise UserError(f"{name}: state_bits must be None, 32 or 8, got {bits!r}")
    if not isinstance(group.get("seed", 0), int):
        raise UserError(f"{name}: seed must be an int, got {group['seed']!r}")
    if decay is not None and not 0 <= decay < 1:
        raise UserError(f"{name}: average_decay must be in [0, 1) or None, got {decay}")
    for p in checked(group):
        if not p.is_floating_point():
            raise UserError(f"{name}: parameters must be real floating point, got {p.dtype}")
        if p.dtype == torch.float16 and precision in ("stochastic", "remainder"):
            raise UserError(f"{name}: precision {precision!r} is for bfloat16 parameters, got float16; use 'master'")


def checked(group: dict[str, Any]) -> list[Tensor]:
    """The group's parameters that must be such as the optimizer can train; frozen ones may be anything."""
    return [p for p in group["params"] if p.requires_grad or p.grad is not None]


def moment_dtype(p: Tensor, group: dict[str, Any]) -> torch.dtype:
    """The dtype of a moment that is not in 8-bit codes."""
    if group.get("state_bits") is None and group.get("precision", "nearest") == "nearest":
        return p.dtype
    return torch.promote_types(p.dtype, torch.float32)


def in_codes(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether a parameter's moments are kept in 8-bit codes: blocks follow memory, so its own must have no gaps."""
    return group.get("state_bits") == 8 and p.numel() >= SMALLEST_8_BIT and p.is_contiguous()


def complete(optimizer: Any, p: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Adds to a parameter's state, in place, what it lacks for its next step."""
    codes = in_codes(p, group)
    for place, name in enumerate(optimizer._moments(group)):
        if name not in state:
            dtype = _CODES[place] if codes else moment_dtype(p, group)
            state[name] = zeros_like(p, dtype)
        if codes and f"{name}_scale" not in state:
            state[f"{name}_scale"] = _scale_of(
                p, torch.zeros(blocks_of(_local(p).numel()), dtype=torch.float32, device=p.device)
            )
    _complete_master(p, group.get("precision"), state)
    if group.get("average_decay") is not None and "average" not in state:
        dtype = torch.promote_types(p.dtype, torch.float32)
        state["average"] = p.detach().to(dtype, memory_format=torch.preserve_format, copy=True)


def _complete_master(p: Tensor, precision: str | None, state: dict[str, Tensor]) -> None:
    """Adds a master or remainder, from the other one if the state has that: then it, not p, says what the weight is."""
    if precision == "master" and p.dtype in _HALF and "master" not in state:
        if "remainder" in state and p.dtype == torch.bfloat16:
            state["master"] = _like(p, join_master(_local(p.detach()), _local(state["remainder"])))
        else:
            state["master"] = p.detach().to(torch.float32, memory_format=torch.preserve_format)
    if precision == "remainder" and p.dtype == torch.bfloat16 and "remainder" not in state:
        state["remainder"] = torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format)
        if "master" in state:
            # Ties are rounded otherwise than a master's weight is: p changes there.
            own, remainder = split_master(_local(state["master"]))
            _local(p.detach()).copy_(own)
            _local(state["remainder"]).copy_(remainder)
    for name in {"master", "remainder"} - {precision}:
        state.pop(name, None)


def fit(optimizer: Any, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    """Converts a parameter's states, in place in the dict, to what its group asks for, and drops what it does not want.

    A master where a remainder is wanted, and the reverse, wait for `complete`: the weights may not have been loaded yet.
    """
    codes = in_codes(p, group)
    for place, name in enumerate(optimizer._moments(group)):
        scale, value = state.get(f"{name}_scale"), state.get(name)
        if value is not None and ((scale is not None) != codes or not (codes or value.dtype == moment_dtype(p, group))):
            state.pop(f"{name}_scale", None)
            state.update(_converted(p, group, name, place, value, scale))
    if group.get("precision") not in ("master", "remainder") or p.dtype not in _HALF:
        state.pop("master", None)
        state.pop("remainder", None)
    if group.get("average_decay") is None:
        state.pop("average", None)


def _converted(p, group, name: str, place: int, value: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
    """A moment, in 8-bit codes if it has a scale, as the group keeps it."""
    if scale is not None:
        value = _like(p, block_dequantize(_local(value), own_scales(p, scale)))
    if not in_codes(p, group):
        return {name: value.to(moment_dtype(p, group))}
    coded, own = block_quantize(_local(value).float().contiguous(), _CODES[place] == torch.int8)
    return {name: _like(p, coded), f"{name}_scale": _scale_of(p, own)}


def count(steps: float = 0) -> Tensor:
    """A number of steps as a state: fp32 on the host, as torch's, whatever the default dtype and device are."""
    return torch.tensor(float(steps), dtype=torch.float32, device="cpu")


def blocks_of(elements: int) -> int:
    return -(-elements // BLOCK)


def own_scales(p: Tensor, scale: Tensor) -> Tensor:
    """The scales of this process's part of a parameter."""
    return _local(scale)[: blocks_of(_local(p).numel())]


def _scale_of(p: Tensor, own: Tensor) -> Tensor:
    """The state that holds a parameter's own scales: themselves, or for a DTensor a DTensor of all processes' scales, with as
    many places for each as the largest part needs, so that distributed checkpoints can save it."""
    if not _is_divided(p):
        return own
    from torch.distributed.tensor import DTensor, Replicate, Shard

    largest, places = list(p.shape), []
    for dim, place in enumerate(p.placements):
        if place.is_shard():
            largest[place.dim] = -(-largest[place.dim] // p.device_mesh.size(dim))
        places.append(Shard(0) if place.is_shard() else Replicate())
    padded = torch.zeros(blocks_of(math.prod(largest)), dtype=own.dtype, device=own.device)
    padded[: own.numel()] = own
    return DTensor.from_local(padded, p.device_mesh, places, run_check=False)


def _is_divided(t: Any) -> bool:
    return type(t).__name__ == "DTensor"


def _local(t: Tensor) -> Tensor:
    return t.to_local() if _is_divided(t) else t


def _like(p: Tensor, own: Tensor) -> Tensor:
    """This process's part as a tensor divided like the parameter."""
    if not _is_divided(p):
        return own
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(own, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def on_host(count: Tensor) -> Tensor:
    """A copy on the host; of one without values there."""
    return count.detach().clone() if count.is_meta else count.detach().to("cpu", copy=True)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as a state dict holds it."""
    found = dict(state)
    if isinstance(state.get("step"), Tensor):
        found["step"] = on_host(state["step"])
    if _is_divided(state.get("remainder")):
        found["remainder"] = state["remainder"].to(torch.int32)  # neither NCCL nor gloo gathers int16
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
        for name, value in {**optimizer.defaults, **old}.items():
            new.setdefault(name, value)
    for saved, group in zip(loaded["param_groups"], state["param_groups"]):
        for key, p in zip(saved["params"], group["params"]):
            if key in loaded["state"]:
                own = _copied(p, loaded["state"][key])
                _check_moments(optimizer, key, p, group, own)
                fit(optimizer, p, group, own)
                state["state"][p] = own


def _copied(p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
    """A parameter's saved state on its device, not aliasing the saved one, in the dtypes that it was saved in."""
    found: dict[str, Any] = {}
    for name, value in saved.items():
        if not isinstance(value, Tensor):
            if value is not None:  # torch.optim.SGD without momentum saves a None
                found[name] = count(float(value)) if name == "step" else value
        elif name == "step":  # a fused or capturable torch optimizer keeps it on the device
            found[name] = value.detach().to("cpu", torch.float32, copy=True)
        else:
            dtype = torch.int16 if name == "remainder" else value.dtype
            found[name] = value.to(p.device, dtype, copy=True)
    return found


def _check_moments(optimizer: Any, key: Any, p: Tensor, group: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises UserError if moments are missing from a state that has made steps, or a state has another shape than its parameter;
    adds the step to one that has only moments."""
    moments = optimizer._moments(group)
    for name in (*moments, "master", "remainder", "average"):
        if name in own and own[name].shape != p.shape:
            raise UserError(
                f"{type(optimizer).__name__}: the state dict's {name} of parameter {key} is {list(own[name].shape)}, the "
                f"parameter {list(p.shape)}: it is of another model, or its parameters are in another order"
            )
    missing = [name for name in moments if name not in own]
    if "step" not in own and len(missing) < len(moments):
        own["step"] = count(1)  # torch.optim.SGD does not count; with a momentum it has made a step
    steps = int(own.get("step", 0))
    if missing and steps:
        raise UserError(
            f"{type(optimizer).__name__}: the state dict has no {missing[0]} of parameter {key}, which has made {steps} steps: "
            "it is another optimizer's; load it into that one, or begin with new moments by loading the weights alone"
        )


def share_steps(optimizer: Any) -> None:
    """Gives parameters of a group with equal step counts one step tensor (see FusedOptimizer._counted_together)."""
    for group in optimizer.param_groups:
        shared: dict[float, Tensor] = {}
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = shared.setdefault(float(state["step"]), state["step"])
