"""Cross entropy of logits against class numbers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels.chunked_loss import inverse
from fastlm.ops import loss_checks as checks
from fastlm.ops._cuda import not_measured
from fastlm.ops._native import MEAN, cross_entropy_loss
from fastlm.ops._op import Op, at_once
from fastlm.ops._tensor import can_read, compute_dtype, grad_of
from fastlm.ops.softcap import capped


def _scaled(input, scale, softcap):
    x = input.to(compute_dtype(input))
    if scale != 1:
        x = x * scale
    return x if softcap is None else capped(x, softcap)


def _reference(input, target, weight, ignore_index, label_smoothing, z_loss, scale, softcap):
    live, V = target != ignore_index, input.shape[-1]
    x = _scaled(input.masked_fill(~live.unsqueeze(-1), 0), scale, softcap)
    terms = -x.log_softmax(-1)  # lse - x, of which a large lse would round the digits away
    index = target.clamp(0, V - 1)
    w = None if weight is None else weight.to(x.dtype)
    loss = (1 - label_smoothing) * terms.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    if w is not None:
        loss = loss * w[index]
    if label_smoothing:  # else 0 times the -inf of a class that is ruled out
        loss = loss + label_smoothing / V * (terms if w is None else terms * w).sum(-1)
    if z_loss:  # else 0 times the square of an lse beyond 1.8e19
        loss = loss + z_loss * x.logsumexp(-1).square()
    return loss.where((target >= 0) & (target < V), torch.nan).where(live, 0)


def _any_ignored(target, ignore_index):
    """Whether a row is ignored, or there is none. target: 1-d on the CPU, eagerly."""
    if target.numel() > 128:
        return bool((target == ignore_index).any())
    values = target.tolist()  # a microsecond, where that counts
    return not values or ignore_index in values


def has_bad_rows(input, target, ignore_index):
    """Whether an ignored row holds NaN or inf, of which torch would make a NaN gradient. Only these rows are read; CPU, eager."""
    if not _any_ignored(target.reshape(-1), ignore_index):
        return False
    values = input.detach()
    if values.numel() <= 1 << 15 and math.isfinite(values.sum()):
        return False
    return not values[target == ignore_index].sum().isfinite()


def without_bad_rows(input, target, ignore_index):
    """input, with 0 in its ignored rows if one `has_bad_rows`."""
    if not has_bad_rows(input, target, ignore_index):
        return input
    return input.masked_fill((target == ignore_index).unsqueeze(-1), 0)


def _mean_at_once(input, target, ignore_index, label_smoothing):
    """The mean by torch's own function in as few calls as it takes; None where there is more to it: bad arguments, a target
    out of range, no row that counts, ignored rows that would spoil a gradient. input: a plain CPU tensor."""
    if target.dtype is not torch.int64 or (label_smoothing and not 0 <= label_smoothing <= 1):
        return None
    if target.ndim != 1:
        if not input.ndim or not input.shape[-1] or target.shape != input.shape[:-1]:
            return None
        input, target = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    elif input.ndim != 2:
        return None
    dtype = input.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        if not input.is_floating_point():
            return None
        input = input.float()
    try:
        loss = cross_entropy_loss(input, target, None, MEAN, ignore_index, label_smoothing)
    except (IndexError, RuntimeError, TypeError, ValueError):  # there is a better message
        return None
    if loss.requires_grad:
        if not _any_ignored(target, ignore_index):
            return loss
        if has_bad_rows(input, target, ignore_index):
            return None
    return None if math.isnan(loss.item()) else loss


def _torch(input, target, weight, ignore_index, label_smoothing, z_loss, scale, softcap, reduction="none"):
    plain = scale == 1 and softcap is None and input.dtype in (torch.float32, torch.float64)
    flat, wrong, clean = target if target.ndim == 1 else target.reshape(-1), None, input
    if not can_read(input):
        # Nothing is known of the values: torch would stop the device at a target out of range.
        wrong = (flat != ignore_index) & ((flat < 0) | (flat >= input.shape[-1]))
        flat = flat.masked_fill(wrong, ignore_index)
        clean = input.masked_fill((target == ignore_index).unsqueeze(-1), 0)
    elif input.requires_grad and torch.is_grad_enabled():
        clean = without_bad_rows(input, target, ignore_index)
    x = clean if plain else _scaled(clean, scale, softcap)
    x = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if weight is not None and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if reduction != "none":
        return F.cross_entropy(x, flat, weight, reduction=reduction, **options)
    loss = F.cross_entropy(x, flat, weight, reduction="none", **options)
    if z_loss:
        loss = loss + z_loss * x.logsumexp(-1).square().masked_fill(flat == ignore_index, 0)
    if wrong is not None:
        loss = loss.masked_fill(wrong, torch.nan)
    return loss if target.ndim == 1 else loss.view(target.shape)


def _supports(backend, input, target, weight):
    if backend == "cuda" and (target.numel() >= 2**31 or input.shape[-1] >= 2**31):
        return f"its rows and classes are numbered in 32 bits: fewer than 2^31 of each, got input {list(input.shape)}"
    return None


OP = Op(
    "cross_entropy",
    "(Tensor input, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, float z_loss, float scale,"
    " float? softcap, str backend) -> (Tensor loss, Tensor statistics)",
    "(Tensor dloss, Tensor input, Tensor target, Tensor? weight, Tensor statistics, int ignore_index, float label_smoothing,"
    " float z_loss, float scale, float? softcap, str backend) -> Tensor",
    reference=_reference,
    torch=_torch,
    kernels={
        "triton": ("cross_entropy:cross_entropy_fwd", "cross_entropy:cross_entropy_bwd"),
        "cuda": ("cross_entropy_fwd", "cross_entropy_bwd"),
    },
    supports=_supports,
    slower=not_measured,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _fake_forward(input, target, *_):
    loss = input.new_empty(target.shape, dtype=torch.float32)
    return loss, input.new_empty((2, target.numel()), dtype=torch.float32)


def _fake_backward(dloss, input, *_):
    from fastlm.kernels.common import at_two_strides, empty_beside

    return empty_beside(at_two_strides(input)[0])


OP.fake(_fake_forward, _fake_backward)


@OP.autograd
class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target, weight, *options):
        loss, statistics = OP.below(input, target, weight, *options)
        ctx.save_for_backward(input, target, weight, statistics)
        ctx.options = options
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx, dloss, _):
        return OP.backward(dloss, *ctx.saved_tensors, *ctx.options), None, None, *(None,) * len(ctx.options)


@OP.backward_reference
def _backward_reference(dloss, input, target, weight, statistics, *options):
    return grad_of(lambda z: _reference(z, target, weight, *options[:-1]), (input,), (dloss,))[0]


def _shard_forward(input, target, weight, *options):
    from torch.distributed.tensor import Replicate, Shard

    def rule(place, statistics):
        return [place, statistics], [place, place, None if weight is None else Replicate(), *(None,) * len(options)]

    return [rule(Replicate(), Replicate())] + ([rule(Shard(0), Shard(1))] if input.ndim > 1 else [])


def _shard_backward(dloss, input, target, weight, statistics, *options):
    from torch.distributed.tensor import Replicate, Shard

    def rule(place, of_statistics):
        whole = None if weight is None else Replicate()
        return [place], [place, place, place, whole, of_statistics, *(None,) * len(options)]

    return [rule(Replicate(), Replicate())] + ([rule(Shard(0), Shard(1))] if input.ndim > 1 else [])


OP.sharding(_shard_forward, _shard_backward)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    check: bool = False,
    backend: str = "auto",
) -> Tensor:
    """F.cross_entropy of logits and class numbers, the classes along the last dimension, in fp32, with a few more options.

        z = scale * input;   z = softcap * tanh(z / softcap) if given;   lse = log sum_v exp(z_v);   y = target, w = weight
        loss_i = (1 - e) w_y (lse - z_y) + e / V sum_v w_v (lse - z_v) + z_loss lse^2,   e = label_smoothing

    Args:
        input: [..., V], fp16, bf16 or fp32 (fp64 too on reference and torch), any strides. It is never overwritten.
        target: [...], int64, the class of each row, already shifted.
        weight: [V] float class weights, a constant, or None for ones.
        ignore_index: rows with this target add nothing to loss, gradients or what the mean divides by, and may hold
            anything, NaN too. None means -100.
        reduction: "mean", "sum", or "none".
        label_smoothing: share of the target mass spread over all classes, in [0, 1] (arXiv:1512.00567).
        scale: factor of the logits, a number.
        softcap: bound of the logits (Gemma 2, arXiv:2408.00118), or None.
        z_loss: coefficient of lse^2, which keeps the logits from drifting (PaLM, arXiv:2204.02311).
        token_weight: [...] float, multiplies each row's loss; differentiable. It does not change what a mean divides by.
        denominator: what the mean divides by instead of the sum of the class weights of the rows that count (without class
            weights: their number); a number or a 0-d tensor, a constant. 0 gives 0.
        check: check the values of target on a GPU too, at the price of a wait.
        backend: "auto", "reference", "torch", "triton" or "cuda".

    Returns:
        The loss in fp32 (fp64 for fp64 input): 0-d, or target's shape for "none". A mean without a row that counts is 0 with zero
        gradients (torch: NaN). Under autocast dtypes are kept.

    Memory: two fp32 numbers a row are kept for the backward, which reads the logits once more and writes their gradient. No host
    sync: values of targets are checked on the CPU or with check=True; else one outside [0, V) gives a NaN loss. Deterministic.

    Raises:
        ValueError: shapes that do not fit, a checked target out of range, an unknown reduction or a number out of range, an
            unknown or unsupported backend. TypeError: input or weights not floating point, target not int64.

    Backends: triton (compute capability >= 8.0), cuda (likewise; fewer than 2^31 rows and classes; not chosen by "auto"), torch
    (F.cross_entropy itself; the CPU default), reference.
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    if (
        reduction == "mean" and weight is token_weight is denominator is softcap is None and not z_loss
        and type(scale) is float and scale == 1 and type(label_smoothing) is float and at_once(backend, input)
    ):  # fmt: skip
        loss = _mean_at_once(input, target, ignore_index, label_smoothing)
        if loss is not None:
            return loss
    _check(input, target, weight, reduction, label_smoothing, scale, softcap, z_loss, token_weight, denominator)
    checks.check_ignore_index("cross_entropy", ignore_index)
    backend = OP.choose(backend, input, target, weight)
    number = None if softcap is None else float(softcap)
    args = input, target, weight, ignore_index, float(label_smoothing), float(z_loss), float(scale), number
    if (
        backend == "torch" and reduction == "mean" and not z_loss and token_weight is None and denominator is None
        and can_read(input)
    ):  # fmt: skip
        try:
            loss = OP.plain("torch", *args, "mean")
            if not math.isnan(loss.item()):
                return loss
        except IndexError:  # a target out of range, for which there is a better message
            pass
    checks.check_target_values("cross_entropy", target, input.shape[-1], ignore_index, check)
    loss = OP.plain(backend, *args) if backend in OP.plain_forms else OP.forward(*args, backend)[0]
    if token_weight is not None:
        loss = loss * token_weight.masked_fill(target == ignore_index, 0).to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() * inverse(checks.mean_denominator(denominator, input, target, weight, ignore_index), loss.dtype)


