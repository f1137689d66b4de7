"""SGD with momentum: one in-place optimizer step over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.ops._native import fused_sgd_
from fastlm.ops.optimizer_step import Common, by_formula, optimizer_op, run_step


def _formula(p, g, *rest):
    *buffers, numbers, momentum, dampening, weight_decay, nesterov = rest
    g = g + weight_decay * p if weight_decay else g
    if not buffers:
        return (p - numbers.lr * g,)
    b = momentum * buffers[0] + (1 - dampening) * g
    if isinstance(numbers.step, Tensor):
        b = torch.where(numbers.step == 1, g, b)
    elif numbers.step == 1:
        b = g
    return p - numbers.lr * (g + momentum * b if nesterov else b), b


def _fused(params, grads, states, numbers, momentum, dampening, weight_decay, nesterov):
    step = numbers.step  # torch's step wants to know on the host whether it is the first
    step = step.item() if isinstance(step, Tensor) and step.device.type == "cpu" else step
    if isinstance(step, Tensor):
        return by_formula(_formula)(params, grads, states, numbers, momentum, dampening, weight_decay, nesterov)
    options = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
    return fused_sgd_(params, grads, states[0], lr=numbers.lr, is_first_step=step == 1, **options)


OP = optimizer_op(
    "sgd_",
    ("momentum_buffers",),
    "float momentum, float dampening, float weight_decay, bool nesterov",
    _formula,
    _fused,
)


@torch.no_grad()
def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    step: int | Tensor,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Sequence[Tensor] | None = None,
    remainders: Sequence[Tensor] | None = None,
    seed: int | Tensor | None = None,
    streams: Sequence[int] | None = None,
    averages: Sequence[Tensor] | None = None,
    average_decay: float | None = None,
    momentum_buffer_scales: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> None:
    """One step of stochastic gradient descent in place, on all tensors at once, with torch.optim.SGD's formula:

        g <- grad_scale * g + weight_decay * p
        b <- g in step 1, else momentum * b + (1 - dampening) * g
        p <- p - lr * d,     d = g + momentum * b with nesterov, b without, g where there is no momentum

    Args:
        params, grads: as in `adamw_`.
        momentum_buffers: b, each in the parameter's dtype, bf16 or fp32, or with scales int8 codes; written. None without
            momentum. Their content does not matter in step 1.
        lr: learning rate, a number or a 0-d tensor. momentum, dampening, weight_decay: numbers. nesterov: look ahead by one
            step; needs momentum and no dampening.
        step: this step's number, counted from 1; a number or a 0-d tensor.
        grad_scale, found_inf, masters, remainders, seed, streams, averages, average_decay: as in `adamw_`.
        momentum_buffer_scales: fp32 [ceil(numel / 256)] each: the buffers are 8-bit codes, as `adamw_`'s exp_avgs.

    DTensors, empty tensors and lists, precision and repeatability as in `adamw_`.

    Raises:
        ValueError: lists of unequal length, shapes or devices that differ, a step below 1, a negative momentum, momentum
            without buffers or the reverse, an unknown or unsupported backend. TypeError: dtypes that do not fit.

    Backends: triton (one launch per combination of dtypes; compute capability >= 8.0), torch (the CPU default), reference.
    Paper: Sutskever et al. 2013, proceedings.mlr.press/v28/sutskever13; the form is PyTorch's.
    """
    if not isinstance(step, Tensor) and step < 1:
        raise ValueError(f"sgd_: step counts from 1, got {step}")
    if momentum < 0:
        raise ValueError(f"sgd_: momentum must be >= 0, got {momentum}")
    if (momentum_buffers is None) != (momentum == 0):
        raise ValueError(
            f"sgd_: momentum needs momentum_buffers, and no momentum none; got momentum {momentum} and "
            f"{'no buffers' if momentum_buffers is None else 'buffers'}"
        )
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError(f"sgd_: nesterov needs momentum > 0 and dampening 0, got {momentum} and {dampening}")
    common = Common(
        lr, step, grad_scale, found_inf, masters, remainders, seed, averages, average_decay, backend, streams
    )
    constants = (float(momentum), float(dampening), float(weight_decay), bool(nesterov))
    run_step(
        OP, params, grads, {"momentum_buffers": momentum_buffers}, (momentum_buffer_scales,), common, constants
    )  # fmt: skip
