"""Argument checks shared by the losses on top of a linear layer, each raising TypeError or ValueError in the op's name, and what
a mean divides by."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops._tensor import can_read, compute_dtype, is_eager
from fastlm.ops.number_checks import LARGEST, check_divisor, check_number


def check_linear(op: str, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    """input [..., D], weight [V, D], bias [V] or None, all floating point, and target [...] int64."""
    for what, t in (("input", input), ("linear_weight", weight), ("linear_bias", bias)):
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{op}: {what} must be floating point, got {t.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(
            f"{op}: target must be int64 class numbers, got {target.dtype}; targets of probabilities: kl_div"
        )
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"{op}: linear_weight must be [V, D] with at least one class, got {list(weight.shape)}")
    if input.ndim == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: input must be [..., {weight.shape[1]}] like linear_weight's rows, got {list(input.shape)}"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(f"{op}: target must be {list(input.shape[:-1])} like input's rows, got {list(target.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: linear_bias must be [{weight.shape[0]}] like linear_weight's rows, got {list(bias.shape)}"
        )


def check_logits(op: str, scale: float, softcap: float | None, logits_bytes: int | None = None, whose="") -> None:
    """The options of every op that makes logits; their names begin with `whose`."""
    if isinstance(scale, Tensor):
        raise TypeError(f"{op}: {whose}scale must be a number, got a tensor; multiply input by it instead")
    check_number(op, f"{whose}scale", scale)
    if softcap is not None:
        check_divisor(op, f"{whose}softcap", softcap, " or None")
    if logits_bytes is not None and not logits_bytes > 0:
        raise ValueError(f"{op}: logits_bytes must be > 0 or None, got {logits_bytes}")


def check_loss_options(op: str, reduction: str, label_smoothing: float, z_loss: float) -> None:
    """The options of both cross entropies."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    check_number(op, "label_smoothing", label_smoothing, 0, 1, "in [0, 1]")
    check_number(op, "z_loss", z_loss, 0, LARGEST, ">= 0 and finite in fp32")


def check_ignore_index(op: str, ignore_index: int) -> None:
    """A number that a target can be."""
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{op}: ignore_index must be a 64-bit integer like the targets, got {ignore_index}")


def check_constant(op: str, what: str, t: Tensor | None, shape) -> None:
    """A floating point tensor of this shape, or None, which gets no gradient."""
    if t is None:
        return
    if not t.is_floating_point():
        raise TypeError(f"{op}: {what} must be floating point, got {t.dtype}")
    if t.shape != shape:
        raise ValueError(f"{op}: {what} must be {list(shape)}, got {list(t.shape)}")
    if t.requires_grad:
        raise ValueError(f"{op}: {what} is a constant and gets no gradient, got one that requires grad; detach() it")


def ordinary(t: Tensor | None) -> Tensor | None:
    """t, a small tensor, or its copy if it was made in inference mode: autograd saves no such tensor."""
    if t is None or torch.compiler.is_compiling() or not t.is_inference():
        return t
    return t.clone()


def check_denominator(op: str, denominator: float | Tensor | None, reduction: str, zero: bool) -> None:
    """What a mean divides by: a number, which may be 0 if `zero`, or a 0-d tensor, a constant."""
    if denominator is None:
        return
    if reduction != "mean":
        raise ValueError(f"{op}: denominator is what reduction='mean' divides by, got reduction={reduction!r}")
    if not isinstance(denominator, Tensor):
        if zero:
            check_number(op, "denominator", denominator, 0, LARGEST, ">= 0 and finite in fp32, or a 0-d tensor")
        if not zero or denominator:
            check_divisor(op, "denominator", denominator)
        return
    if denominator.ndim or denominator.requires_grad:
        raise ValueError(
            f"{op}: denominator must be a number or a 0-d tensor that requires no grad, got shape "
            f"{list(denominator.shape)}, requires_grad={denominator.requires_grad}; detach() or sum() it"
        )


def check_target_values(op: str, target: Tensor, classes: int, ignore_index: int, check: bool = False) -> None:
    """Every target in [0, classes) or ignored, where reading them is free (CPU) or asked for (`check`). What nobody checks is
    clamped where it is an index, and makes its loss NaN."""
    if not can_read(target) and not (check and type(target) is Tensor and is_eager()):
        return
    outside = target.clamp(0, classes - 1) != target
    if outside.any() and (outside := outside & (target != ignore_index)).any():
        places = outside.nonzero()
        raise ValueError(
            f"{op}: target must be in [0, {classes}) or ignore_index={ignore_index}, got {target[outside][0].item()} at "
            f"{places[0].tolist()}, {len(places)} such of {target.numel()}; put ignore_index there, or let the logits have as "
            "many classes as the tokenizer"
        )


def mean_denominator(denominator, input, target, weight, ignore_index):
    """What the mean divides by, a 0-d tensor on input's device."""
    if isinstance(denominator, Tensor):
        return denominator.to(input.device, non_blocking=True)
    if denominator is not None:
        return input.new_full((), denominator, dtype=compute_dtype(input))
    live = target != ignore_index
    if weight is None:
        return live.sum()
    return weight.to(compute_dtype(input))[target.clamp(0, weight.shape[0] - 1)].where(live, 0).sum()


def bounded(hidden, live, token_weight, peak, denominator, reduction):
    """-> token_weight, denominator and reduction of the same loss, such that in fp16 its gradient's sum over rows stays in range.

    In fp16 that sum is taken before anything but the token weights is multiplied in (see row_scales of chunked_loss). These
    become such that no sum is over more than 4096 like rows, which a weight's gradient still fits, and the denominator makes up
    for it. live: which rows count, or None for all; peak: the largest class weight, 0-d, or None. All rows of all ranks of a
    DTensor are seen here and not within the op, so that ranks agree.
    """
    rows = hidden.shape[:-1]
    n = rows.numel()
    if hidden.dtype != torch.float16 or reduction == "none" or not n:
        return token_weight, denominator, reduction
    if n <= 4096 and token_weight is peak is None:
        return token_weight, denominator, reduction
    few = hidden.new_full((), 4096 / max(n, 4096), dtype=torch.float32)
    if peak is not None:
        few = few / peak.to(few.dtype).clamp(min=1)
    if token_weight is not None:
        token_weight = token_weight.to(few.dtype)
        if live is not None:  # a row that does not count may have any weight
            token_weight = token_weight.masked_fill(~live, 0)
        few = few / token_weight.abs().amax().clamp(min=1)
    weight = hidden.new_ones(rows, dtype=few.dtype) if token_weight is None else token_weight
    return weight * few, few if denominator is None else denominator * few, "mean"
