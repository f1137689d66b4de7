"""linear_cross_entropy and linear_logprobs over a process group that divides the vocabulary (Megatron-LM, arXiv:1909.08053).

Every rank has all rows and a contiguous block of classes. It makes the logits of its own classes and their row statistics;
all-reduces of rows of numbers finish these over the group; the gradient is again local, but that of the input, whose parts are
summed. Loops and kernels are those of one process. No host sync: how many classes the ranks have stays on the device.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlm.kernels import chunked_loss
from fastlm.ops import linear_cross_entropy as whole_cross_entropy
from fastlm.ops import linear_logprobs as whole_logprobs
from fastlm.ops import loss_checks as checks
from fastlm.ops import loss_rows
from fastlm.ops._op import REGISTRY
from fastlm.ops._tensor import compute_dtype
from fastlm.ops.loss_gradients import scale_in_place

_IGNORED = -(1 << 62)  # a target that no shift makes


def _sum(t: Tensor, group) -> Tensor:
    dist.all_reduce(t, group=group)
    return t


def _largest(t: Tensor, group) -> Tensor:
    """The largest of t >= 0 on all ranks, 0-d; a rank may have none."""
    largest = torch.cat((t, t.new_zeros(1))).amax()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest


def _finish(stats: Tensor, group, mass=None) -> Tensor:
    """stats [5 or more, R] of this rank's classes (see loss_rows.statistics; further rows are sums) -> those of all classes.
    mass: the sum of this rank's class weights, if sums over them are wanted."""
    mine, peak = stats[0], stats[0].clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    step = (mine - peak).clamp_(min=-1000)
    shrink = step.exp()
    if mass is not None:
        stats[3] += mass * (mine - peak)
    stats[2] = (stats[2] + step * stats[1]) * shrink
    stats[1] *= shrink
    stats[0] = peak
    _sum(stats[1:], group)
    return stats


class _Part:
    """This rank's part of the vocabulary: its first class and the number of all, and the target among its classes."""

    def __init__(self, weight: Tensor, target: Tensor, ignore_index: int, group, kernels) -> None:
        self.group, self.kernels = group, kernels
        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=target.device)
        rank = dist.get_rank(group)
        sizes[rank] = weight.shape[0]
        ends = _sum(sizes, group).cumsum(0)
        self.classes = ends[-1]
        self.target = (target - (ends[rank] - weight.shape[0])).masked_fill(target == ignore_index, _IGNORED)

    def weights_of_targets(self, class_weight: Tensor, target: Tensor) -> Tensor:
        """class_weight of the targets among this rank's classes, 0 elsewhere."""
        index = target.clamp(0, class_weight.shape[0] - 1)
        return class_weight[index].masked_fill(index != target, 0)

    def whole_dinput(self, gradients):
        """The gradients, with that of the input (not empty, if it is needed) summed over the group."""
        if gradients[0].numel():
            _sum(gradients[0], self.group)
        return gradients


def _losses(part, chunks, class_weight, label_smoothing, z_loss, scale, softcap):
    """-> losses [N] before token weights, factors of part.kernels.gradient [7, N], the logits if all rows are one chunk."""
    wide, target = compute_dtype(chunks.h), part.target.reshape(-1)
    stats = torch.empty((7, target.shape[0]), dtype=wide, device=target.device)
    logits = None
    mine = chunks.weight.shape[0] if class_weight is None else class_weight.sum()  # mass of this rank's classes
    for here, logits in chunks:
        weights = class_weight if label_smoothing else False
        part.kernels.statistics(logits, target[here], stats[:5, here], weights, scale, softcap)
    stats[5] = (target >= 0) & (target < chunks.weight.shape[0])
    stats[6] = stats[5] if class_weight is None else part.weights_of_targets(class_weight, target)
    peak, sums, _, total, picked, found, share = _finish(stats, part.group, mine if label_smoothing else None)
    log_sum, share, everywhere = sums.log(), share * (1 - label_smoothing), 0.0
    lse = peak + log_sum
    loss = share * (log_sum + (peak - picked))
    factors = torch.zeros_like(stats)
    if label_smoothing:
        classes = part.classes.to(wide)
        mass = classes if class_weight is None else _sum(mine, part.group)
        spread = label_smoothing / classes
        loss, everywhere = loss + spread * (mass * log_sum - total), spread * mass
        factors[4] = spread
    if z_loss:  # else 0 times the square of an lse beyond 1.8e19
        loss = loss + z_loss * lse.square()
    loss = loss.masked_fill(found == 0, torch.nan).masked_fill_(target == _IGNORED, 0)
    for row, value in zip(factors, (peak, log_sum, share, everywhere + 2 * z_loss * lse)):
        row.copy_(value)
    return loss, factors, logits if chunks.count == 1 else None