def _check(input, target, weight, reduction, label_smoothing, scale, softcap, z_loss, token_weight, denominator):
    name = "cross_entropy"
    if not input.is_floating_point():
        raise TypeError(f"{name}: input must be floating point, got {input.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"{name}: target must be int64 class numbers, got {target.dtype}; for probabilities see kl_div")
    if input.ndim == 0 or input.shape[-1] == 0 or target.shape != input.shape[:-1]:
        raise ValueError(
            f"{name}: input must be [..., V] and target [...] alike, got {list(input.shape)} and {list(target.shape)}; "
            "classes lie along the last dimension, input.movedim(1, -1) of F.cross_entropy's"
        )
    if weight is not None:
        checks.check_constant(name, "weight", weight, input.shape[-1:])
    if token_weight is not None and (not token_weight.is_floating_point() or token_weight.shape != target.shape):
        raise ValueError(
            f"{name}: token_weight must be floating point and {list(target.shape)} like target, "
            f"got {token_weight.dtype} {list(token_weight.shape)}"
        )
    check_loss_options(name, reduction, label_smoothing, scale, softcap, z_loss)
    checks.check_denominator(name, denominator, reduction, zero=True)


def check_loss_options(name, reduction, label_smoothing, scale, softcap, z_loss):
    """The errors that the module shares."""
    checks.check_logits(name, scale, softcap)
    checks.check_loss_options(name, reduction, label_smoothing, z_loss)
