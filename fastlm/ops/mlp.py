"""The MLP of a transformer, plain and gated: two ops over one set of steps (kernels/mlp.py)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels import mlp as steps
from fastlm.kernels.matmul import cast, empty_grad
from fastlm.ops._op import Op, at_once
from fastlm.ops._tensor import autocast_dtype, compute_dtype, grad_of
from fastlm.ops.activation import FORMS, check_kind


def _reference(x, first, second, down, first_bias, second_bias, down_bias, kind, gated):
    dtype, act = compute_dtype(x), FORMS[kind]
    w1, w2, w3, b1, b2, b3 = (
        None if t is None else t.to(dtype) for t in (first, second, down, first_bias, second_bias, down_bias)
    )
    pre = F.linear(x.to(dtype), w1, b1)
    if not gated:
        h = act(pre)
    else:
        gate, up = pre.chunk(2, -1) if w2 is None else (pre, F.linear(x.to(dtype), w2, b2))
        h = act(gate) * up
    return F.linear(h, w3, b3).to(x.dtype)


# In place where nothing is to be differentiated: fresh memory is what an activation costs most on the CPU (1024 x 1536 in fp32:
# the whole MLP 29 ms instead of 32, gated 40 instead of 50).
_IN_PLACE = {
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_.default(x, approximate="tanh"),
    "silu": lambda x: F.silu(x, inplace=True),
    "relu": F.relu_,
    "relu2": lambda x: F.relu_(x).square_(),
}


_LARGE = 1 << 15  # elements


def _all_of(dtype, first, second, down, first_bias, second_bias, down_bias):
    # Spelled out: a loop costs a microsecond, a tenth of the three torch calls of a small MLP.
    return (
        first.dtype is dtype is down.dtype
        and (second is None or second.dtype is dtype)
        and (first_bias is None or first_bias.dtype is dtype)
        and (second_bias is None or second_bias.dtype is dtype)
        and (down_bias is None or down_bias.dtype is dtype)
    )


def _around_autocast(x, parameters):
    """The dtype for the parameters where autocast, which leaves fp64 as it is, would mix it with others; None elsewhere."""
    if x.dtype == torch.float64:
        return x.dtype
    wide = any(t is not None and t.dtype == torch.float64 for t in parameters)
    return torch.get_autocast_dtype("cpu") if wide else None


def _torch(x, first, second, down, first_bias, second_bias, down_bias, kind, gated):
    """What a user of plain torch writes, on the CPU; autocast may be on."""
    parameters = (first, second, down, first_bias, second_bias, down_bias)
    if not _all_of(x.dtype, *parameters):
        dtype = _around_autocast(x, parameters) if torch.is_autocast_enabled("cpu") else x.dtype
        if dtype is not None:
            first, second, down, first_bias, second_bias, down_bias = cast(dtype, *parameters)
    pre = F.linear(x, first, first_bias)
    in_place = pre.numel() > _LARGE and not torch.is_grad_enabled()
    act = (_IN_PLACE if in_place else FORMS)[kind]
    if not gated:
        return F.linear(act(pre), down, down_bias)
    gate, up = pre.chunk(2, -1) if second is None else (pre, F.linear(x, second, second_bias))
    h = act(gate)
    return F.linear(h.mul_(up) if in_place else h * up, down, down_bias)


def _define(name):
    op = Op(
        name,
        "(Tensor x, Tensor first, Tensor? second, Tensor down, Tensor? first_bias, Tensor? second_bias,"
        " Tensor? down_bias, int keep, str activation, bool gated, str backend) -> (Tensor y, Tensor pre)",
        "(Tensor dy, Tensor x, Tensor pre, Tensor first, Tensor? second, Tensor down, Tensor? first_bias,"
        " Tensor? second_bias, Tensor? down_bias, int need, int kept, str activation, bool gated, str backend)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference=_reference,
        torch=_torch,
        kernels={"torch": (steps.mlp_fwd, steps.mlp_bwd), "triton": ("mlp_epilogue:mlp_fwd", "mlp_epilogue:mlp_bwd")},
        slower=lambda backend, x, *_: steps.why_not_epilogue(x, name == "gated_mlp") if backend == "triton" else None,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
    )
    op.fake(_fake_forward, _fake_backward)
    op.autograd(_MLP)
    op.backward_reference(_backward_reference)
    op.sharding(_shard_forward, _shard_backward)
    return op


def _fake_forward(x, first, second, down, b1, b2, b3, keep, kind, gated, backend):
    lead = x.shape[:-1]
    return x.new_empty((*lead, down.shape[0])), x.new_empty(steps.pre_shape(lead, first, second, gated) if keep else 0)


def _fake_backward(dy, x, pre, first, second, down, b1, b2, b3, need, kept, kind, gated, backend):
    return tuple(empty_grad(x, t, need >> i & 1) for i, t in enumerate((x, first, second, down, b1, b2, b3)))


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, first, second, down, b1, b2, b3, keep, kind, gated, backend):
        tensors = (x, first, second, down, b1, b2, b3)
        ctx.op, ctx.options = GATED if gated else OP, (keep, kind, gated, backend)
        y, pre = ctx.op.below(*tensors, *ctx.options)
        ctx.save_for_backward(x, pre, *tensors[1:])
        ctx.mark_non_differentiable(pre)
        ctx.set_materialize_grads(False)
        return y, pre

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 11
        needs = ctx.needs_input_grad[:7]
        bits = sum(1 << i for i, needed in enumerate(needs) if needed)
        grads = ctx.op.backward(dy, *ctx.saved_tensors, bits, *ctx.options)
        return *(g if needed else None for g, needed in zip(grads, needs)), None, None, None, None


def _backward_reference(dy, x, pre, first, second, down, b1, b2, b3, need, kept, kind, gated, backend):
    tensors = (x, first, second, down, b1, b2, b3)
    grads = grad_of(lambda *t: _reference(*t, kind, gated), tensors, (dy,))
    return tuple(g if need >> i & 1 else empty_grad(x, tensors[i], False) for i, g in enumerate(grads))


class _Split(NamedTuple):
    """One way to divide an MLP among processes: where its tensors and their gradients are."""

    x: Any
    first: Any  # second and their two biases too
    down: Any
    y: Any
    pre: Any
    dy: Any
    dx: Any
    dfirst: Any
    ddown: Any
    ddown_bias: Any


def _splits(x, second, down_bias, gated):
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, part = Replicate(), Partial()
    splits = [_Split(*[whole] * 10)]
    splits += [_Split(at, whole, whole, at, at, at, at, part, part, part) for at in map(Shard, range(x.ndim - 1))]
    # Tensor parallel (Megatron-LM, arXiv:1909.08053): each has its share of the hidden width. Not with gate and up in one
    # matrix, in whose halves those shares would be, nor with a bias behind the sum.
    if down_bias is None and (second is not None or not gated):
        rows, columns, last = Shard(0), Shard(1), Shard(x.ndim if gated else x.ndim - 1)
        splits.append(_Split(whole, rows, columns, part, last, whole, part, rows, columns, whole))
    return splits


def _inputs(split, second, b1, b2, b3):
    """Places of x, first, second, down and the three biases."""
    from torch.distributed.tensor import Replicate

    after = [None if t is None else split.first for t in (second, b1, b2)]
    return [split.x, split.first, after[0], split.down, *after[1:], None if b3 is None else Replicate()]


def _shard_forward(x, first, second, down, b1, b2, b3, keep, kind, gated, backend):
    from torch.distributed.tensor import Replicate

    return [
        ([s.y, s.pre if keep else Replicate()], [*_inputs(s, second, b1, b2, b3), None, None, None, None])
        for s in _splits(x, second, b3, gated)
    ]


def _shard_backward(dy, x, pre, first, second, down, b1, b2, b3, need, kept, kind, gated, backend):
    from torch.distributed.tensor import Replicate

    rules = []
    for s in _splits(x, second, b3, gated):
        outputs = [s.dx, s.dfirst, s.dfirst, s.ddown, s.dfirst, s.dfirst, s.ddown_bias]
        outputs = [place if need >> i & 1 else Replicate() for i, place in enumerate(outputs)]
        x_at, *rest = _inputs(s, second, b1, b2, b3)
        rules.append((outputs, [s.dy, x_at, s.pre if kept else Replicate(), *rest, *[None] * 5]))
    return rules


OP = _define("mlp")
GATED = _define("gated_mlp")


def _direct(x, recompute):
    """Whether torch's own autograd does: on the CPU, unless x alone is to be saved."""
    if not x.is_cpu or (recompute and torch.is_grad_enabled()):
        return False
    return type(x) is Tensor or type(x).__name__ != "DTensor"  # torch's products refuse one divided in unequal parts


