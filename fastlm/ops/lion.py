"""Lion: one in-place optimizer step over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.ops.optimizer_step import Common, optimizer_op, run_step


def _formula(p, g, m, numbers, beta1, beta2, weight_decay):
    c = beta1 * m + (1 - beta1) * g
    direction = torch.where(c == c, c.sign(), c)  # torch's sign of NaN is 0: the weight would stand still unseen
    p = p - numbers.lr * weight_decay * p
    return p - numbers.lr * direction, beta2 * m + (1 - beta2) * g


def _fused(params, grads, states, numbers, beta1, beta2, weight_decay):
    """torch has no fused Lion; these passes over a piece in the cache are what is fast. bf16 is rounded once: torch's lerp
    computes in fp32, and a rounded sign is that of the sum."""
    lr = numbers.lr
    for p, g, m in zip(params, grads, states[0]):
        c = torch.lerp(m, g, 1 - beta1)
        special = c.is_cuda or not c.sum().isfinite()  # the sum is NaN if any of c is
        infinite, ends = (m.isinf(), m + g) if special else (None, None)  # lerp would make NaN of an infinite m
        m.lerp_(g, 1 - beta2)
        nan = None
        if special:
            c = torch.where(infinite, ends, c)
            m.copy_(torch.where(infinite, ends, m))
            nan = c != c
        if p.dtype == torch.bfloat16:
            w, c = p.float(), c.float()
        else:
            w = p
        c.sign_()
        if nan is not None:
            c.masked_fill_(nan, torch.nan)
        if weight_decay:
            w.mul_(1 - lr * weight_decay)
        w.sub_(c * lr) if isinstance(lr, Tensor) else w.sub_(c, alpha=lr)
        if w is not p:
            p.copy_(w)


OP = optimizer_op(
    "lion_", ("exp_avgs",), "float beta1, float beta2, float weight_decay", _formula, _fused, True, 1 << 18
)


@torch.no_grad()
def lion_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.0,
    step: int | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Sequence[Tensor] | None = None,
    remainders: Sequence[Tensor] | None = None,
    seed: int | Tensor | None = None,
    streams: Sequence[int] | None = None,
    averages: Sequence[Tensor] | None = None,
    average_decay: float | None = None,
    exp_avg_scales: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> None:
    """One Lion step in place, on all tensors at once:

        g <- grad_scale * g;     u = sign(beta1 m + (1 - beta1) g)     (0 for 0, NaN for NaN)
        p <- p - lr * weight_decay * p - lr * u;     m <- beta2 m + (1 - beta2) g

    Args:
        params, grads: as in `adamw_`.
        exp_avgs: m, each in the parameter's dtype, bf16 or fp32, or with scales int8 codes; written.
        lr: learning rate, a number or a 0-d tensor. beta1, beta2: numbers in [0, 1). weight_decay: a number.
        step: counts the steps for the random numbers; needed with `seed` only, a number or a 0-d tensor.
        grad_scale, found_inf, masters, remainders, seed, streams, averages, average_decay: as in `adamw_`.
        exp_avg_scales: fp32 [ceil(numel / 256)] each: m is 8-bit codes, as `adamw_`'s exp_avgs.

    DTensors, empty tensors and lists, precision and repeatability as in `adamw_`.

    Raises:
        ValueError: lists of unequal length, shapes or devices that differ, a beta out of range, a seed without step, an
            unknown or unsupported backend. TypeError: dtypes that do not fit.

    Backends: triton (one launch per combination of dtypes; compute capability >= 8.0), torch (the CPU default), reference.
    Paper: Chen et al. 2023, arXiv:2302.06675.
    """
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"lion_: {name} must be in [0, 1), got {beta}")
    if seed is not None and step is None:
        raise ValueError(
            "lion_: seed needs step, the number of this step: without it every step draws the same numbers"
        )
    common = Common(
        lr, step, grad_scale, found_inf, masters, remainders, seed, averages, average_decay, backend, streams
    )
    run_step(OP, params, grads, {"exp_avgs": exp_avgs}, (exp_avg_scales,), common, (beta1, beta2, float(weight_decay)))
