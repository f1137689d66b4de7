"""The divergence of a student's and a teacher's linear layers, without ever holding all logits of either."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels import linear_kl_div as loop
from fastlm.ops import loss_checks as checks
from fastlm.ops._op import Op
from fastlm.ops._tensor import autocast_dtype, compute_dtype
from fastlm.ops.kl_div import check_options, divergence, reduced, torch_rows
from fastlm.ops.loss_gradients import NEED, empty_gradients, scaled, wire
from fastlm.ops.softcap import capped


def _logits(hidden, weight, bias, dtype, scale, softcap):
    z = scale * F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return z if softcap is None else capped(z, softcap)


def _reference(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, token_weight, denominator,
               beta, temperature, scale, softcap, teacher_scale, teacher_softcap, reduction, *_):  # fmt: skip
    dtype = compute_dtype(hidden)
    student = _logits(hidden, weight, bias, dtype, scale, softcap)
    teacher = _logits(teacher_hidden, teacher_weight, teacher_bias, dtype, teacher_scale, teacher_softcap)
    if mask is not None:
        student, teacher = (t.masked_fill(~mask.unsqueeze(-1), 0) for t in (student, teacher))
    loss = divergence(student, teacher, beta, temperature)
    if mask is not None:
        loss = loss.where(mask, 0)
    return reduced(loss, mask, token_weight, reduction, denominator)


_NAMES = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias", "mask", "token_weight",
          "denominator")  # fmt: skip
_TENSORS = len(_NAMES)
_ARGS = ", ".join(f"Tensor{'?' if n not in _NAMES[:2] + _NAMES[3:5] else ''} {n}" for n in _NAMES)
_OPTIONS = (
    "float beta, float temperature, float scale, float? softcap, float teacher_scale, float? teacher_softcap, str reduction,"
    " int? logits_bytes, bool need_dhidden, bool need_dweight, bool need_dbias, str backend"
)

OP = Op(
    "linear_kl_div",
    f"({_ARGS}, {_OPTIONS}) -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias, Tensor left)",
    f"(Tensor dloss, {_ARGS}, Tensor dhidden, Tensor dweight, Tensor dbias, Tensor left, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    kernels={
        "torch": (partial(loop.forward, torch_rows), partial(loop.backward, torch_rows, scaled)),
        "triton": ("linear_kl_div:linear_kl_div_fwd", "linear_kl_div:linear_kl_div_bwd"),
    },
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _fake_forward(hidden, weight, bias, *rest):
    options = rest[_TENSORS - 3 :]
    none, dtype = options[6] == "none", compute_dtype(hidden)
    loss = hidden.new_empty(hidden.shape[:-1] if none else (), dtype=dtype)
    gradients = empty_gradients(hidden, weight, bias, (False,) * 3 if none else options[NEED])
    return loss, *gradients, hidden.new_empty((), dtype=dtype)


def _fake_backward(dloss, hidden, weight, bias, *rest):
    return empty_gradients(hidden, weight, bias, rest[NEED])


OP.fake(_fake_forward, _fake_backward)


_call = wire(OP, _TENSORS)
_BY_ROW = (True, False, False, True, False, False, True, True, False)


def _shard_forward(*args):
    from torch.distributed.tensor import Partial, Replicate, Shard

    tensors, options = args[:_TENSORS], args[_TENSORS:]
    now, need, whole, rows = options[6] != "none", options[NEED], Replicate(), Shard(0)
    places = lambda p: [None if t is None else p if by_row else whole for t, by_row in zip(tensors, _BY_ROW)]  # noqa: E731
    nothing = [None] * len(options)
    rules = [([whole] * 5, [*places(whole), *nothing])]
    if tensors[0].ndim > 1:
        gradients = [p if now and needed else whole for p, needed in zip((rows, Partial(), Partial()), need)]
        rules.append(([Partial() if now else rows, *gradients, whole], [*places(rows), *nothing]))
    return rules


def _shard_backward(dloss, *args):
    from torch.distributed.tensor import Partial, Replicate, Shard

    tensors, options = args[:_TENSORS], args[_TENSORS + 4 :]
    now, need, whole, rows = options[6] != "none", options[NEED], Replicate(), Shard(0)
    places = lambda p: [None if t is None else p if by_row else whole for t, by_row in zip(tensors, _BY_ROW)]  # noqa: E731
    nothing = [None] * len(options)
    rules = [([whole] * 3, [whole, *places(whole), *[whole] * 4, *nothing])]
    if tensors[0].ndim > 1:
        outputs = [p if needed else whole for p, needed in zip((rows, Partial(), Partial()), need)]
        saved = [*outputs, whole] if now else [whole] * 4
        rules.append((outputs, [whole if now else rows, *places(rows), *saved, *nothing]))
    return rules


OP.sharding(_shard_forward, _shard_backward)


def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    logits_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """kl_div of F.linear(student_hidden, student_weight, student_bias) and the teacher's, a chunk of rows at a time.

        z = scale (hidden weight^T + bias);   z = softcap tanh(z / softcap) if given        of either
        q = softmax(z_student / temperature), p = softmax(z_teacher / temperature);   loss_i by `beta`, as in kl_div:
        KL(p || q) for 0, KL(q || p) for 1, between them beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q,
        so that beta 0.5 is the Jensen-Shannon divergence. There is no factor temperature^2.

    Args:
        student_hidden: [..., D_s], fp16, bf16 or fp32 (fp64 too on reference and torch), any strides.
        student_weight: [V, D_s], any float dtype; products are in student_hidden's dtype, to which it is cast once per call.
        teacher_hidden: [..., D_t], the same rows; the width and the dtype may differ. Everything of the teacher is a constant.
        teacher_weight: [V, D_t], the same classes: cut both to those they share.
        student_bias, teacher_bias: [V] or None, cast like the weights.
        beta, temperature, mask, reduction: as in kl_div (mask [...] bool: True where a row counts). student_hidden of the others
            must be finite: NaN or inf there makes student_weight's gradient NaN. The teacher's may hold anything.
        student_scale, teacher_scale: factor of the logits (Cohere, Granite).
        student_softcap, teacher_softcap: bound of the logits (Gemma 2), or None.
        token_weight: [...] float, multiplies each row's loss; for "mean" and "sum" a constant, folded in before rows are summed.
        denominator: what the mean divides by instead of the number of rows that count, a constant; a number > 0 or a 0-d tensor,
            for which 0 gives 0.
        logits_bytes: bytes of logits held at a time, both models' together; None is 512 MiB on a GPU and 64 MiB on the CPU.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        The loss in fp32 (fp64 for fp64 student_hidden): 0-d, or [...] for "none". A mean without a row that counts is 0 with zero
        gradients. Under autocast the products are in autocast's dtype and the loss stays fp32.

    For "mean" and "sum" the forward computes the gradients too, if any is required: four products in all, one of them the
    teacher's. The backward scales them in place and hands them over; a further backward over the same graph (retain_graph) makes
    them anew, to the same bits. "none" makes both models' logits anew in the backward (six products). The weight's gradient is
    summed over chunks in fp32 and returned in its own dtype. No host sync, deterministic, inputs are not overwritten.

    Memory at its peak, beyond inputs: the logits, student_hidden's gradient, and student_weight's once, in the dtype of its
    sum: the gradient of a 16-bit weight is rounded within an fp32 sum's storage and keeps that memory. Under torch.compile and
    DTensor gradients and their scaled copies coexist.

    Raises:
        ValueError: shapes that do not fit, a number out of range, an unknown reduction, an unknown or unsupported backend.
        TypeError: a tensor not floating point, mask not bool.

    Backends: triton (compute capability >= 8.0), torch (the CPU default), reference (holds all logits).
    Papers: GKD, arXiv:2306.13649; Liger Kernel, arXiv:2410.10989.
    """
    _check(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    rows_shape = student_hidden.shape[:-1]
    check_options("linear_kl_div", rows_shape, beta, temperature, mask, token_weight, reduction, denominator)
    checks.check_logits("linear_kl_div", student_scale, student_softcap, logits_bytes, "student_")
    checks.check_logits("linear_kl_div", teacher_scale, teacher_softcap, whose="teacher_")
    mask = checks.ordinary(mask)
    after = token_weight if reduction == "none" else None  # there autograd can differentiate by it, as in kl_div
    if reduction != "none":
        checks.check_constant("linear_kl_div", "token_weight", token_weight, rows_shape)
    if reduction == "mean":
        if denominator is None:
            denominator = max(rows_shape.numel(), 1) if mask is None else mask.sum()
        denominator = checks.mean_denominator(denominator, student_hidden, None, None, None)
    dtype = autocast_dtype(student_hidden)
    if dtype is not None and student_hidden.dtype != torch.float64:
        student_hidden, teacher_hidden = student_hidden.to(dtype), teacher_hidden.to(dtype)
    number = lambda x: None if x is None else float(x)  # noqa: E731
    teacher = (None if t is None else t.detach() for t in (teacher_hidden, teacher_weight, teacher_bias))
    tensors = student_hidden, student_weight, student_bias, *teacher, mask
    token_weight = None if after is not None else token_weight
    backend = OP.choose(backend, *tensors, token_weight)
    if backend not in OP.plain_forms:
        token_weight, denominator, reduction = checks.bounded(
            student_hidden, mask, token_weight, None, denominator, reduction
        )
    tensors = *tensors, token_weight, denominator
    options = (float(beta), float(temperature), float(student_scale), number(student_softcap), float(teacher_scale),
               number(teacher_softcap), reduction, logits_bytes)  # fmt: skip
    if backend in OP.plain_forms:
        loss = OP.plain(backend, *tensors, *options)
    else:
        loss = _call(tensors, options, backend)
    return loss if after is None else reduced(loss, mask, after, "none", None)


def _check(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias):
    name = "linear_kl_div"
    for who, h, w, b in (("student", hidden, weight, bias), ("teacher", teacher_hidden, teacher_weight, teacher_bias)):
        for what, t in (("hidden", h), ("weight", w), ("bias", b)):
            if t is not None and not t.is_floating_point():
                raise TypeError(f"{name}: {who}_{what} must be floating point, got {t.dtype}")
        if w.ndim != 2 or w.shape[0] == 0:
            raise ValueError(f"{name}: {who}_weight must be [V, D] with at least one class, got {list(w.shape)}")
        if h.ndim == 0 or h.shape[-1] != w.shape[1]:
            raise ValueError(
                f"{name}: {who}_hidden must be [..., {w.shape[1]}] like its weight's rows, got {list(h.shape)}"
            )
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(f"{name}: {who}_bias must be [{w.shape[0]}] like its weight's rows, got {list(b.shape)}")
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{name}: student and teacher must have the same classes, got {weight.shape[0]} and {teacher_weight.shape[0]}; "
            "cut both weights to the ones they share"
        )
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: teacher_hidden must have student_hidden's rows {list(hidden.shape[:-1])}, "
            f"got {list(teacher_hidden.shape[:-1])}"
        )
