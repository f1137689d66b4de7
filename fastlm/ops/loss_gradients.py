"""The autograd side of losses whose forward makes the gradients too: linear_cross_entropy and linear_kl_div.

    forward(*tensors, *options) -> loss, dhidden, dweight, dbias, left
    backward(dloss, *tensors, dhidden, dweight, dbias, left, *options) -> dhidden, dweight, dbias

tensors begin with hidden, weight and bias, options end in need_dhidden, need_dweight, need_dbias and backend. A gradient that is
not needed is empty; the forward's are those of the sum of losses, to be multiplied by dloss and `left` (0-d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops._op import Op
from fastlm.ops._tensor import grad_of, is_batched

NEED = slice(-4, -1)  # where the three need_* flags stand among the options


def scaled(t: Tensor, factor: Tensor) -> Tensor:
    """t * factor (0-d), a new tensor, rounded once: torch would round the factor itself to t's 16 bits."""
    return t * factor if t.dtype == factor.dtype else t.to(factor.dtype).mul_(factor).to(t.dtype)


def scale_in_place(t: Tensor, factor: Tensor) -> None:
    """t *= factor for a contiguous t, rounded once, a block at a time."""
    if factor.device.type == "cpu" and factor == 1:
        return
    if t.dtype == factor.dtype:
        t.mul_(factor)
        return
    for part in t.view(-1).split(1 << 18):
        part.copy_(part.to(factor.dtype).mul_(factor))


def save(ctx, *tensors: Tensor | None) -> None:
    """ctx.save_for_backward, and beside it tensors made under torch.inference_mode (a teacher's), which that refuses."""
    ctx.made_in_inference = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
    if ctx.made_in_inference:
        tensors = [None if i in ctx.made_in_inference else t for i, t in enumerate(tensors)]
    ctx.save_for_backward(*tensors)


def saved(ctx) -> tuple[Tensor | None, ...]:
    """What `save` was given."""
    if not ctx.made_in_inference:
        return ctx.saved_tensors
    return tuple(ctx.made_in_inference.get(i, t) for i, t in enumerate(ctx.saved_tensors))


def empty_gradients(hidden, weight, bias, need):
    """Tensors like the three gradients; those not needed are empty."""
    shapes = [t.shape if needed else (0,) for t, needed in zip((hidden, weight, weight[:, 0]), need)]
    dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes))


def wire(op: Op, count: int):
    """Gives `op`, which has `count` tensors, its gradients -> call(tensors, options, backend), which returns the loss; options
    without the needs, among them the reduction.

    Gradients that the forward made are scaled in place for plain tensors. Under torch.compile and DTensor, where an op may not
    write into its arguments, gradients and their scaled copies coexist. For "none" there are none yet.
    """

    def handed_over(grads, options):
        nothing = (None,) * (count - 3 + len(options))
        return *(g if needed else None for g, needed in zip(grads, options[NEED])), *nothing

    @op.autograd
    class Dispatched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            tensors, options = args[:count], args[count:]
            options = (*options[:-4], *ctx.needs_input_grad[:3], options[-1])
            loss, *rest = op.below(*tensors, *options)
            save(ctx, *tensors, *rest)
            ctx.options = options
            ctx.mark_non_differentiable(*rest)
            ctx.set_materialize_grads(False)
            return loss, *rest

        @staticmethod
        def backward(ctx, dloss, *_):
            if dloss is None:
                return (None,) * (count + len(ctx.options))
            return handed_over(op.backward(dloss, *saved(ctx), *ctx.options), ctx.options)

    class InPlace(torch.autograd.Function):
        """The forward's gradients wait on ctx, not among the saved tensors: the first backward scales them where they are and
        hands them over. A further backward over the same graph makes them anew, by the same code: bit for bit the same."""

        @staticmethod
        def forward(ctx, *args):
            loss, *ctx.gradients = op.below(*args)
            save(ctx, *args[:count])
            ctx.options = args[count:]
            return loss

        @staticmethod
        def backward(ctx, dloss):
            tensors, options = saved(ctx), ctx.options
            if torch.is_grad_enabled():  # create_graph: the derivative of the reference
                nothing_yet = empty_gradients(*tensors[:3], (False,) * 3)
                return handed_over(op.backward(dloss, *tensors, *nothing_yet, dloss, *options), options)
            *grads, left = ctx.gradients or op.below(*tensors, *options)[1:]
            if is_batched(dloss):  # is_grads_batched: each of a batch of cotangents wants the gradients
                ctx.gradients = *grads, left
                factor = dloss * left
                return handed_over([(g.to(factor.dtype) * factor).to(g.dtype) for g in grads], options)
            ctx.gradients = None
            if options[-1] == "triton":
                from fastlm.kernels.linear_cross_entropy import scale_
            else:
                scale_ = scale_in_place
            for g in grads:
                scale_(g, dloss * left)
            return handed_over(grads, options)

    @op.backward_reference
    def backward_reference(dloss, *args):
        inputs, constants, options = args[:3], args[3:count], args[count + 4 :]
        grads = grad_of(lambda *inputs: op.plain("reference", *inputs, *constants, *options), inputs, (dloss,))
        nothing = empty_gradients(*inputs, (False,) * 3)
        return tuple(g if needed else e for g, e, needed in zip(grads, nothing, options[NEED]))

    def call(tensors, options, backend):
        need = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors[:3]]
        plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors if t is not None)
        if plain and any(need) and "none" not in options and not torch.compiler.is_compiling():
            return InPlace.apply(*tensors, *options, *need, backend)
        return op.forward(*tensors, *options, *need, backend)[0]

    return call
