"""Divergence between a student's and a teacher's next-token distributions, from logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels.chunked_loss import inverse
from fastlm.ops._op import Op, at_once
from fastlm.ops._tensor import can_read, compute_dtype, grad_of
from fastlm.ops.loss_checks import check_denominator, ordinary
from fastlm.ops.loss_gradients import save, saved
from fastlm.ops.number_checks import LARGEST, SMALLEST, check_divisor, check_number
from fastlm.ops.softcap import slope as slope_of_tanh

_SCRATCH_BYTES = 1 << 19
# Elements up to which the CPU takes torch's own calls for the two ends of beta: their tensors then stay in the cache.
_SMALL = 1 << 18


def divergence(student, teacher, beta, temperature):
    """The formula over the last dimension of logits of one dtype; what both distillation losses call right."""
    log_q = (student / temperature).log_softmax(-1)
    log_p = (teacher / temperature).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()

    def weighted(weight, excess):  # 0 log 0 = 0, and no NaN in the derivative either
        return weight * excess.masked_fill(weight == 0, 0)

    if beta == 0:
        return weighted(p, log_p - log_q).sum(-1)
    if beta == 1:
        return weighted(q, log_q - log_p).sum(-1)
    m = beta * p + (1 - beta) * q
    log_m = m.masked_fill(m == 0, 1).log()
    return (beta * weighted(p, log_p - log_m) + (1 - beta) * weighted(q, log_q - log_m)).sum(-1)


def _reference(student, teacher, mask, beta, temperature):
    dtype = compute_dtype(student)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if mask is None:
        return divergence(student, teacher, beta, temperature)
    dead = ~mask.unsqueeze(-1)  # before the formula: such rows may hold anything
    loss = divergence(student.masked_fill(dead, 0), teacher.masked_fill(dead, 0), beta, temperature)
    return loss.where(mask, 0)


def _divergence_block(a, b, q, p, beta, careful):
    """Rows of logits over the temperature whose maximum is 0 -> divergences [R] and their gradient [R, V] by the first.

    All four tensors are overwritten. careful: with 0 log 0 = 0, which costs a fifth more. A softmax of torch's costs less than
    an exp, so the logarithms of probabilities are not raised again: log q = a + log max q.
    """
    torch.softmax(a, -1, out=q), torch.softmax(b, -1, out=p)
    gap = (q.amax(-1) / p.amax(-1)).log_()
    weight, excess = (p, b.sub_(a)) if beta == 0 else (q, a.sub_(b))  # log p - log q but for the gap, or the reverse
    if careful:
        excess.masked_fill_(weight == 0, 0)
    mean = torch.mul(weight, excess, out=a if beta == 0 else b).sum(-1)
    if beta == 0:
        return mean - gap, q.sub_(p)
    return mean + gap, excess.sub_(mean.unsqueeze(-1)).mul_(q)


def _mixture_block(a, b, q, p, beta, careful):
    """_divergence_block for 0 < beta < 1. Here probabilities are the exponentials of their logarithms to the last bit: what is
    left of the differences to log m may be small."""
    torch.exp(torch.log_softmax(a, -1, out=a), out=q), torch.exp(torch.log_softmax(b, -1, out=b), out=p)
    # Parts of subnormal probabilities may round to 0 where those do not, and log 0 times them would be infinite.
    log_m = torch.mul(q, 1 - beta).add_(p, alpha=beta).clamp_(min=torch.finfo(q.dtype).tiny).log_()
    a.sub_(log_m), b.sub_(log_m)
    if careful:
        a.masked_fill_(q == 0, 0), b.masked_fill_(p == 0, 0)
    of_p, of_q = torch.mul(p, b, out=log_m).sum(-1), torch.mul(q, a, out=log_m).sum(-1)
    return beta * of_p + (1 - beta) * of_q, a.sub_(of_q.unsqueeze(-1)).mul_(q).mul_(1 - beta)


def _load(z, x, inverse_t, scale, softcap):
    """x = the rows z of logits over the temperature, shifted to a maximum of 0; -> the slope of the softcap or None."""
    slope = None
    if scale != 1 or softcap is not None:
        z = torch.mul(z.to(x.dtype), scale)
    if softcap is not None:
        u = z.div_(softcap)
        slope, z = slope_of_tanh(u), u.tanh_().mul_(softcap)
    torch.sub(z, z.amax(-1, keepdim=True), out=x) if z.dtype == x.dtype else x.copy_(z).sub_(x.amax(-1, keepdim=True))
    if inverse_t != 1:
        x.mul_(inverse_t)
    return slope


def torch_rows(
    student, teacher, mask, factor, loss, gradient, beta, temperature, scales=(1.0, 1.0), softcaps=(None, None)
):
    """Divergences of rows [N, V] into loss [N] and, unless None, the gradient of sum(factor * loss) by the student's logits
    into `gradient`, which may be the student's logits; factor [N] or None for ones. The teacher's logits are only read.

    In plain torch, a few rows at a time, so that all passes but the first are over the cache.
    """
    n, vocabulary = student.shape
    inverse_t = 1 / temperature
    step = max(1, min(n, _SCRATCH_BYTES // (vocabulary * loss.element_size())))
    buffers = loss.new_empty((4, step, vocabulary))
    formula = _mixture_block if 0 < beta < 1 else _divergence_block
    by_row = inverse_t if factor is None else (factor * inverse_t).unsqueeze(-1)
    ways = (False, True) if can_read(loss) else (True,)  # on a GPU a look at the result would be a wait for it
    for start in range(0, n, step):
        here = slice(start, min(start + step, n))
        block = buffers[:, : here.stop - start].unbind()
        for careful in ways:
            slope = _load(student[here], block[0], inverse_t, scales[0], softcaps[0])
            _load(teacher[here], block[1], inverse_t, scales[1], softcaps[1])
            part, dpart = formula(*block, beta, careful)
            if careful or not math.isnan(part.sum()):
                break
        loss[here] = part
        if gradient is None:
            continue
        if slope is not None:
            dpart.mul_(slope * scales[0])
        elif scales[0] != 1:
            dpart.mul_(scales[0])
        torch.mul(dpart, by_row if factor is None else by_row[here], out=gradient[here])
    if mask is not None:
        loss.masked_fill_(~mask, 0)
        if gradient is not None:
            gradient.masked_fill_(~mask.unsqueeze(-1), 0)


class _Rows(torch.autograd.Function):
    """The torch form. The gradient is made in the forward, where both softmaxes are at hand; plain torch keeps two or three
    tensors of this size instead."""

    @staticmethod
    def forward(ctx, student, teacher, mask, beta, temperature):
        x, y = (t.reshape(-1, t.shape[-1]) for t in (student, teacher))
        loss = torch.empty(x.shape[0], dtype=compute_dtype(student), device=x.device)
        gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device) if ctx.needs_input_grad[0] else None
        torch_rows(x, y, None if mask is None else mask.reshape(-1), None, loss, gradient, beta, temperature)
        save(ctx, student, teacher, mask, gradient)
        ctx.options = beta, temperature
        return loss.view(student.shape[:-1])

    @staticmethod
    def backward(ctx, dloss):
        student, teacher, mask, gradient = saved(ctx)
        if torch.is_grad_enabled():
            fn = lambda s: _reference(s, teacher, mask, *ctx.options)  # noqa: E731
            return *grad_of(fn, (student,), (dloss,)), None, None, None, None
        return (gradient.view(student.shape) * dloss.unsqueeze(-1)).to(student.dtype), None, None, None, None


def _torch(student, teacher, mask, beta, temperature):
    if not can_read(student):
        return _reference(student, teacher, mask, beta, temperature)
    if student.numel() <= _SMALL and mask is None and beta in (0, 1):
        loss = _small(student, teacher, beta, temperature, "none").sum(-1)
        if not math.isnan(loss.detach().sum()):
            return loss
    return _Rows.apply(student, teacher, mask, beta, temperature)


def _small(student, teacher, beta, temperature, reduction):
    """torch's own calls, NaN where they have 0 times infinity."""
    dtype = compute_dtype(student)
    if temperature != 1:
        student, teacher = student.to(dtype) / temperature, teacher.to(dtype) / temperature
    log_q, log_p = student.log_softmax(-1, dtype=dtype), teacher.log_softmax(-1, dtype=dtype)
    pair = (log_q, log_p) if beta == 0 else (log_p, log_q)
    return F.kl_div(*pair, reduction=reduction, log_target=True)


