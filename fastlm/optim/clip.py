"""Clipping by the global norm without a host sync and without a second pass over the gradients.

The coefficient stays on the device and goes to the optimizer, whose kernel multiplies each gradient by it as it reads it:

    norm = global_norm(p.grad for p in model.parameters())
    optimizer.step(grad_scale=clip_coefficient(norm, 1.0))
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def global_norm(grads: Iterable[Tensor | None]) -> Tensor:
    """The Euclidean norm of all gradients taken as one vector.

    Args:
        grads: floating tensors of any shape, dtype and device; None is skipped, so `(p.grad for p in parameters)` works.
            DTensors count as the whole tensor.

    Returns:
        0-d tensor on the device of the first gradient, fp64 if every gradient is fp64, else fp32 (half types are summed in
        fp32 and the result is not rounded back). No gradients give 0. Inf or NaN in any gradient gives inf or NaN.
    """
    grads = [g.detach() for g in grads if g is not None]
    if not grads:
        return torch.zeros(())
    dtypes = {g.dtype for g in grads}
    if dtypes <= {torch.float32} or dtypes <= {torch.float64}:
        norm = torch.nn.utils.get_total_norm(grads)  # one multi-tensor launch per device
    else:
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / norm) as a 0-d tensor on norm's device: what each gradient is to be multiplied by.

    A zero norm gives 1. A NaN norm gives NaN and an infinite one 0: check the norm before the step.
    Paper: Pascanu, Mikolov and Bengio, 2013, arXiv 1211.5063.
    """
    return torch.clamp(max_norm / norm, max=1.0)
