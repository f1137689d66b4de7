"""What rms_norm and layer_norm share around their kernels: schemas, shapes, gradients, DTensor rules, argument checks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastlm.ops._cuda import not_measured
from fastlm.ops._op import Op
from fastlm.ops._tensor import compute_dtype, grad_of
from fastlm.ops.norm_reference import dropped, norm_reference, normalised
from fastlm.ops.number_checks import LARGEST, check_number
from fastlm.ops.random_bits import seed_tensor

_WIDEST = 262144
CASTINGS = ("fp32", "llama")


def _supports(backend, x, *others):
    if backend == "triton":
        if x.shape[-1] > _WIDEST:
            return f"its rows are at most {_WIDEST} wide, got {x.shape[-1]}"
        if x.numel() >= (x.shape[-1] or 1) * 2**31:
            return f"its rows are numbered in 32 bits: fewer than 2^31 of them, got x {list(x.shape)}"
    return _cuda_supports(x, *others) if backend == "cuda" else None


def _cuda_supports(x, weight, bias, residual):
    if x.numel() >= (x.shape[-1] or 1) * 2**31:
        return f"its rows are numbered in 32 bits: fewer than 2^31 of them, got x {list(x.shape)}"
    if any(t is not None and t.dtype not in (x.dtype, torch.float32) for t in (weight, bias, residual)):
        return f"weight, bias and residual must have x's dtype {x.dtype} or float32"
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return f"weight and bias must have one dtype, got {weight.dtype} and {bias.dtype}"
    return None


def norm_op(name, torch_form, centred: bool) -> Op:
    """The Op of one norm. centred: whether the mean is taken off. torch_form takes the arguments of norm_reference."""
    op = Op(
        name,
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, float eps, float weight_offset, bool llama,"
        " float dropout_p, str backend) -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)",
        "(Tensor dy, Tensor? dresidual_out, Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor rstd, Tensor? seed,"
        " bool has_residual, bool need_dweight, bool need_dbias, float eps, float weight_offset, float dropout_p,"
        " str backend) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
        reference=partial(norm_reference, centred=centred),
        torch=torch_form,
        kernels={
            "triton": (f"{name}:{name}_fwd", f"{name}:{name}_bwd"),
            "cuda": (f"{name}_fwd", f"{name}_bwd"),
        },
        supports=_supports,
        slower=not_measured,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
    )
    op.fake(partial(_fake_forward, centred), _fake_backward)
    op.autograd(_function(op, centred))
    op.backward_reference(partial(_backward_reference, centred))
    op.sharding(partial(_shard_forward, centred), partial(_shard_backward, centred))
    return op


def _two_outputs(dy, x, seed, has_residual):
    """Whether the residual's gradient is not simply that of x."""
    return has_residual and (seed is not None or x.dtype != dy.dtype)


def _fake_forward(centred, x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p, backend):
    sum_shape, sum_dtype = (0, x.dtype) if residual is None else (x.shape, residual.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(sum_shape, dtype=sum_dtype),
        x.new_empty(x.shape[:-1] if centred else 0, dtype=torch.float32),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    )


def _fake_backward(dy, dresidual_out, x, weight, bias, mean, rstd, seed, has_residual, need_dweight, need_dbias, *_):
    return (
        dy.new_empty(x.shape),
        x.new_empty(x.shape if _two_outputs(dy, x, seed, has_residual) else 0),
        *(
            x.new_empty(x.shape[-1] if need else 0, dtype=(x if t is None else t).dtype)
            for need, t in ((need_dweight, weight), (need_dbias, bias))
        ),
    )


def _function(op: Op, centred: bool) -> type[torch.autograd.Function]:
    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p, backend):
            y, residual_out, mean, rstd = op.below(
                x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p, backend
            )
            # bias is kept for its dtype alone. Of dropout only the seed is kept, never the mask.
            kept = x if residual is None else residual_out
            ctx.save_for_backward(kept, weight, bias, mean if centred else None, rstd, seed)
            ctx.x_dtype, ctx.options, ctx.has_residual = (
                x.dtype,
                (eps, weight_offset, dropout_p, backend),
                residual is not None,
            )
            ctx.mark_non_differentiable(*((mean, rstd) if residual is not None else (residual_out, mean, rstd)))
            ctx.set_materialize_grads(False)
            return y, residual_out, mean, rstd

        @staticmethod
        def backward(ctx, dy, dresidual_out, *_):
            x, weight, bias, mean, rstd, seed = ctx.saved_tensors
            if dy is None:
                dy = torch.zeros(x.shape, dtype=ctx.x_dtype, device=x.device)
            need = weight is not None and ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]
            dx, dresidual, dweight, dbias = op.backward(
                dy, dresidual_out, x, weight, bias, mean, rstd, seed, ctx.has_residual, *need, *ctx.options
            )
            if not ctx.has_residual:
                dresidual = None
            elif not _two_outputs(dy, x, seed, True):
                dresidual = dx
            return dx, dweight if need[0] else None, dbias if need[1] else None, dresidual, *(None,) * 6

    Norm.__name__ = Norm.__qualname__ = op.name
    return Norm


