"""What ops ask of tensors and of the state that torch is in: dtypes to compute in, values that can be read, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

transforms_active = torch._C._are_functorch_transforms_active
is_compiling = torch.compiler.is_compiling
is_tracing = torch._C._is_tracing  # torch.jit.trace
modes = torch._C._len_torch_dispatch_stack


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 for 16-bit inputs, else the tensor's own: the dtype in which a reference computes."""
    return torch.promote_types(tensor.dtype, torch.float32)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype autocast asks for on this tensor's device, or None where autocast is off."""
    device = tensor.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def is_batched(tensor: Tensor) -> bool:
    """Whether the tensor stands for a batch of them, as cotangents do under autograd.grad(is_grads_batched=True)."""
    return torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_eager() -> bool:
    """Whether calls run as they are made, with values: nothing compiles, traces, transforms or records them."""
    return not (transforms_active() or is_compiling() or is_tracing() or (modes() and without_values()))


def is_dual() -> bool:
    """Whether forward-mode AD is on, to which functions with a hand-written backward are unknown."""
    return forward_ad._current_level >= 0


def without_values() -> bool:
    """Whether calls are recorded, or run without values, by a mode of torch's: make_fx, FakeTensorMode, functionalisation."""
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


def can_read(tensor: Tensor) -> bool:
    """Whether what is done may depend on the tensor's values: a plain CPU tensor or parameter, where reading costs no sync,
    eagerly and outside of everything that records or transforms."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu and is_eager()


def host_values(tensor: Tensor) -> list | None:
    """The tensor's values as a list where one `can_read` them, else None (no sync, no graph break)."""
    return tensor.tolist() if can_read(tensor) else None


def grad_of(fn: Callable, inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of `fn(*inputs)` (a tensor or a tuple), for a `backward_reference`: differentiable ones, unless grad mode is off,
    as it is for a batch of cotangents that a hand-written backward cannot take.

    Every gradient exists, also of inputs that require none. None in, None out.
    """

    def twin(t: Tensor | None) -> Tensor | None:
        # A view of its own: one input may be computed from another (a residual sum from the same node as y), and
        # autograd.grad on the inputs themselves would follow that path too and add it to the other's gradient.
        return t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        twins = [twin(t) for t in inputs]
        outputs = fn(*twins)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, g) for o, g in zip(outputs, grads) if g is not None and o.requires_grad]
    live = [t for t in twins if t is not None]
    found = iter(
        torch.autograd.grad([o for o, _ in pairs], live, [g for _, g in pairs], create_graph=graph, allow_unused=True)
    )
    result = []
    for t in twins:
        grad = next(found) if t is not None else None
        result.append(torch.zeros_like(t) if grad is None and t is not None else grad)
    return result