def _run(op, tensors, kind, recompute, backend):
    """`tensors`: x, first, second, down and the three biases."""
    x, gated = tensors[0], op is GATED
    backend = "torch" if at_once(backend, x) else op.choose(backend, *tensors)
    if backend == "torch" and _direct(x, recompute):
        return _torch(*tensors, kind, gated)
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        tensors = (x.to(dtype), *tensors[1:])
    if backend == "reference":
        return op.plain(backend, *tensors, kind, gated)
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return op.forward(*tensors, int(needed and not recompute), kind, gated, backend)[0]


def mlp(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "gelu_tanh",
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y = act(x up_weight^T + up_bias) down_weight^T + down_bias, the MLP of GPT-2, BERT and T5.

    Args:
        x: [..., D], fp16, bf16 or fp32 (any float dtype on reference and torch), any strides.
        up_weight: [F, D], any float dtype and any strides (GPT-2's Conv1D stores the transpose: hand over `weight.t()`);
            products are in x's dtype, to which a matrix of another one is cast.
        down_weight: [D_out, F], likewise.
        up_bias, down_bias: [F], [D_out] or None, likewise.
        activation: "gelu" (x Phi(x), with erf), "gelu_tanh" (its tanh form), "silu" (x sigmoid(x)), "relu" (max(x, 0)) or
            "relu2" (max(x, 0)^2).
        recompute: save x alone for the backward, and pay one more product there.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        y [..., D_out] in x's dtype. Products sum in fp32; fp32 ones follow torch.get_float32_matmul_precision(). The
        activation is that of the pre-activation rounded to x's dtype. Gradients come in the dtype and memory order of each
        parameter. Under autocast the products are in autocast's dtype.

    Saved for the backward, besides the parameters: x and the pre-activation [..., F], or x alone. The torch form on the CPU
    (and the reference) also keeps act(pre), as plain PyTorch does: computing it again was measured to cost up to 11 % of a step.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, an unknown or unsupported backend. TypeError: a tensor is
        not floating point.

    Backends: triton on compute capability >= 8.0 (bias, activation and gate in the epilogue of a product), torch (its products
    and, on a GPU, our element-wise kernels), reference. `auto` takes triton only where it was measured to be faster.
    Papers: Vaswani et al. 2017, arXiv:1706.03762; GELU,
    arXiv:1606.08415; squared ReLU, arXiv:2109.08668.
    """
    if activation not in FORMS or not x.is_floating_point():
        check_kind("mlp", activation, x=x)  # raises
    _check("mlp", x, (("up", up_weight, up_bias),), down_weight, down_bias, up_weight.shape[0] if up_weight.ndim else 0)
    tensors = (x, up_weight, None, down_weight, up_bias, None, down_bias)
    return _run(OP, tensors, activation, recompute, backend)


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor | None,
    down_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y = (act(x gate_weight^T + gate_bias) * (x up_weight^T + up_bias)) down_weight^T + down_bias, the MLP of Llama.

    "silu" makes it SwiGLU, "gelu" or "gelu_tanh" GeGLU, "relu" ReGLU.

    Args:
        x: [..., D], fp16, bf16 or fp32 (any float dtype on reference and torch), any strides.
        gate_weight: [F, D], any float dtype and any strides; products are in x's dtype, to which a matrix of another one is
            cast. [2 F, D] if up_weight is None: the gate's rows, then up's.
        up_weight: [F, D] like gate_weight, or None.
        down_weight: [D_out, F], likewise.
        gate_bias, up_bias, down_bias: a vector as long as its matrix has rows, or None. A gate_weight of [2 F, D] takes a
            gate_bias of [2 F] and no up_bias.
        activation: "gelu", "gelu_tanh", "silu", "relu" or "relu2", as in `mlp`.
        recompute: save x alone for the backward, and pay one more product of [2 F, D] there.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        y [..., D_out] in x's dtype; dtypes, sums and autocast as in `mlp`. The gradient of a [2 F, D] matrix is one tensor.

    Saved for the backward, besides the parameters: x and the pre-activations [..., 2 F], or x alone. The torch form on the
    CPU (and the reference) also keeps act(gate) and the product, as plain PyTorch does.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, an unknown or unsupported backend. TypeError: a tensor is
        not floating point.

    Backends: triton on compute capability >= 8.0 (bias, activation and gate in the epilogue of a product), torch (its products
    and, on a GPU, our element-wise kernels), reference. `auto` takes triton only where it was measured to be faster.
    Paper: Shazeer 2020, arXiv:2002.05202.
    """
    if activation not in FORMS or not x.is_floating_point():
        check_kind("gated_mlp", activation, x=x)  # raises
    layers = (("gate", gate_weight, gate_bias),)
    width = gate_weight.shape[0] if gate_weight.ndim else 0
    if up_weight is not None:
        layers = (*layers, ("up", up_weight, up_bias))
        if up_weight.shape != gate_weight.shape:
            raise ValueError(
                f"gated_mlp: up_weight must be {list(gate_weight.shape)} like gate_weight, got {list(up_weight.shape)}"
            )
    else:
        if up_bias is not None:
            raise ValueError("gated_mlp: up_bias must be None without up_weight; put it behind the gate's in gate_bias")
        if width % 2:
            raise ValueError(
                f"gated_mlp: without up_weight gate_weight must be [2 F, D], got {list(gate_weight.shape)}"
            )
        width //= 2
    _check("gated_mlp", x, layers, down_weight, down_bias, width)
    tensors = (x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    return _run(GATED, tensors, activation, recompute, backend)


def _check(op, x, layers, down_weight, down_bias, width):
    """`layers`: (name, weight, bias) of the first matrices, each of which takes x."""
    if x.ndim == 0:
        raise ValueError(f"{op}: x must be [..., D], got a single number")
    columns, device = x.shape[-1], x.device
    for name, weight, bias in layers:
        _check_linear(op, name, weight, bias, columns, "x's last dimension", device)
    _check_linear(op, "down", down_weight, down_bias, width, f"{layers[0][0]}_weight's rows", device)


def _check_linear(op, name, weight, bias, columns, like, device):
    shape = weight.shape
    if len(shape) != 2 or shape[1] != columns:
        raise ValueError(f"{op}: {name}_weight must be [., {columns}] like {like}, got {list(shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"{op}: {name}_weight must be floating point, got {weight.dtype}")
    if weight.device != device:  # torch's products take no notice of a meta tensor
        raise ValueError(f"{op}: {name}_weight must be on x's device {device}, got {weight.device}")
    if bias is None:
        return
    if bias.shape != shape[:1]:
        raise ValueError(f"{op}: {name}_bias must be [{shape[0]}] like {name}_weight's rows, got {list(bias.shape)}")
    if not bias.is_floating_point():
        raise TypeError(f"{op}: {name}_bias must be floating point, got {bias.dtype}")
    if bias.device != device:
        raise ValueError(f"{op}: {name}_bias must be on x's device {device}, got {bias.device}")