def _gradients(ctx, dloss, chunks, factors, weight, bias, class_weight, shape, logits=None):
    """Gradients of sum(dloss * losses), dloss [N] or None for ones; logits of all rows, else they are made anew."""
    part, (label_smoothing, _, scale, softcap, _, narrow, _, *need) = ctx.part, ctx.options
    target, factors = part.target.reshape(-1), factors.clone()
    if dloss is not None:
        factors[2:5] *= dloss
    gradients = chunked_loss.Gradients(chunks.h, weight, bias, chunks.count, need, narrow)
    for here, z in chunks if logits is None else [(slice(0, target.shape[0]), logits)]:
        part.kernels.gradient(z, target[here], factors[:, here], class_weight, bool(label_smoothing), False, _IGNORED, scale,
                              softcap)  # fmt: skip
        gradients.add(z, chunks.h[here], chunks.weight, here.start)
    return part.whole_dinput(gradients.result(shape))


class _CrossEntropy(torch.autograd.Function):
    """Statistics of all rows, one exchange, gradients. With more than one chunk the gradients need the logits a second time; to
    exchange chunk by chunk instead, the ranks would have to agree on their number, on the host."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, token_weight, class_weight, denominator, part, scale_, *options):
        ctx.part, ctx.scale_, ctx.options = part, scale_, (*options, *ctx.needs_input_grad[:3])
        class_weight = None if class_weight is None else class_weight.to(compute_dtype(hidden)).contiguous()
        chunks = chunked_loss.Chunks(hidden, weight, bias, options[-1])
        loss, factors, logits = _losses(part, chunks, class_weight, *options[:4])
        ctx.gradients, reduction = None, options[4]
        row_scale, left = chunked_loss.row_scales(hidden, token_weight, denominator)
        ctx.save_for_backward(hidden, weight, bias, token_weight, class_weight, factors, row_scale, left)
        if reduction != "none" and any(ctx.needs_input_grad[:3]):
            ctx.gradients = _gradients(
                ctx, row_scale, chunks, factors, weight, bias, class_weight, hidden.shape, logits
            )
        return chunked_loss.reduced(loss, part.target, token_weight, denominator, _IGNORED, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        hidden, weight, bias, token_weight, class_weight, factors, row_scale, left = ctx.saved_tensors
        none, need = ctx.options[4] == "none", ctx.options[-3:]
        if none:
            row_scale = dloss.reshape(-1)
            if token_weight is not None:
                row_scale = row_scale * token_weight.reshape(-1).to(row_scale.dtype)
        grads, ctx.gradients = ctx.gradients, None  # as in linear_cross_entropy: handed over once, then made anew
        if grads is None:
            chunks = chunked_loss.Chunks(hidden, weight, bias, ctx.options[6])
            grads = _gradients(ctx, row_scale, chunks, factors, weight, bias, class_weight, hidden.shape)
        if not none:
            for g in grads:
                ctx.scale_(g, dloss * left)
        return *(g if needed else None for g, needed in zip(grads, need)), *(None,) * (2 + len(ctx.options))


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, part, ignore_index, *options):
        tensors = hidden, weight, bias, part.target
        stats = chunked_loss.logprobs_statistics(part.kernels.statistics, *tensors, *options)
        _finish(stats, part.group)
        *found, saved = chunked_loss.logprobs_of(stats, target.reshape(-1), part.classes, ignore_index)
        found = [t.view(target.shape) for t in found]
        ctx.save_for_backward(hidden, weight, bias, found[2], saved)
        ctx.part, ctx.options = part, options
        ctx.mark_non_differentiable(found[3])
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dlse, dentropy, _):
        hidden, weight, bias, entropy, saved = ctx.saved_tensors
        need, nothing = ctx.needs_input_grad[:3], (None,) * (3 + len(ctx.options))
        grads = chunked_loss.logprobs_backward(
            ctx.part.kernels.gradient, dlogp, dlse, dentropy, hidden, weight, bias, ctx.part.target, entropy, saved, _IGNORED,
            *ctx.options, *need,
        )  # fmt: skip
        ctx.part.whole_dinput(grads)
        return *(g if needed else None for g, needed in zip(grads, need)), *nothing


class _Gather(torch.autograd.Function):
    """The rows of all ranks, one block after the other; its gradient is the own block's."""

    @staticmethod
    def forward(ctx, t, group):
        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=t.device)
        rank = dist.get_rank(group)
        sizes[rank] = t.shape[0]
        sizes = _sum(sizes, group).tolist()  # the reference may wait for the device
        ctx.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        padded = t.new_zeros((max(sizes), *t.shape[1:]))
        padded[: t.shape[0]] = t
        blocks = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(blocks, padded, group=group)
        return torch.cat([b[:n] for b, n in zip(blocks, sizes)])

    @staticmethod
    def backward(ctx, gradient):
        return gradient[ctx.own], None


