"""A linear layer and its cross entropy, without ever holding all logits."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels import chunked_loss
from fastlm.ops import loss_checks as checks
from fastlm.ops._op import Op
from fastlm.ops._tensor import autocast_dtype, compute_dtype, host_values
from fastlm.ops.cross_entropy import without_bad_rows
from fastlm.ops.loss_gradients import NEED, empty_gradients, scaled, wire
from fastlm.ops.loss_rows import cross_entropy_rows
from fastlm.ops.softcap import capped

# Logits up to which the CPU takes torch's own two calls: chunks save nothing there, and their dozens of small torch calls
# cost half a millisecond (768 x 65: 0.74 against 1.25 ms with the backward; at 2048 x 1024 they are even).
_SMALL = 1 << 21


def _reference(hidden, weight, bias, target, token_weight, class_weight, denominator, ignore_index, label_smoothing, z_loss,
               scale, softcap, reduction, *_):  # fmt: skip
    dtype = compute_dtype(hidden)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)) * scale
    live = target != ignore_index
    logits = logits.masked_fill(~live.unsqueeze(-1), 0)  # they may have overflowed
    if softcap is not None:
        logits = capped(logits, softcap)
    terms = -logits.log_softmax(-1)  # lse - logits, of which a large lse would round the digits away
    index = target.clamp(0, weight.shape[0] - 1)
    loss = terms.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    w = None if class_weight is None else class_weight.to(dtype)
    if w is not None:
        loss = loss * w[index]
    loss = loss * (1 - label_smoothing)
    if label_smoothing:  # else 0 times the -inf of a class that a bias rules out
        loss = loss + label_smoothing * (terms if w is None else terms * w).mean(-1)
    if z_loss:  # else 0 times the square of an lse beyond 1.8e19
        loss = loss + z_loss * logits.logsumexp(-1).square()
    loss = loss.where((target >= 0) & (target < weight.shape[0]), torch.nan)
    if token_weight is not None:
        loss = loss * token_weight.to(dtype)
    loss = loss.where(live, 0)
    return chunked_loss.reduced(loss, target, None, denominator, ignore_index, reduction)


def _small(hidden, weight, bias, target, token_weight, class_weight, denominator, ignore_index, label_smoothing, scale,
           reduction):  # fmt: skip
    """torch's own two calls, which hold all logits, with our meaning of dtypes and of a batch without a live row."""
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    if hidden.dtype == torch.float16 and logits.requires_grad:
        logits = without_bad_rows(logits, target, ignore_index)
    logits = logits.to(compute_dtype(hidden))
    logits, flat = (logits, target) if target.ndim == 1 else (logits.reshape(-1, weight.shape[0]), target.reshape(-1))
    if scale != 1:
        logits = logits * scale
    w = None if class_weight is None else class_weight.to(logits.dtype)
    call = partial(F.cross_entropy, logits, flat, w, ignore_index=ignore_index, label_smoothing=label_smoothing)
    if reduction == "none" or token_weight is not None:
        loss = call(reduction="none")
        if token_weight is not None:
            loss = loss * token_weight.reshape(-1).to(loss.dtype).masked_fill(flat == ignore_index, 0)
        if reduction == "none":
            return loss.view(target.shape)
        loss = loss.sum()
    elif reduction == "mean" and w is denominator is None and host_values((flat != ignore_index).any()):
        return call()
    else:
        loss = call(reduction="sum")
    if reduction == "sum":
        return loss
    denominator = checks.mean_denominator(denominator, hidden, target, class_weight, ignore_index)
    return loss * chunked_loss.inverse(denominator, loss.dtype)


OP = Op(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? token_weight, Tensor? class_weight,"
    " Tensor? denominator, int ignore_index, float label_smoothing, float z_loss, float scale, float? softcap,"
    " str reduction, bool narrow, int? logits_bytes, bool need_dhidden, bool need_dweight, bool need_dbias, str backend)"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias, Tensor left)",
    "(Tensor dloss, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? token_weight,"
    " Tensor? class_weight, Tensor? denominator, Tensor dhidden, Tensor dweight, Tensor dbias, Tensor left, int ignore_index,"
    " float label_smoothing, float z_loss, float scale, float? softcap, str reduction, bool narrow, int? logits_bytes,"
    " bool need_dhidden, bool need_dweight, bool need_dbias, str backend) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    kernels={
        "torch": (
            partial(chunked_loss.forward, cross_entropy_rows),
            partial(chunked_loss.backward, cross_entropy_rows, scaled),
        ),
        "triton": (
            "linear_cross_entropy:linear_cross_entropy_fwd",
            "linear_cross_entropy:linear_cross_entropy_bwd",
        ),
    },
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _fake_forward(hidden, weight, bias, target, *rest):
    reduction, need = rest[8], rest[NEED]
    need = need if reduction != "none" else (False, False, False)
    dtype = compute_dtype(hidden)
    loss = hidden.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    return loss, *empty_gradients(hidden, weight, bias, need), hidden.new_empty((), dtype=dtype)