def _sum_at_once(student, teacher, beta, temperature):
    """The sum over all rows of plain CPU tensors in few calls and little memory; None where there is more to it: bad arguments,
    many logits, 0 times infinity."""
    if teacher.shape != student.shape or not 0 < student.numel() <= _SMALL or student.ndim == 0:
        return None
    if not (student.is_floating_point() and teacher.is_floating_point() and SMALLEST <= temperature <= LARGEST):
        return None
    if student.dtype is not torch.float64:
        student, teacher = student.float(), teacher.float()
    elif teacher.dtype is not torch.float64:
        teacher = teacher.double()
    if temperature != 1:
        student, teacher = student / float(temperature), teacher / float(temperature)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 1:
        total = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    elif log_q.requires_grad:
        total = ((log_p - log_q) * log_p.exp_()).sum()
    else:
        total = torch.sub(log_p, log_q, out=log_q).mul_(log_p.exp_()).sum()
    return None if math.isnan(total.item()) else total


OP = Op(
    "kl_div",
    "(Tensor student, Tensor teacher, Tensor? mask, float beta, float temperature, str backend)"
    " -> (Tensor loss, Tensor statistics)",
    "(Tensor dloss, Tensor student, Tensor teacher, Tensor? mask, Tensor statistics, float beta, float temperature,"
    " str backend) -> Tensor",
    reference=_reference,
    torch=_torch,
    kernels={"triton": ("kl_div:kl_div_fwd", "kl_div:kl_div_bwd")},
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _fake_forward(student, teacher, mask, beta, temperature, backend):
    loss = student.new_empty(student.shape[:-1], dtype=torch.float32)
    return loss, student.new_empty((5, loss.numel()), dtype=torch.float32)


def _fake_backward(dloss, student, *_):
    from fastlm.kernels.common import at_two_strides, empty_beside

    return empty_beside(at_two_strides(student)[0])


OP.fake(_fake_forward, _fake_backward)


@OP.autograd
class _KLDiv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, mask, *options):
        loss, statistics = OP.below(student, teacher, mask, *options)
        save(ctx, student, teacher, mask, statistics)
        ctx.options = options
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx, dloss, _):
        return OP.backward(dloss, *saved(ctx), *ctx.options), None, None, None, None, None


