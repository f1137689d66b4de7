"""AdamW over ops.adamw_, with torch.optim.AdamW's state dict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastlm import ops
from fastlm.errors import UserError


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay; one multi-tensor launch per group of tensors of the same dtype and device.

        p <- p - lr * weight_decay * p
        m <- beta1 * m + (1 - beta1) * g;   v <- beta2 * v + (1 - beta2) * g^2
        p <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    The state dict has torch.optim.AdamW's layout (exp_avg, exp_avg_sq, step), and either loads the other's.
    Paper: Loshchilov and Hutter, 2019, arXiv 1711.05101.

    Args:
        params: parameters, or parameter groups as torch's optimizers take them (see `parameter_groups`).
        lr, betas, eps, weight_decay: defaults for groups that do not set their own.

    Raises:
        UserError: a hyperparameter out of range; a state dict that asks for amsgrad, maximize or coupled decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise UserError(f"AdamW: {name} must be >= 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"AdamW: betas must be two numbers in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, *, grad_scale: Tensor | float | None = None) -> Any:
        """Makes one step. Parameters without a gradient are left alone.

        Args:
            closure: as in torch.optim: re-evaluates the model and returns the loss.
            grad_scale: 0-d tensor or number that multiplies every gradient, such as the clip coefficient. Stays on the device.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for step, params in self._by_launch(group):
                states = [self.state[p] for p in params]
                ops.adamw_(
                    params,
                    [p.grad for p in params],
                    [s["exp_avg"] for s in states],
                    [s["exp_avg_sq"] for s in states],
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=step,
                    grad_scale=grad_scale,
                )
        return loss

    def _by_launch(self, group: dict[str, Any]) -> list[tuple[int, list[Tensor]]]:
        """Counts the step of every parameter with a gradient and gathers those that one call can take."""
        launches: dict[tuple, list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())  # on the host, as in torch: reading it costs no device sync
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["step"] += 1
            launches[int(state["step"]), p.dtype, p.device].append(p)
        return [(key[0], params) for key, params in launches.items()]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by load_state_dict: takes torch.optim.AdamW's groups and state too."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise UserError(
                        f"AdamW: the state dict was made with {name}=True, which fastlm.optim.AdamW does not do"
                    )
            if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
                raise UserError("AdamW: the state dict is of Adam with weight decay inside the gradient, not of AdamW")
            for p in group["params"]:
                if "step" in self.state.get(p, {}):
                    # A fused or capturable torch optimizer keeps it on the device.
                    self.state[p]["step"] = torch.as_tensor(self.state[p]["step"], dtype=torch.float32).cpu()


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