def _backward_reference(centred, dy, dresidual_out, x, weight, bias, mean, rstd, seed, has_residual, need_dweight,
                        need_dbias, eps, weight_offset, dropout_p, backend):  # fmt: skip
    def formula(a, w, b):
        if seed is not None and not has_residual:
            a = dropped(a.to(compute_dtype(a)), seed, dropout_p)
        return normalised(a, w, b, eps, weight_offset, None, centred).to(dy.dtype)

    dsum, dweight, dbias = grad_of(formula, (x, weight, bias), (dy,))
    if dresidual_out is not None:  # x is the sum that was normalised, so the residual's own gradient is simply added
        dsum = dsum + dresidual_out
    dx = dsum
    if seed is not None and has_residual:
        dx = dropped(dsum.to(compute_dtype(dsum)), seed, dropout_p)
    args = (dy, None, x, weight, bias, mean, rstd, seed, has_residual, False, False)
    _, nothing, no_dweight, no_dbias = _fake_backward(*args)
    return (
        dx.to(dy.dtype),
        dsum if _two_outputs(dy, x, seed, has_residual) else nothing,
        dweight if need_dweight else no_dweight,
        dbias if need_dbias else no_dbias,
    )


def _shard_forward(centred, x, weight, bias, residual, seed, *_):
    from torch.distributed.tensor import Replicate, Shard

    def rule(place):
        sum_place = Replicate() if residual is None else place
        parameters = [None if t is None else Replicate() for t in (weight, bias)]
        inputs = [place, *parameters, None if residual is None else place, None]
        return [place, sum_place, place if centred else Replicate(), place], [*inputs, *(None,) * 5]

    return [rule(Replicate()), *(rule(Shard(d)) for d in range(x.ndim - 1))]


def _shard_backward(centred, dy, dresidual_out, x, weight, bias, mean, rstd, seed, has_residual, need_dweight, need_dbias,
                    *_):  # fmt: skip
    from torch.distributed.tensor import Partial, Replicate, Shard

    two = has_residual and x.tensor_meta.dtype != dy.tensor_meta.dtype

    def rule(place, summed):
        outputs = [place, place if two else Replicate()]
        outputs += [summed if need else Replicate() for need in (need_dweight, need_dbias)]
        parameters = [None if t is None else Replicate() for t in (weight, bias)]
        inputs = [
            place,
            None if dresidual_out is None else place,
            place,
            *parameters,
            place if centred else None,
            place,
        ]
        return outputs, [*inputs, *(None,) * 8]

    return [rule(Replicate(), Replicate()), *(rule(Shard(d), Partial()) for d in range(x.ndim - 1))]


def check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    """Raises what the contracts of the norms say about tensors."""
    shape, device = x.shape, x.device
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}")
    if len(shape) == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    if weight is not None and (weight.shape != shape[-1:] or not weight.is_floating_point()):
        _refuse(op, "weight", weight, f"be [{shape[-1]}] like x's last dimension")
    if bias is not None and (bias.shape != shape[-1:] or not bias.is_floating_point()):
        _refuse(op, "bias", bias, f"be [{shape[-1]}] like x's last dimension")
    if residual is not None and (residual.shape != shape or not residual.is_floating_point()):
        _refuse(op, "residual", residual, f"have x's shape {list(shape)}")
    for name, t in (("weight", weight), ("bias", bias), ("residual", residual)):
        if t is not None and t.device != device:
            raise ValueError(f"{op}: {name} must be on x's device {device}, got {t.device}")


def _refuse(op: str, name: str, t: Tensor, expected: str) -> None:
    if not t.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {t.dtype}; convert it with .to(x.dtype)")
    raise ValueError(f"{op}: {name} must {expected}, got {list(t.shape)}")


def check_numbers(op: str, eps: float, weight_offset: float) -> None:
    """Raises for an eps below 0 or not finite, and for a weight_offset that is no number."""
    check_number(op, "eps", eps, 0, LARGEST, "a number >= 0, finite in fp32")
    check_number(op, "weight_offset", weight_offset)


def check_casting(op: str, casting: str) -> bool:
    """Whether the casting is Llama's. Raises ValueError for an unknown one."""
    if casting not in CASTINGS:
        raise ValueError(f"{op}: casting must be one of {', '.join(CASTINGS)}, got {casting!r}")
    return casting == "llama"


def dropout_seed(op: str, x: Tensor, seed: int | Tensor | None, dropout_p: float) -> Tensor:
    """The seed of a call with dropout. Raises ValueError, TypeError for a bad p or seed, and for DTensors."""
    number = isinstance(dropout_p, (int, float)) or (
        hasattr(dropout_p, "__float__") and not isinstance(dropout_p, Tensor)
    )
    if not number:
        raise TypeError(f"{op}: dropout_p must be a number in [0, 1), got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must lie in [0, 1), got {dropout_p}")
    if type(x).__name__ == "DTensor":
        raise ValueError(
            f"{op}: dropout_p must be 0 for a DTensor, whose parts cannot tell their rows' numbers; drop out before, "
            "or work on x.to_local()"
        )
    return seed_tensor(op, seed, x)
