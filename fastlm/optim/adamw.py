"""AdamW over ops.adamw_, with torch.optim.AdamW's state dict."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastlm import ops
from fastlm.errors import UserError
from fastlm.optim.base import FusedOptimizer, check_betas


class AdamW(FusedOptimizer):
    """Adam with decoupled weight decay; one multi-tensor launch per group of tensors of the same dtype and device.

        p <- p - lr * weight_decay * p
        m <- beta1 * m + (1 - beta1) * g;   v <- beta2 * v + (1 - beta2) * g^2
        p <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    The state dict has torch.optim.AdamW's layout (exp_avg, exp_avg_sq, step), and either loads the other's.
    Paper: Loshchilov and Hutter, 2019, arXiv 1711.05101.

    Args:
        params: parameters, or parameter groups as torch's optimizers take them (see `parameter_groups`).
        lr, betas, eps, weight_decay: defaults for groups that do not set their own; lr a number or 0-d tensor.
        precision, state_bits, average_decay, seed, max_norm, skip_nonfinite: see `FusedOptimizer`.

    Raises:
        UserError: a hyperparameter out of range; a group or state dict that asks for amsgrad or maximize, or a state dict for
        coupled decay.
    """

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        precision: str = "nearest",
        state_bits: int | None = None,
        average_decay: float | None = None,
        seed: int = 0,
        max_norm: float | None = None,
        skip_nonfinite: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        stored = {"precision": precision, "state_bits": state_bits, "average_decay": average_decay, "seed": seed}
        super().__init__(params, {**defaults, **stored}, max_norm=max_norm, skip_nonfinite=skip_nonfinite)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_betas("AdamW", group)

    def _update(self, group, params, grads, states, step, common) -> None:
        ops.adamw_(
            params,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            **common,
        )

    def _check_loaded(self, groups: list[dict[str, Any]]) -> None:
        super()._check_loaded(groups)
        for group in groups:
            if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
                raise UserError("AdamW: the state dict is of Adam with weight decay inside the gradient, not of AdamW")


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and embeddings with `weight_decay`, one-dimensional parameters (norms, biases) without.

    Frozen parameters are left out, a tied parameter comes once, an empty group is dropped.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
