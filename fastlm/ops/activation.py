"""Activations, plain and gated. One file for two ops, `activation` and `glu`: they share their kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._op import Op
from fastlm.ops._tensor import compute_dtype, grad_of

FORMS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def _torch(x, kind):
    if kind == "relu2" and not torch.is_grad_enabled():
        return F.relu(x).square_()
    return FORMS[kind](x)


def _reference(x, kind):
    return FORMS[kind](x.to(compute_dtype(x))).to(x.dtype)


def _torch_glu(gate, up, kind):
    value = FORMS[kind](gate)
    if torch.is_grad_enabled() or type(value) is not Tensor:  # a DTensor may be divided unlike up
        return value * up
    return value.mul_(up)  # fresh memory would cost as much as the product


def _reference_glu(gate, up, kind):
    dtype = compute_dtype(gate)
    return (FORMS[kind](gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

OP = Op(
    "activation",
    "(Tensor x, str kind, str backend) -> Tensor y",
    "(Tensor dy, Tensor x, str kind, str backend) -> Tensor dx",
    reference=_reference,
    torch=_torch,
    kernels={"triton": ("activation:activation_fwd", "activation:activation_bwd")},
    dtypes=_DTYPES,
)
GLU = Op(
    "glu",
    "(Tensor gate, Tensor up, str kind, str backend) -> Tensor y",
    "(Tensor dy, Tensor gate, Tensor up, str kind, str backend) -> (Tensor dgate, Tensor dup)",
    reference=_reference_glu,
    torch=_torch_glu,
    kernels={"triton": ("activation:glu_fwd", "activation:glu_bwd")},
    dtypes=_DTYPES,
)


OP.fake(lambda x, kind, backend: x.new_empty(x.shape), lambda dy, x, kind, backend: x.new_empty(x.shape))
GLU.fake(
    lambda gate, up, kind, backend: gate.new_empty(gate.shape),
    lambda dy, gate, up, kind, backend: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)


@OP.autograd
class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind, backend):
        ctx.save_for_backward(x)
        ctx.kind, ctx.backend = kind, backend
        return OP.below(x, kind, backend)

    @staticmethod
    def backward(ctx, dy):
        return OP.backward(dy, *ctx.saved_tensors, ctx.kind, ctx.backend), None, None


@GLU.autograd
class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, kind, backend):
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.backend = kind, backend
        return GLU.below(gate, up, kind, backend)

    @staticmethod
    def backward(ctx, dy):
        return *GLU.backward(dy, *ctx.saved_tensors, ctx.kind, ctx.backend), None, None


@OP.backward_reference
def _backward_reference(dy, x, kind, backend):
    return grad_of(lambda a: _reference(a, kind), (x,), (dy,))[0]


@GLU.backward_reference
def _backward_reference_glu(dy, gate, up, kind, backend):
    return tuple(grad_of(lambda a, b: _reference_glu(a, b, kind), (gate, up), (dy,)))


def _shard(outputs, tensors, options):
    """A rule for element-wise entries: every tensor, in and out, is split alike, along any dimension, or whole."""

    def rule(first, *rest):
        from torch.distributed.tensor import Replicate, Shard

        places = [Replicate(), *(Shard(d) for d in range(first.ndim))]
        return [([place] * outputs, [place] * tensors + [None] * options) for place in places]

    return rule


OP.sharding(_shard(1, 1, 2), _shard(1, 2, 2))
GLU.sharding(_shard(1, 2, 2), _shard(2, 3, 2))


def check_kind(op: str, kind: str, **tensors: Tensor) -> None:
    if kind not in FORMS:
        raise ValueError(f"{op}: the activation must be one of {', '.join(FORMS)}, got {kind!r}")
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {t.dtype}")


def activation(x: Tensor, kind: str, *, backend: str = "auto") -> Tensor:
    """y = act(x), element by element.

    Args:
        x: [...], fp16, bf16, fp32 (any float dtype on the reference), any strides.
        kind: "gelu" (x Phi(x), with erf), "gelu_tanh" (its tanh form), "silu" (x sigmoid(x)), "relu"
            (max(x, 0)) or "relu2" (max(x, 0)^2).
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        y [...] in x's dtype; computed in fp32. The backward recomputes from x, nothing else is saved. Under autocast
        dtypes are kept.

    Raises:
        ValueError: an unknown kind, an unknown or unsupported backend. TypeError: x is not floating point.

    Backends: triton on compute capability >= 8.0. Papers: GELU, Hendrycks and Gimpel 2016, arXiv:1606.08415; squared ReLU,
    So et al. 2021, arXiv:2109.08668.
    """
    if kind not in FORMS or not x.is_floating_point():
        check_kind("activation", kind, x=x)  # raises
    backend = OP.choose(backend, x)
    if backend == "torch":
        return _torch(x, kind)  # nothing in it that autocast would touch
    if backend in OP.plain_forms:
        return OP.plain(backend, x, kind)
    return OP.forward(x, kind, backend)


def glu(gate: Tensor, up: Tensor, activation: str = "silu", *, backend: str = "auto") -> Tensor:
    """y = act(gate) * up, the gated linear unit of Llama's MLP ("silu": SwiGLU, "gelu_tanh": GeGLU, "relu": ReGLU).

    Args:
        gate: [..., F], fp16, bf16, fp32 (any float dtype on the reference), any strides. The halves of one [..., 2 F] product
            (`gate, up = product.chunk(2, -1)`) are read where they lie.
        up: shape and dtype of gate.
        activation: "gelu", "gelu_tanh", "silu", "relu" or "relu2", as in `activation`.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        y [..., F] in gate's dtype; computed in fp32. The backward recomputes from gate and up, nothing else is saved. Under
        autocast dtypes are kept.

    Raises:
        ValueError: shapes that differ, an unknown activation, an unknown or unsupported backend. TypeError: gate or up is
        not floating point, or their dtypes differ.

    Backends: triton on compute capability >= 8.0. Paper: Shazeer 2020, arXiv:2002.05202.
    """
    if activation not in FORMS or not gate.is_floating_point() or not up.is_floating_point():
        check_kind("glu", activation, gate=gate, up=up)  # raises
    if up.shape != gate.shape:
        raise ValueError(f"glu: up must have gate's shape {list(gate.shape)}, got {list(up.shape)}")
    if up.dtype != gate.dtype:
        raise TypeError(f"glu: up must have gate's dtype {gate.dtype}, got {up.dtype}")
    backend = GLU.choose(backend, gate, up)
    if backend == "torch":
        return _torch_glu(gate, up, activation)
    if backend in GLU.plain_forms:
        return GLU.plain(backend, gate, up, activation)
    return GLU.forward(gate, up, activation, backend)
