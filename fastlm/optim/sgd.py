"""SGD with momentum over ops.sgd_, with torch.optim.SGD's state dict."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastlm import ops
from fastlm.errors import UserError
from fastlm.optim.base import FusedOptimizer


class SGD(FusedOptimizer):
    """Stochastic gradient descent as torch.optim.SGD has it, weight decay inside the gradient.

        g <- g + weight_decay * p;    b <- momentum * b + (1 - dampening) * g  (b <- g in the first step)
        p <- p - lr * (g + momentum * b if nesterov else b)

    Without momentum b is g and there is no state. The state dict has torch.optim.SGD's layout (momentum_buffer) plus `step`,
    and either loads the other's. Nesterov momentum as in Sutskever et al., 2013.

    Args:
        params: parameters, or parameter groups as torch's optimizers take them.
        lr, momentum, dampening, weight_decay, nesterov: defaults for groups that do not set their own; lr a number or 0-d tensor.
        precision, state_bits, average_decay, seed, max_norm, skip_nonfinite: see `FusedOptimizer`.

    Raises:
        UserError: a hyperparameter out of range; nesterov without momentum or with dampening; a group or state dict that asks for
        maximize.
    """

    MOMENTS = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        precision: str = "nearest",
        state_bits: int | None = None,
        average_decay: float | None = None,
        seed: int = 0,
        max_norm: float | None = None,
        skip_nonfinite: bool = True,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "precision": precision, "state_bits": state_bits, "average_decay": average_decay, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults, max_norm=max_norm, skip_nonfinite=skip_nonfinite)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.MOMENTS if group["momentum"] else ()

    def _check_group(self, group: dict[str, Any]) -> None:
        if not 0 <= group["momentum"] < 1:
            raise UserError(f"SGD: momentum must be in [0, 1), got {group['momentum']}")
        if group["nesterov"] and (not group["momentum"] or group["dampening"]):
            raise UserError("SGD: nesterov needs momentum above 0 and no dampening")

    def _update(self, group, params, grads, states, step, common) -> None:
        ops.sgd_(
            params,
            grads,
            [s["momentum_buffer"] for s in states] if group["momentum"] else None,
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            step=step,
            **common,
        )
