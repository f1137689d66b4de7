"""What the optimizers share: clipping and skipping without a host sync, step counts, modes of storage, moving averages.

A subclass names its states in `MOMENTS` and calls its op in `_update`; everything else is done here, once.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastlm.errors import UserError
from fastlm.optim import state as storage
from fastlm.optim.clip import clip_coefficient, global_norm
from fastlm.optim.plan import Plan, Turn

_ONE = storage.count(1)


class FusedOptimizer(torch.optim.Optimizer):
    """Base of fastlm.optim's optimizers, and a torch.optim.Optimizer in all that users see: parameter groups, closures, hooks,
    a number or tensor as `lr`, torch's schedulers and GradScaler, DDP and FSDP2.

    Options of a parameter group (each has a default for all groups in the constructor):

        precision      what becomes of a 16-bit parameter's update, computed in fp32. fp32 parameters do not ask.
                       "nearest": rounded to nearest, as in torch.  "stochastic": bf16, rounded up or down with the probability
                       that makes the mean right.
                       "remainder": bf16, and the 16 bits cut off kept in an int16 state: exactly the fp32 weight.
                       "master": an fp32 copy of the weight as a state.
        state_bits     None: moments in the parameter's dtype as in torch, but fp32 in the other three precisions (in bf16 a
                       second moment with beta2 = 0.999 stands still).  32: fp32.  8: 8-bit codes with an fp32 scale for each 256
                       elements, rounded at random (`seed`), as bf16 parameters without a master then are too; parameters of
                       fewer than 4096 elements, and ones that are not contiguous, keep fp32. torch's optimizers cannot read
                       such a state dict; an optimizer of this library without state_bits=8 can.
        seed           an int, the same on every process. The random numbers of a parameter depend on it, on the parameter's place
                       among all of the optimizer's, on its step and on the element, and so are the same after a resume.
        average_decay  d: keep a moving average a <- d * a + (1 - d) * p of the weights in fp32, written by the same launch;
                       see `averages()`. None: no average.

    Options may change between steps, as in torch: states are converted, added or dropped at the next step. Frozen parameters,
    whatever their dtype and shape, are taken and left alone; they are checked when they first have a gradient.

    Args:
        max_norm: gradients whose global norm, over all parameters of this optimizer (whole tensors under FSDP2), is larger are
            scaled down to it, inside the step. The norm before that is kept in `grad_norm`, a 0-d device tensor.
        skip_nonfinite: a NaN or infinity in any gradient leaves every weight and state as it was, bit for bit, does not count
            as a step, and adds one to `skipped`, a 0-d int64 device tensor, which state dicts hold. No host sync.
            On by default: a NaN that reaches the weights ends a run. It costs one read of the gradients, and nothing where
            max_norm is set: 11.3 instead of 8.7 ms a step for AdamW on 13.8 M fp32 weights on one CPU core, where torch's
            fused step takes 8.8.
    """

    MOMENTS: tuple[str, ...] = ()  # names of the states that are moments, one tensor per parameter and of its shape
    # GradScaler then sets self.grad_scale and self.found_inf and leaves the rest to step().
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        max_norm: float | None = None,
        skip_nonfinite: bool = True,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise UserError(f"{type(self).__name__}: max_norm must be above 0 or None, got {max_norm}")
        self.max_norm, self.skip_nonfinite = max_norm, skip_nonfinite
        # In a dict: torch 2.11 compiles no assignment to an attribute of an optimizer.
        self._seen: dict[str, Tensor | None] = {"grad_norm": None, "skipped": torch.zeros((), dtype=torch.int64)}
        self._prepared: dict[Tensor, tuple] = {}  # parameters whose state is complete -> for which options
        self._plan: Plan | None = None
        self._averaging = False
        self._loading: dict[str, Any] | None = None
        super().__init__(params, defaults)

    @property
    def grad_norm(self) -> Tensor | None:
        """The global norm of the last step's gradients, before clipping: a 0-d tensor, or None where nobody asked for it."""
        return self._seen["grad_norm"]

    @property
    def skipped(self) -> Tensor:
        """How many steps were not made since a gradient was NaN or infinite: int64, 0-d, on the gradients' device."""
        return self._seen["skipped"]

    # --- what a subclass says -------------------------------------------------------------------------------------

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """`MOMENTS` of the parameters of one group, where groups differ in them."""
        return self.MOMENTS

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises UserError for hyperparameters out of range; lr, weight_decay and eps have been looked at."""

    def _check_loaded(self, groups: list[dict[str, Any]]) -> None:
        """Raises UserError if parameter groups of a state dict ask for what this optimizer does not do."""
        for group in groups:
            self._check_supported(group, "the state dict has ")

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        step: int | Tensor,
        common: dict[str, Any],
    ) -> None:
        """Updates parameters of one dtype and device that have made equally many steps.

        Args:
            step: the number of this step, from 1; a 0-d device tensor where the host does not know how many were skipped.
            common: the keyword arguments that every optimizer op takes: grad_scale, found_inf, masters, remainders, seed,
                streams, averages, average_decay and <moment>_scales, those that are needed.
        """
        raise NotImplementedError

    # --- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, *, grad_scale: Tensor | float | None = None) -> Any:
        """Makes one step. Parameters without a gradient are left alone.

        Args:
            closure: as in torch.optim: re-evaluates the model and returns the loss.
            grad_scale: 0-d tensor or number that multiplies every gradient before anything else. Stays on the device.

        Returns:
            The closure's loss, or None.

        Raises:
            UserError: a sparse or complex gradient; a call inside `averages()`.
        """
        if self._averaging:
            raise UserError(
                f"{self._name}: step() inside averages() would train the averaged weights; leave the block first"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        grads = [p.grad for params in moving for p in params]
        if not grads:
            self._seen["grad_norm"] = None
            return loss
        self._check_gradients(grads)
        scale, found_inf = self._survey(grads, grad_scale)
        if found_inf is not None:
            if self.skipped.device != found_inf.device:  # once: it stays there
                self._seen["skipped"] = self.skipped.to(found_inf.device)
            self.skipped.add_(found_inf != 0)
            if self._is_known(found_inf):
                if found_inf.item():
                    return loss
                found_inf = None
        streams: dict[Tensor, int] = {}
        if any(group.get("precision") == "stochastic" or group.get("state_bits") == 8 for group in self.param_groups):
            streams = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        turns, states = self._turns(moving)
        for turn in turns:
            step = self._count(turn, moving, states, found_inf)
            for places, at in turn.alike:
                params, theirs = [moving[turn.group][i] for i in places], [states[i] for i in at]
                self._launch(self.param_groups[turn.group], params, theirs, step, scale, found_inf, streams)
        return loss

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _is_known(self, found_inf: Tensor) -> bool:
        """Whether the host can read it without waiting for a device."""
        return found_inf.device.type == "cpu" and not torch.compiler.is_compiling()

    def _check_gradients(self, grads: list[Tensor]) -> None:
        for g in grads:
            if g.layout != torch.strided:
                raise UserError(
                    f"{self._name}: sparse gradients are not supported; make the embedding with sparse=False"
                )
            if not g.is_floating_point():
                raise UserError(f"{self._name}: gradients must be real floating point, got {g.dtype}")

    def _survey(self, grads: list[Tensor], scale: Any) -> tuple[Any, Tensor | None]:
        """-> what multiplies every gradient, and a 0-d tensor that is nonzero if the step must not be made (None: make it)."""
        loss_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # GradScaler's
        if loss_scale is not None:
            scale = 1.0 / loss_scale if scale is None else scale / loss_scale
        self._seen["grad_norm"] = None
        if self.max_norm is None and not self.skip_nonfinite:
            return scale, found_inf
        norm = global_norm(grads)
        if scale is not None:
            norm = norm * (scale.abs().to(norm.device) if isinstance(scale, Tensor) else abs(scale))
        self._seen["grad_norm"] = norm
        if self.max_norm is not None:
            coefficient = clip_coefficient(norm, self.max_norm)
            if isinstance(scale, Tensor):
                scale = scale.to(norm.device)
            scale = coefficient if scale is None else coefficient * scale
        if self.skip_nonfinite:
            bad = (~norm.isfinite()).float()
            found_inf = bad if found_inf is None else bad + found_inf.to(bad.device)
        return scale, found_inf

    def _turns(self, moving: list[list[Tensor]]) -> tuple[list[Turn], list[dict[str, Tensor]]]:
        """Who steps together, and all states in their order; `moving` are the parameters of each group that have a gradient."""
        options = [
            (self._moments(group), *map(group.get, storage.STORED), group.get("average_decay") is None)
            for group in self.param_groups
        ]
        kinds = [[(id(p), p.dtype, p.device) for p in params] for params in moving]
        states = list(self.state.values())
        if self._plan is not None and self._plan.serves(kinds, options, states):
            return self._plan.turns, states
        for group, params, wanted in zip(self.param_groups, moving, options):
            self._prepare(group, params, wanted)
        states = list(self.state.values())
        turns = list(self._counted_together(moving))
        if not torch.compiler.is_compiling():  # compiled, who steps together is part of the code
            self._plan = Plan(kinds, options, list(map(id, states)), [state.get("step") for state in states], turns)
        return turns, states

    def _prepare(self, group: dict[str, Any], params: list[Tensor], options: tuple) -> None:
        """Completes the states of those of these parameters that are new, or whose group's options have changed."""
        changed = [
            p for p in params if not self.state.get(p) or self._prepared.get(p) != options
        ]  # a user may empty states
        if not changed:
            return
        self._validate(group)
        new: dict[torch.device, Tensor] = {}
        for p in changed:
            state = self.state[p]
            if "step" not in state or any(name not in state for name in self._moments(group)):
                state["step"] = new.setdefault(p.device, storage.count())  # new moments begin with a first step
            storage.fit(self, p, group, state)
            storage.complete(self, p, group, state)
            self._prepared[p] = (p.dtype, *options)

    def _counted_together(self, moving: list[list[Tensor]]) -> Iterator[Turn]:
        """Those of a group's parameters with a gradient that have one step tensor, which then no other parameter has.

        Parameters of a group that always step together share it: counting is one addition for all of them. It lives on the
        host, as in torch, unless only the device knows whether a step is made.
        """
        sharing: dict[int, dict[tuple, list[Tensor]]] = {}
        for number, (group, params) in enumerate(zip(self.param_groups, moving)):
            stepping = set(params)
            for p in group["params"]:
                state = self.state.get(p)
                if state and "step" in state:
                    part = (number, p in stepping, p.device)
                    sharing.setdefault(id(state["step"]), {}).setdefault(part, []).append(p)
        for parts in sharing.values():
            for (number, steps, _), params in parts.items():
                if not steps:
                    continue
                if len(parts) > 1:  # the others count for themselves
                    step = self.state[params[0]]["step"].clone()
                    for p in params:
                        self.state[p]["step"] = step
                yield Turn(number, self.state[params[0]]["step"], self._alike(moving[number], params))

    def _count(
        self, turn: Turn, moving: list[list[Tensor]], states: list[dict], found_inf: Tensor | None
    ) -> int | Tensor:
        """Counts the step; its number, from 1."""
        step, device = turn.step, moving[turn.group][turn.alike[0][0][0]].device
        if found_inf is not None and step.device.type == "cpu" != device.type:
            step = step.to(device)
            for _, at in turn.alike:
                for i in at:
                    states[i]["step"] = step
        if found_inf is None:
            step.add_(_ONE if step.device.type == "cpu" else 1)  # + 1 would make a tensor of it each time
        else:
            step += found_inf.to(step.device) == 0
        return int(step) if step.device.type == "cpu" != device.type else step

    def _alike(self, moving: list[Tensor], params: list[Tensor]) -> list[tuple[list[int], list[int]]]:
        """The places of these parameters and their states, in lists of one dtype and device and of the same kinds of states."""
        places = {p: i for i, p in enumerate(moving)}
        states = {p: i for i, p in enumerate(self.state)}
        found: dict[tuple, tuple[list[int], list[int]]] = {}
        for p in params:
            same = found.setdefault((p.dtype, p.device, *self.state[p]), ([], []))
            same[0].append(places[p])
            same[1].append(states[p])
        return list(found.values())

    def _launch(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        states: list[dict[str, Tensor]],
        step: int | Tensor,
        scale: Any,
        found_inf: Tensor | None,
        streams: dict[Tensor, int],
    ) -> None:
        kinds, device = states[0], params[0].device
        common: dict[str, Any] = {}
        if scale is not None:
            common["grad_scale"] = scale.to(device) if isinstance(scale, Tensor) else scale
        if found_inf is not None:
            common["found_inf"] = found_inf.to(device)
        for name, key in (("masters", "master"), ("remainders", "remainder"), ("averages", "average")):
            if key in kinds:
                common[name] = [s[key] for s in states]
        if "average" in kinds:
            common["average_decay"] = group["average_decay"]
        for name in self._moments(group):
            if f"{name}_scale" in kinds:
                common[f"{name}_scales"] = [storage.own_scales(p, s[f"{name}_scale"]) for p, s in zip(params, states)]
        stochastic = group.get("precision") == "stochastic" and params[0].dtype == torch.bfloat16
        if stochastic or any(name.endswith("_scales") for name in common):
            common["seed"], common["streams"] = group["seed"], [streams[p] for p in params]
        self._update(group, params, [p.grad for p in params], states, step, common)

    # --- averages -------------------------------------------------------------------------------------------------

    @contextmanager
    def averages(self) -> Iterator[None]:
        """Inside the block the parameters hold their moving averages (`average_decay`), after it their own values again, bit for
        bit. Parameters that have made no step, or have no average, keep their values. Takes a copy of the weights meanwhile.

        Raises:
            UserError: no group has average_decay; a block inside a block.
        """
        if all(group.get("average_decay") is None for group in self.param_groups):
            raise UserError(
                f"{self._name}: averages() needs average_decay, such as {self._name}(..., average_decay=0.999)"
            )
        if self._averaging:
            raise UserError(f"{self._name}: averages() is already active")
        held = [(p, p.detach().clone()) for p, state in self.state.items() if "average" in state]
        self._averaging = True
        try:
            with torch.no_grad():
                for p, _ in held:
                    p.copy_(self.state[p]["average"])
            yield
        finally:
            with torch.no_grad():
                for p, own in held:
                    p.copy_(own)
            self._averaging = False

    # --- groups and state dicts -----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim. Raises UserError for hyperparameters out of range and parameters that are not real numbers."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._validate(group)
            self._check_supported(group)
            if len(set(group["params"])) < len(group["params"]):  # one launch would write to them twice at once
                raise UserError(f"{self._name}: a parameter stands twice in a group; give each once")
        except BaseException:
            self.param_groups.pop()
            raise

    def _validate(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay", "eps"):
            value = group.get(name, 0.0)
            good = isinstance(value, numbers.Real) and value >= 0 and math.isfinite(value)
            if isinstance(value, Tensor):  # where it can be read without waiting
                good = not value.is_cpu or torch.compiler.is_compiling() or 0 <= value.item() < math.inf
            if not good:
                raise UserError(f"{self._name}: {name} must be a finite number >= 0, got {value!r}")
        storage.check_group(self._name, group)
        self._check_group(group)

    def _check_supported(self, group: dict[str, Any], where: str = "") -> None:
        for name, remedy in (("maximize", "negate the loss"), ("amsgrad", "take torch.optim.AdamW")):
            if group.get(name):
                raise UserError(f"{self._name}: {where}{name}=True, which is not supported; {remedy}")

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim, each parameter with a `step` of its own, on the host: the number of steps really made; and
        `skipped` beside state and param_groups, where torch's optimizers overlook it, as torch.distributed.checkpoint's
        functions for state dicts do too."""
        found = super().state_dict()
        state = {k: storage.saved(v) if isinstance(v, dict) else v for k, v in found["state"].items()}
        return {**found, "state": state, "skipped": storage.on_host(self.skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state dict of this class, or of torch's optimizer of the same name. Without `skipped` that is 0.

        Hyperparameters come from the state dict, precision, state_bits, average_decay and seed stay those of this optimizer:
        moments are converted, and masters and averages that the state dict lacks are made from the weights at the next step.
        A master becomes a remainder, and the reverse, at the next step too, exactly.

        Raises:
            UserError: the state dict asks for what this optimizer does not do, or lacks a moment of a parameter that has made
                steps; a call inside `averages()`. ValueError: other parameters (torch's message). Nothing has changed then.
        """
        if self._averaging:
            raise UserError(
                f"{self._name}: load_state_dict() inside averages() would mix two runs' weights; leave the block first"
            )

        def keep(_: Any, final: dict[str, Any]) -> None:
            self._loading = final  # torch is about to cast every state to its parameter's dtype

        handle = self.register_load_state_dict_pre_hook(keep)  # after the user's hooks, which may change the dict
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def __getstate__(self) -> dict[str, Any]:
        own = {"max_norm": self.max_norm, "skip_nonfinite": self.skip_nonfinite, "_seen": dict(self._seen)}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by load_state_dict and by unpickling."""
        before = self.__dict__.get("param_groups")
        if self.__dict__.get("_loading") is not None:
            self._check_loaded(state["param_groups"])
            storage.restore(self, state, before, self._loading)
            skipped = torch.as_tensor(self._loading.get("skipped", 0), dtype=torch.int64)
            seen = {**self._seen, "skipped": skipped.to(self.skipped.device, copy=True)}
            state = {**state, "_seen": seen}
        super().__setstate__(state)
        self._prepared, self._plan, self._averaging, self._loading = {}, None, False, None
        storage.share_steps(self)


def check_betas(name: str, group: dict[str, Any]) -> None:
    """Raises UserError unless the group's betas are two numbers in [0, 1)."""
    betas = group["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not pair or not all(isinstance(beta, (numbers.Real, Tensor)) and 0 <= beta < 1 for beta in betas):
        raise UserError(f"{name}: betas must be two numbers in [0, 1), got {betas!r}")