def _fake_backward(dloss, hidden, weight, bias, target, *rest):
    return empty_gradients(hidden, weight, bias, rest[NEED])


OP.fake(_fake_forward, _fake_backward)
_TENSORS = 7  # hidden, weight, bias, target, token_weight, class_weight, denominator; then the options
_call = wire(OP, _TENSORS)


def _shard_forward(hidden, weight, bias, target, token_weight, class_weight, denominator, *options):
    from torch.distributed.tensor import Partial, Replicate, Shard

    reduction, (need_dhidden, need_dweight, need_dbias) = options[5], options[NEED]
    whole, nothing = Replicate(), [None] * len(options)
    at = lambda *pairs: [None if t is None else p for t, p in pairs]  # noqa: E731
    inputs = lambda rows: at(  # noqa: E731
        (hidden, rows), (weight, whole), (bias, whole), (target, rows), (token_weight, rows), (class_weight, whole),
        (denominator, whole),
    )  # fmt: skip
    rules = [([whole] * 5, [*inputs(whole), *nothing])]
    if hidden.ndim > 1:
        rows, now = Shard(0), reduction != "none"
        outputs = [
            Partial() if now else rows,
            rows if now and need_dhidden else whole,
            Partial() if now and need_dweight else whole,
            Partial() if now and need_dbias else whole,
            whole,
        ]
        rules.append((outputs, [*inputs(rows), *nothing]))
    return rules


def _shard_backward(dloss, *args):
    from torch.distributed.tensor import Partial, Replicate, Shard

    tensors, options = args[:_TENSORS], args[_TENSORS + 4 :]
    reduction, (need_dhidden, need_dweight, need_dbias) = options[5], options[NEED]
    whole, nothing = Replicate(), [None] * len(options)
    inputs = lambda rows: [  # noqa: E731
        None if t is None else rows if by_row else whole
        for t, by_row in zip(tensors, (True, False, False, True, True, False, False))
    ]
    rules = [([whole] * 3, [whole, *inputs(whole), *[whole] * 4, *nothing])]
    if tensors[0].ndim > 1:
        rows, now = Shard(0), reduction != "none"
        outputs = [rows if need_dhidden else whole, *(Partial() if n else whole for n in (need_dweight, need_dbias))]
        saved = [*outputs, whole] if now else [whole] * 4
        rules.append((outputs, [whole if now else rows, *inputs(rows), *saved, *nothing]))
    return rules


