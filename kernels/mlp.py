"""The MLP as a chain of products and element-wise steps, for every form of it. Plain torch: runs without Triton.

    pre = x first^T + first_bias, and for a gated MLP the same with `second`;  h = act(pre) or act(gate) * up;  y = h down^T

A Form says how the two steps around the activation are done; what is saved and what is computed again is the same for all.
With `keep` the forward returns pre, all that the backward needs besides x and the weights; without, the backward computes
pre anew, which costs one product (seven in all with the gate, where computing the whole block again would cost eight).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .matmul import bias_grad, cast, empty_grad, linear, matrix, weight_grad, why_not_fused

_aten = torch.ops.aten
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # a look through sys.path: once


class Form(NamedTuple):
    """The element-wise steps of an MLP, and whatever products they are fused with.

    hidden(x, weights, biases, kind, gated, keep): [N, D] -> pre [N, F], gated [N, 2, F] (None unless keep), and h [N, F].
    value(pre, kind, gated) -> h.
    slopes(dy, down, pre, kind, gated, need_h) -> the gradient of pre, and h (None unless need_h).
    `weights` and `biases` are pairs, the second of them None unless gate and up have a matrix each.
    """

    hidden: Callable
    value: Callable
    slopes: Callable


def pre_shape(lead, first, second, gated):
    """Shape of pre for x [*lead, D]."""
    if not gated:
        return (*lead, first.shape[0])
    return (*lead, 2, first.shape[0] // 2 if second is None else first.shape[0])


def pre_activations(x, weights, biases, gated):
    """pre by torch's products, from matrices of x's dtype."""
    if weights[1] is None:
        pre = linear(x, weights[0], biases[0])
        return pre.view(x.shape[0], 2, pre.shape[1] // 2) if gated else pre
    pre = torch.empty((x.shape[0], 2, weights[0].shape[0]), dtype=x.dtype, device=x.device)
    for half, weight, bias in zip(pre.unbind(1), weights, biases):
        linear(x, weight, bias, out=half)
    return pre


def forward(form, x, first, second, down, first_bias, second_bias, down_bias, keep, kind, gated):
    """-> y [..., D_out], and pre [..., F] or [..., 2, F]; an empty tensor unless keep."""
    lead, dtype = x.shape[:-1], x.dtype
    w1, w2, w3, b1, b2, b3 = cast(dtype, first, second, down, first_bias, second_bias, down_bias)
    pre, h = form.hidden(matrix(x), (w1, w2), (b1, b2), kind, gated, keep)
    y = linear(h, w3, b3).view(*lead, down.shape[0])
    if not keep:
        return y, torch.empty(0, dtype=dtype, device=x.device)
    return y, pre.view(pre_shape(lead, first, second, gated))


def backward(form, dy, x, pre, first, second, down, first_bias, second_bias, down_bias, need, kept, kind, gated):
    """-> the gradients of the seven tensors from x on; an empty tensor for each whose bit of `need` (1 for x, 2 for first,
    ...) is 0."""
    need_x, need_first, need_second, need_down, *need_biases = ((need >> i) & 1 for i in range(7))
    lead, dtype = x.shape[:-1], x.dtype
    dy, x = matrix(dy), matrix(x)
    w1, w2, w3, b1, b2 = cast(dtype, first, second, down, first_bias, second_bias)
    grads = [empty_grad(x, t, False) for t in (x, first, second, down, first_bias, second_bias, down_bias)]
    if need_biases[2]:
        grads[6] = bias_grad(dy, down_bias)
    h, inner = None, need & ~(8 | 64)
    if kept:
        pre = pre.view(pre_shape((x.shape[0],), first, second, gated))
    elif inner or need_down:
        pre, h = form.hidden(x, (w1, w2), (b1, b2), kind, gated, True)
    if inner:
        dpre, found = form.slopes(dy, w3, pre, kind, gated, need_down and h is None)
        h = found if h is None else h
    elif need_down and h is None:
        h = form.value(pre, kind, gated)
    if need_down:
        grads[3] = weight_grad(dy, h, down)
    if inner:
        whole = dpre.flatten(1)
        parts = [whole] if second is None else dpre.unbind(1)
        for part, slot, weight, bias in zip(parts, (1, 2), (first, second), (first_bias, second_bias)):
            if need >> slot & 1:
                grads[slot] = weight_grad(part, x, weight)
            if need >> (slot + 3) & 1:
                grads[slot + 3] = bias_grad(part, bias)
        if need_x:
            dx = torch.mm(parts[0], w1)
            grads[0] = (dx if second is None else dx.addmm_(parts[1], w2)).view(*lead, x.shape[1])
    return tuple(grads)


# --- torch's own element-wise functions ---------------------------------------------------------------------------

_VALUES = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square_(),
}
_SLOPES = {  # (dh, x, out) -> out = dh * act'(x); out may be dh
    "gelu": lambda dh, x, out: _aten.gelu_backward.grad_input(dh, x, approximate="none", grad_input=out),
    "gelu_tanh": lambda dh, x, out: _aten.gelu_backward.grad_input(dh, x, approximate="tanh", grad_input=out),
    "silu": lambda dh, x, out: _aten.silu_backward.grad_input(dh, x, grad_input=out),
    "relu": lambda dh, x, out: _aten.threshold_backward.grad_input(dh, x, 0, grad_input=out),
    "relu2": lambda dh, x, out: torch.mul(dh, F.relu(x).mul_(2), out=out),
}


def _value(pre, kind, gated):
    return _VALUES[kind](pre[:, 0]).mul_(pre[:, 1]) if gated else _VALUES[kind](pre)


def _hidden(x, weights, biases, kind, gated, keep):
    pre = pre_activations(x, weights, biases, gated)
    return pre if keep else None, _value(pre, kind, gated)


def _slopes(dy, down, pre, kind, gated, need_h):
    dh = torch.mm(dy, down)
    if not gated:
        return _SLOPES[kind](dh, pre, dh), _VALUES[kind](pre) if need_h else None
    gate, up = pre.unbind(1)
    dpre = torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)
    value = _VALUES[kind](gate)
    torch.mul(dh, value, out=dpre[:, 1])
    h = value.mul_(up) if need_h else None
    _SLOPES[kind](dh.mul_(up), gate, dpre[:, 0])
    return dpre, h


PLAIN = Form(_hidden, _value, _slopes)


# --- the torch backend --------------------------------------------------------------------------------------------


def library_form(x):
    """Torch's products, and between them our element-wise kernels where they run, else torch's functions."""
    if x.device.type != "cuda" or x.dtype == torch.float64 or not _HAS_TRITON:
        return PLAIN
    from .mlp_epilogue import ELEMENTWISE

    return ELEMENTWISE


def mlp_fwd(x, *args):
    """`forward` with torch's products."""
    return forward(library_form(x), x, *args)


def mlp_bwd(dy, *args):
    """`backward` with torch's products."""
    return backward(library_form(dy), dy, *args)


# Where the kernels with the activation in a product's epilogue were measured to be faster than torch's products with
# element-wise kernels between: (compute capability's major, gated) -> the fewest and most rows of x. Nothing was measured.
EPILOGUE_WINS: dict[tuple[int, bool], tuple[int, int]] = {}


def why_not_epilogue(x, gated):
    """The reason why `auto` passes over the Triton form for this x, or None where that was measured to be faster."""
    return why_not_fused(EPILOGUE_WINS, x, gated)
