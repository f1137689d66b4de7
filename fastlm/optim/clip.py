"""Clipping by the global norm without a host sync and without a second pass over the gradients.

The coefficient stays on the device and goes to the optimizer, whose kernel multiplies each gradient by it as it reads it:

    norm = global_norm(p.grad for p in model.parameters())
    optimizer.step(grad_scale=clip_coefficient(norm, 1.0))
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastlm import ops


def global_norm(grads: Iterable[Tensor | None]) -> Tensor:
    """The Euclidean norm of all gradients taken as one vector.

    Args:
        grads: floating tensors of any shape, dtype and device; None is skipped, so `(p.grad for p in parameters)` works.
            DTensors count as the whole tensor.

    Returns:
        0-d tensor on the device of the first gradient, fp64 if every gradient is fp64, else fp32 (half types are summed in
        fp32 and the result is not rounded back). No gradients give 0. Inf or NaN in any gradient gives inf or NaN. See
        `fastlm.ops.global_norm`.
    """
    return ops.global_norm(g for g in grads if g is not None)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / norm) as a 0-d tensor on norm's device: what each gradient is to be multiplied by.

    A zero norm gives 1. A NaN norm gives NaN and an infinite one 0: check the norm before the step.
    Paper: Pascanu, Mikolov and Bengio, 2013, arXiv 1211.5063.
    """
    return torch.clamp(max_norm / norm, max=1.0)