OP.sharding(_shard_forward, _shard_backward)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    weight_grad_dtype: torch.dtype | None = None,
    logits_bytes: int | None = None,
    group=None,
    check: bool = False,
    backend: str = "auto",
) -> Tensor:
    """F.cross_entropy(F.linear(input, linear_weight, linear_bias), target), with the logits of a chunk of rows at a time.

        z = scale (input linear_weight^T + linear_bias);   z = softcap tanh(z / softcap) if given;   lse = log sum_v exp(z_v)
        loss_i = (1 - e) w_y (lse - z_y) + e / V sum_v w_v (lse - z_v) + z_loss lse^2     y: target, e: label_smoothing
        loss_i = token_weight_i loss_i;   0 where the target is ignored

    Args:
        input: [..., D], fp16, bf16 or fp32 (fp64 too on reference and torch), any strides.
        linear_weight: [V, D], any float dtype (triton: none of fp64 among input, linear_weight and linear_bias); products are in
            input's dtype, to which it is cast once per call.
        target: [...], int64, the class of each row, already shifted.
        linear_bias: [V] or None, cast like linear_weight.
        weight: [V], class weights w (None: ones), a constant.
        reduction: "mean", "sum" or "none". The mean divides by `denominator`, else, as torch does, by the sum of class weights
            of live targets: their number without class weights. Token weights do not enter it. Dividing by 0 gives 0 with
            zero gradients (torch: NaN).
        ignore_index: rows with this target add nothing to loss, gradients or denominator. None means -100. Their input must be
            finite all the same: the product with it makes linear_weight's gradient NaN otherwise (their logits may overflow).
        label_smoothing: e, share of the target mass spread evenly over all classes, in [0, 1].
        scale: factor of the logits, e.g. 1 / temperature.
        softcap: bound of the logits (Gemma 2, arXiv:2408.00118), or None.
        z_loss: coefficient of lse^2, which keeps the logits from drifting (PaLM, arXiv:2204.02311).
        token_weight: [...] like target, any real numbers (advantages may be negative), a constant.
        denominator: what "mean" divides by, a number or a 0-d tensor (never read on the host), a constant: the number of
            tokens of a whole accumulated batch, say.
        weight_grad_dtype: dtype in which linear_weight's gradient is summed over chunks: None for fp32, or torch.bfloat16 (for
            bf16 products), which takes 2 V D bytes less and rounds at every chunk. It is returned in linear_weight's dtype.
        logits_bytes: budget of the one logits buffer; None: 512 MiB on a GPU, 64 MiB on the CPU. At least a row is held.
        group: a torch.distributed ProcessGroup over which the vocabulary is divided: linear_weight, linear_bias and weight are
            then this rank's rows, contiguous blocks in rank order, input and target whole on every rank. See below.
        check: check the values of target on a GPU too, at the price of a wait.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        The loss in fp32 (fp64 for fp64 input): 0-d, or target's shape for "none".

    Under autocast the products are in autocast's dtype and the loss stays fp32. For "mean" and "sum" the forward computes the
    gradients too, if any is required (three products in all), token weights and denominator folded in; the backward scales
    them in place and hands them over. A further backward over the same graph (retain_graph) makes them anew, to the same bits.
    "none" recomputes the logits in the backward (four products). No host sync: values of targets are checked on the CPU or with
    check=True; elsewhere a target outside [0, V) gives a NaN loss. Deterministic.

    Memory at its peak, beyond inputs: logits buffer, input's gradient, and linear_weight's once, in the dtype of its sum. A sum
    in fp32 is rounded to a 16-bit weight within its own storage, so that gradient keeps the sum's memory; a sum of one chunk
    only has the weight's dtype from the start. Under torch.compile and DTensor gradients and their scaled copies coexist. On
    the CPU up to two million logits are left to torch's own calls, which hold them all.

    Over a group every rank gets the whole loss, input's whole gradient and those of its own rows, by two all-reduces of row
    statistics and one of input's gradient; all ranks must call alike: each with at least a class (0 rows of linear_weight
    raise, and the other ranks wait), and input requiring grad on all or on none (else some wait for its sum). Logits beyond
    logits_bytes are made a second time (four products). Reference: gather the weights. Not for torch.compile, DTensor or
    derivatives of second order.

    Raises:
        ValueError: shapes that do not fit, a checked target out of range, an unknown reduction or a number out of range, a
            constant that requires grad, a denominator without "mean", an unknown or unsupported backend. TypeError: input or
            linear_weight not floating point, target not int64.

    Backends: triton (compute capability >= 8.0), torch (the CPU default), reference (holds all logits).
    Papers: Liger Kernel, arXiv:2410.10989; label smoothing, arXiv:1512.00567; vocabulary-parallel loss, arXiv:1909.08053.
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    _check(input, linear_weight, target, linear_bias, weight, token_weight, denominator, reduction, label_smoothing,
           z_loss, weight_grad_dtype)  # fmt: skip
    checks.check_logits("linear_cross_entropy", scale, softcap, logits_bytes)
    checks.check_ignore_index("linear_cross_entropy", ignore_index)
    dtype = autocast_dtype(input)
    if dtype is not None and input.dtype != torch.float64:
        input = input.to(dtype)
    narrow = weight_grad_dtype == torch.bfloat16
    if narrow and input.dtype != torch.bfloat16:
        raise ValueError(
            f"linear_cross_entropy: weight_grad_dtype=bfloat16 needs products in bfloat16, got {input.dtype} input"
        )
    options = (
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        float(scale),
        None if softcap is None else float(softcap),
    )
    if group is not None:
        from fastlm.ops import vocab_parallel

        return vocab_parallel.linear_cross_entropy(
            input, linear_weight, linear_bias, target, token_weight, weight, denominator, *options, reduction, narrow,
            logits_bytes, group, check, backend,
        )  # fmt: skip
    tensors = (input, linear_weight, linear_bias, target, token_weight, weight)
    backend = OP.choose(backend, *tensors[:4])
    few = target.numel() * linear_weight.shape[0] <= _SMALL and not z_loss and softcap is None
    if backend == "torch" and few and type(target) is Tensor and target.device.type == "cpu":
        try:
            return _small(*tensors, denominator, ignore_index, label_smoothing, options[3], reduction)
        except IndexError:  # torch has looked at the targets; what is wrong with them is said below
            pass
    checks.check_target_values("linear_cross_entropy", target, linear_weight.shape[0], ignore_index, check)
    if reduction == "mean":
        denominator = checks.mean_denominator(denominator, input, target, weight, ignore_index)
    if backend in OP.plain_forms:
        return OP.plain(backend, *tensors, denominator, *options, reduction)
    if input.dtype == torch.float16:
        peak = None if weight is None else weight.abs().amax()
        token_weight, denominator, reduction = checks.bounded(
            input, target != ignore_index, token_weight, peak, denominator, reduction
        )
    tensors = (input, linear_weight, linear_bias, target, token_weight, weight, denominator)
    return _call(tensors, (*options, reduction, narrow, logits_bytes), backend)


def _check(input, linear_weight, target, linear_bias, weight, token_weight, denominator, reduction, label_smoothing, z_loss,
           weight_grad_dtype):  # fmt: skip
    name = "linear_cross_entropy"
    checks.check_linear(name, input, linear_weight, linear_bias, target)
    checks.check_constant(name, "weight", weight, linear_weight.shape[:1])
    checks.check_constant(name, "token_weight", token_weight, target.shape)
    checks.check_loss_options(name, reduction, label_smoothing, z_loss)
    checks.check_denominator(name, denominator, reduction, zero=True)
    if weight_grad_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"{name}: weight_grad_dtype must be None, torch.float32 or torch.bfloat16, got {weight_grad_dtype}"
        )