@OP.backward_reference
def _backward_reference(dloss, student, teacher, mask, statistics, beta, temperature, backend):
    return grad_of(lambda s: _reference(s, teacher, mask, beta, temperature), (student,), (dloss,))[0]


def _shard_forward(student, teacher, mask, beta, temperature, backend):
    from torch.distributed.tensor import Replicate, Shard

    def rule(place, statistics):
        return [place, statistics], [place, place, None if mask is None else place, None, None, None]

    # By rows only: each is a sum over its classes. The statistics of the flattened rows lie along their second dimension.
    return [rule(Replicate(), Replicate())] + ([rule(Shard(0), Shard(1))] if student.ndim > 1 else [])


def _shard_backward(dloss, student, teacher, mask, statistics, beta, temperature, backend):
    from torch.distributed.tensor import Replicate, Shard

    def rule(place, statistics):
        return [place], [place, place, place, None if mask is None else place, statistics, None, None, None]

    return [rule(Replicate(), Replicate())] + ([rule(Shard(0), Shard(1))] if student.ndim > 1 else [])


OP.sharding(_shard_forward, _shard_backward)


def check_options(name, rows_shape, beta, temperature, mask, token_weight, reduction, denominator):
    """The errors that both distillation losses share."""
    check_number(name, "beta", beta, 0, 1, "in [0, 1]")
    check_divisor(name, "temperature", temperature)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"{name}: mask must be bool, True where a row counts (target != -100, say), got {mask.dtype}")
    if token_weight is not None and not token_weight.is_floating_point():
        raise TypeError(f"{name}: token_weight must be floating point, got {token_weight.dtype}")
    for what, t in (("mask", mask), ("token_weight", token_weight)):
        if t is not None and t.shape != rows_shape:
            raise ValueError(f"{name}: {what} must be {list(rows_shape)}, one for each row, got {list(t.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    check_denominator(name, denominator, reduction, zero=False)


def reduced(loss, mask, token_weight, reduction, denominator):
    """Losses of rows (0 where the mask is False) -> what `reduction` asks for. Nothing is read back from the device."""
    if token_weight is not None:
        weight = token_weight if mask is None else token_weight.masked_fill(~mask, 0)
        loss = loss * weight.to(loss.dtype)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else _mean(total, loss.numel(), mask, denominator)


def _mean(total, rows, mask, denominator):
    if isinstance(denominator, Tensor):
        return total * inverse(denominator, total.dtype)
    if denominator is None:
        denominator = max(rows, 1) if mask is None else mask.sum().clamp(min=1)
    return total / denominator


def _check(student, teacher):
    for what, t in (("student_logits", student), ("teacher_logits", teacher)):
        if not t.is_floating_point():
            raise TypeError(f"kl_div: {what} must be floating point, got {t.dtype}")
    if student.ndim == 0 or student.shape[-1] == 0:
        raise ValueError(f"kl_div: student_logits must be [..., V] with at least one class, got {list(student.shape)}")
    if teacher.shape != student.shape:
        hint = "; cut both to the classes they share" if teacher.shape[:-1] == student.shape[:-1] else ""
        raise ValueError(
            f"kl_div: teacher_logits must have student_logits' shape {list(student.shape)}, got {list(teacher.shape)}{hint}"
        )


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence between the distributions of a student and a teacher: forward KL, reverse KL, or what lies between.

        q = softmax(student_logits / temperature);   p = softmax(teacher_logits / temperature)
        beta = 0:      loss_i = KL(p || q) = sum_v p_v (log p_v - log q_v)      the usual distillation
        beta = 1:      loss_i = KL(q || p)                                       mode-seeking
        0 < beta < 1:  loss_i = beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q      (0.5: Jensen-Shannon)

    The convention of GKD (arXiv:2306.13649) and TRL. The two ends are named cases and not limits: as beta goes to either end
    the mixture's divergence goes to 0. There is no factor temperature^2: multiply by it to keep the size of the gradients over
    temperatures (arXiv:1503.02531). F.kl_div(log q, log p, log_target=True) is the summand of beta = 0.

    Args:
        student_logits: [..., V], fp16, bf16, fp32 (fp64 too on reference and torch), any strides.
        teacher_logits: [..., V], the same shape, any float dtype. A constant: detached here, it gets no gradient.
        beta: which divergence, in [0, 1].
        temperature: both softmaxes are of logits / temperature, > 0.
        mask: [...] bool, True where a row counts, or None for all; from labels it is `labels != -100`. The others add
            nothing to loss, gradients or count, and may hold anything, NaN too.
        token_weight: [...] float, multiplies each row's loss; differentiable. It does not change what a mean divides by.
        reduction: "mean", "sum", or "none".
        denominator: what the mean divides by instead of the number of rows that count, a constant: a number > 0, or a 0-d tensor
            (say the count over all processes), for which 0 gives 0.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        The loss in fp32 (fp64 for fp64 student_logits): 0-d, or [...] for "none". A mean without a row that counts is 0 with
        zero gradients. Probabilities of 0 (a logit of -inf) have the limits' values: 0 log 0 = 0, and the loss is inf where
        the left distribution of a KL has a class that the right one rules out (its gradients are then inf or NaN for beta = 1).
        Statistics are fp32. Under autocast dtypes are kept.

    Memory: five fp32 numbers a row are kept for the backward, which reads both logits once more; the torch form keeps the
    gradient instead. No host sync, deterministic, inputs are not overwritten.

    Raises:
        ValueError: shapes that do not fit, a number out of range, an unknown reduction, an unknown or unsupported backend.
        TypeError: logits or token_weight not floating point, mask not bool.

    Backends: triton (compute capability >= 8.0), torch (the CPU default), reference.
    """
    if teacher_logits.requires_grad:
        teacher_logits = teacher_logits.detach()
    if (
        mask is token_weight is denominator is None and reduction in ("mean", "sum")
        and type(beta) is type(temperature) is float and (beta == 0 or beta == 1) and at_once(backend, student_logits)
    ):  # fmt: skip
        total = _sum_at_once(student_logits, teacher_logits, beta, temperature)
        if total is not None:
            return total if reduction == "sum" else total / (student_logits.numel() // student_logits.shape[-1])
    _check(student_logits, teacher_logits)
    check_options("kl_div", student_logits.shape[:-1], beta, temperature, mask, token_weight, reduction, denominator)
    mask = ordinary(mask)
    args = student_logits, teacher_logits, mask, float(beta), float(temperature)
    backend = OP.choose(backend, *args[:3])
    loss = OP.plain(backend, *args) if backend in OP.plain_forms else OP.forward(*args, backend)[0]
    return reduced(loss, mask, token_weight, reduction, denominator)
