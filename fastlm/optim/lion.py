"""Lion over ops.lion_."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastlm import ops
from fastlm.optim.base import FusedOptimizer, check_betas


class Lion(FusedOptimizer):
    """Sign of an interpolated momentum, with decoupled weight decay; half of Adam's state.

        u <- sign(beta1 * m + (1 - beta1) * g);    m <- beta2 * m + (1 - beta2) * g
        p <- p - lr * (u + weight_decay * p)

    Every element moves by lr, so lr should be 3 to 10 times smaller than AdamW's and weight_decay as much larger.
    Paper: Chen et al., Symbolic discovery of optimization algorithms, 2023, arXiv 2302.06675.

    Args:
        params: parameters, or parameter groups as torch's optimizers take them.
        lr, betas, weight_decay: defaults for groups that do not set their own; lr a number or 0-d tensor.
        precision, state_bits, average_decay, seed, max_norm, skip_nonfinite: see `FusedOptimizer`. Clipping by max_norm changes
            the momentum alone: a sign has no size.

    Raises:
        UserError: a hyperparameter out of range.
    """

    MOMENTS = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        precision: str = "nearest",
        state_bits: int | None = None,
        average_decay: float | None = None,
        seed: int = 0,
        max_norm: float | None = None,
        skip_nonfinite: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        stored = {"precision": precision, "state_bits": state_bits, "average_decay": average_decay, "seed": seed}
        super().__init__(params, {**defaults, **stored}, max_norm=max_norm, skip_nonfinite=skip_nonfinite)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_betas("Lion", group)

    def _update(self, group, params, grads, states, step, common) -> None:
        ops.lion_(
            params,
            grads,
            [s["exp_avg"] for s in states],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            step=step,
            **common,
        )