def _check(op: str, input: Tensor, weight: Tensor, target: Tensor, ignore_index: int, part: _Part, check: bool) -> None:
    if any(type(t).__name__ == "DTensor" for t in (input, weight, target)):
        raise TypeError(f"{op}: group= takes plain tensors, each rank's own part, got a DTensor; pass its to_local()")
    if check or target.device.type == "cpu":
        checks.check_target_values(op, target, int(part.classes), ignore_index, check)


def _device_of(t: Tensor):
    """A CUDA tensor's device made current: Triton launches there. (In a backward autograd sees to it.)"""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def _kernels(backend: str):
    if backend == "torch":
        return loss_rows
    from fastlm.kernels import linear_logprobs as kernels

    return kernels


def linear_cross_entropy(input, weight, bias, target, token_weight, class_weight, denominator, ignore_index, label_smoothing,
                         z_loss, scale, softcap, reduction, narrow, logits_bytes, group, check, backend):  # fmt: skip
    """ops.linear_cross_entropy over a group; the arguments are checked but for the group's own."""
    backend = REGISTRY["linear_cross_entropy"].choose(backend, input, weight, bias, target)
    whole = lambda t: None if t is None else _Gather.apply(t, group)  # noqa: E731
    if backend == "reference":
        return whole_cross_entropy(
            input, whole(weight), target, linear_bias=whole(bias), weight=whole(class_weight), reduction=reduction,
            ignore_index=ignore_index, label_smoothing=label_smoothing, scale=scale, softcap=softcap, z_loss=z_loss,
            token_weight=token_weight, denominator=denominator, backend="reference",
        )  # fmt: skip
    part = _Part(weight, target, ignore_index, group, _kernels(backend))
    _check("linear_cross_entropy", input, weight, target, ignore_index, part, check)
    if reduction == "mean":
        if denominator is None and class_weight is not None:
            wide = class_weight.to(compute_dtype(input))
            denominator = _sum(part.weights_of_targets(wide, part.target).sum(), group)
        denominator = checks.mean_denominator(denominator, input, target, None, ignore_index)
    if input.dtype == torch.float16:
        peak = None if class_weight is None else _largest(class_weight.abs(), group)
        token_weight, denominator, reduction = checks.bounded(
            input, target != ignore_index, token_weight, peak, denominator, reduction
        )
    scale_ = scale_in_place
    if backend == "triton":
        from fastlm.kernels.linear_cross_entropy import scale_
    options = label_smoothing, z_loss, scale, softcap, reduction, narrow, logits_bytes
    with _device_of(input), torch.autocast(input.device.type, enabled=False):
        return _CrossEntropy.apply(input, weight, bias, token_weight, class_weight, denominator, part, scale_, *options)


def linear_logprobs(input, weight, bias, target, ignore_index, scale, softcap, logits_bytes, group, check, backend):
    """ops.linear_logprobs over a group -> logp, lse, entropy, hit."""
    backend = REGISTRY["linear_logprobs"].choose(backend, input, weight, bias, target)
    if backend == "reference":
        whole = lambda t: None if t is None else _Gather.apply(t, group)  # noqa: E731
        return whole_logprobs(
            input, whole(weight), target, linear_bias=whole(bias), scale=scale, softcap=softcap, ignore_index=ignore_index,
            backend="reference",
        )  # fmt: skip
    part = _Part(weight, target, ignore_index, group, _kernels(backend))
    _check("linear_logprobs", input, weight, target, ignore_index, part, check)
    with _device_of(input), torch.autocast(input.device.type, enabled=False):
        return _Logprobs.apply(input, weight, bias, target, part, ignore_index, scale, softcap, logits_bytes)
