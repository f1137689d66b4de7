"""AdamW: one in-place optimizer step over lists of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.kernels.moment_bound import in_two, least_root
from fastlm.kernels.tensor_table import draws, format_of, table_of
from fastlm.ops import _cuda
from fastlm.ops._native import fused_adamw_
from fastlm.ops.optimizer_step import Common, optimizer_op, run_step


def _formula(p, g, m, v, numbers, beta1, beta2, eps, weight_decay):
    lr, step = numbers.lr, numbers.step
    if isinstance(step, Tensor):
        step = step.double()  # in fp32, 1 - beta2^step keeps 3 digits in step 1 of beta2 = 0.9999
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p - lr * weight_decay * p
    return p - lr / (1 - beta1**step) * m / ((v / (1 - beta2**step)).sqrt() + eps), m, v


def _fused(params, grads, states, numbers, beta1, beta2, eps, weight_decay):
    step = torch.as_tensor(numbers.step, dtype=torch.float32, device=params[0].device)
    fused_adamw_(
        params, grads, *states, step, lr=numbers.lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps
    )


def _of_codes(states, beta1, beta2, eps, weight_decay):
    """Raises v where no gradients can have led to it beside its m."""
    least = least_root(beta1, beta2)
    for m, v in zip(*states):
        bound = (m * least).square_()
        v.copy_(torch.where(bound > v, bound, v))  # NaN in v stays


def _cuda_step(
    params, grads, exp_avgs, exp_avg_sqs, masters, remainders, averages, exp_avg_scales, exp_avg_sq_scales,
    lr_tensor, step_tensor, grad_scale_tensor, found_inf, seed, streams, lr, step, grad_scale, average_decay,
    beta1, beta2, eps, weight_decay,
):  # fmt: skip
    """The launcher of csrc/adamw.cu, which gets tables of the lists. Processor time for 300 parameters of four lists: 136 us; to
    hand over the lists themselves takes 197 us, before a table is made."""
    lists = (
        params, grads, exp_avgs, exp_avg_sqs, masters, remainders, averages, exp_avg_scales, exp_avg_sq_scales
    )  # fmt: skip
    random = draws(lists, 2, seed is not None)
    table, _ = table_of(lists, streams if any(random) else None)
    numbers = (t if t is None else t.float() for t in (lr_tensor, step_tensor, grad_scale_tensor))
    logs = (math.log(beta) if beta > 0 else -1e6 for beta in (beta1, beta2))
    _cuda.function("adamw_step")(
        *table, list(map(format_of, lists)), *random, *numbers, found_inf, seed.contiguous() if any(random) else None,
        lr, step, grad_scale, 1 - average_decay, *logs, *in_two(beta1), *in_two(beta2), 1 - beta1, 1 - beta2,
        least_root(beta1, beta2), eps, weight_decay
    )  # fmt: skip


OP = optimizer_op(
    "adamw_",
    ("exp_avgs", "exp_avg_sqs"),
    "float beta1, float beta2, float eps, float weight_decay",
    _formula,
    _fused,
    True,
    of_codes=_of_codes,
    cuda=_cuda_step,
)


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    step: int | Tensor,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Sequence[Tensor] | None = None,
    remainders: Sequence[Tensor] | None = None,
    seed: int | Tensor | None = None,
    streams: Sequence[int] | None = None,
    averages: Sequence[Tensor] | None = None,
    average_decay: float | None = None,
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> None:
    """One AdamW step in place, on all tensors at once:

        g <- grad_scale * g;                m <- beta1 m + (1 - beta1) g;      v <- beta2 v + (1 - beta2) g^2
        p <- p - lr * weight_decay * p;     p <- p - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

    Args:
        params: list of tensors of any shape and strides, fp16, bf16 or fp32 (fp64 too on reference and torch); written.
        grads: gradients, one per parameter and of its shape, any float dtype; only read.
        exp_avgs, exp_avg_sqs: m and v, each in the parameter's dtype, bf16 or fp32; written. With scales: 8-bit codes, int8
            for m and uint8 for v, best made by torch.zeros_like(p, dtype=...).
        lr: learning rate, a number or a 0-d tensor. beta1, beta2: numbers in [0, 1).
        step: this step's number, counted from 1; a number or a 0-d tensor.
        grad_scale: multiplies every gradient first, such as the clip coefficient; a number, a 0-d tensor or None.
            A tensor on the device is read there: no host sync.
        found_inf: 0-d tensor; nonzero: nothing at all is written. Read on the device.
        masters: fp32 weights. p is their value rounded to nearest; both are written.
        remainders: int16, with bf16 params: p and remainder together are the fp32 weight, exactly (see
            fastlm.ops.master_weights.split_master). Both are written.
        seed: int or int64 tensor (seed, offset): bf16 params that have no master, and 8-bit codes, are rounded
            stochastically, by Philox bits of the element, the parameter's place in the list, step, seed and offset, equal on
            every backend. Two calls of one step must differ in seed, offset or streams. None rounds to nearest.
        streams: numbers in [0, 2^20), one per parameter, that take the place of its place in the list, so that its random
            bits do not depend on which others are in this call. None: the place in the list.
        averages: fp32 (or the parameter's dtype); a <- average_decay a + (1 - average_decay) p, of the new weight before it
            is rounded; written. average_decay: a number in [0, 1].
        exp_avg_scales, exp_avg_sq_scales: fp32 [ceil(numel / 256)] each, of the local shard: the states are codes in
            blocks of 256 elements of the parameter's memory (see fastlm.ops.block_quantize). Zeros beside zero codes are 0.
            m and v are rounded one by one; a v too small for its m is raised when it is read, to the least that any gradients
            can leave, so that the step is bounded as with exact states (none for beta1^2 >= beta2).

    DTensors (FSDP2) are updated through their local shards. Empty tensors and lists are fine. Sums in fp32 (fp64 for fp64
    parameters), one rounding of each result; bitwise repeatable.

    Raises:
        ValueError: lists of unequal length, shapes or devices that differ, a step below 1, a beta out of range, an unknown or
            unsupported backend. TypeError: dtypes that do not fit.

    Backends: triton and cuda (one launch per combination of dtypes; compute capability >= 8.0; in a CUDA graph, the tensors
    are those of the capture; "auto" does not take cuda), torch (the CPU default), reference.
    Paper: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"adamw_: {name} must be in [0, 1), got {beta}")
    if not isinstance(step, Tensor) and step < 1:
        raise ValueError(f"adamw_: step counts from 1, got {step}")
    common = Common(
        lr, step, grad_scale, found_inf, masters, remainders, seed, averages, average_decay, backend, streams
    )
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    run_step(OP, params, grads, states, (exp_avg_scales, exp_avg_sq_scales), common, (beta1, beta2, eps, weight_decay))
