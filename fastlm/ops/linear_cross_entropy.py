"""A linear layer and its cross entropy, without ever holding all logits."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels import chunked_loss
from fastlm.ops._op import Op, autocast_dtype, compute_dtype, grad_of, host_values

_SCRATCH_BYTES = 1 << 19
# Logits up to which the CPU takes torch's own two calls: chunks save nothing there, and their dozens of small torch calls
# cost half a millisecond (768 x 65: 0.74 against 1.25 ms with the backward; at 2048 x 1024 they are even).
_SMALL = 1 << 20


def _reference(hidden, weight, bias, target, ignore_index, label_smoothing, z_loss, softcap, reduction):
    dtype = compute_dtype(hidden)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(-1)
    live = target != ignore_index
    picked = logits.gather(-1, target.clamp(0, weight.shape[0] - 1).unsqueeze(-1)).squeeze(-1)
    loss = lse - (1 - label_smoothing) * picked
    if label_smoothing:  # else 0 times the -inf of a class that a bias rules out
        loss = loss - label_smoothing * logits.mean(-1)
    loss = loss + z_loss * lse.square()
    loss = loss.where((target >= 0) & (target < weight.shape[0]), torch.nan).where(live, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / live.sum().clamp(min=1)


def _torch_rows(logits, target, loss, row_scale, with_grad, ignore_index, label_smoothing, z_loss, softcap):
    """The `rows` function of kernels/chunked_loss.py in plain torch: few passes, each over rows that are in the cache."""
    rows, vocabulary = logits.shape
    index = target.clamp(0, vocabulary - 1).unsqueeze(1)
    column = loss.unsqueeze(1)
    ignored = target == ignore_index
    if with_grad:
        scale = (~ignored).to(loss.dtype) if row_scale is None else row_scale.masked_fill(ignored, 0)
        scale, hit = scale.unsqueeze(1), column.new_full((rows, 1), label_smoothing - 1)
    block = min(rows, max(1, _SCRATCH_BYTES // (vocabulary * loss.element_size())))
    scratch = torch.empty((block, vocabulary), dtype=loss.dtype, device=logits.device)
    for start in range(0, rows, block):
        here = slice(start, min(start + block, rows))
        z, at, out = logits[here], index[here], column[here]
        x = z.to(loss.dtype)
        if softcap is not None:
            x = torch.div(x, softcap).tanh_().mul_(softcap)
        p = (torch.softmax if with_grad else torch.log_softmax)(x, -1, out=scratch[: x.shape[0]])
        # log sum exp(x - peak): the largest probability is at least 1 / V, so its logarithm is good to rounding.
        excess = p.amax(-1, keepdim=True)
        excess = (excess.log_() if with_grad else excess).neg_()
        peak, picked = x.amax(-1, keepdim=True), x.gather(1, at)
        torch.sub(peak, picked, out=out).add_(excess)
        if label_smoothing:
            out.add_(picked - x.mean(-1, keepdim=True), alpha=label_smoothing)
        if z_loss:
            out.add_((peak + excess).square_(), alpha=z_loss)
        if not with_grad:
            continue
        # Added last: together with p it would round away what is left of p - 1 where p is close to 1.
        pull = p * (2 * z_loss * (peak + excess)) if z_loss else None
        if label_smoothing:
            p.sub_(label_smoothing / vocabulary)
        p.scatter_add_(1, at, hit[here])
        if pull is not None:
            p.add_(pull)
        if softcap is not None:
            p.mul_(x.div_(softcap).square_().neg_().add_(1))
        torch.mul(p, scale[here], out=z)
    loss.masked_fill_(index.squeeze(1) != target, torch.nan).masked_fill_(ignored, 0)


def _small(hidden, weight, bias, target, ignore_index, label_smoothing, reduction):
    """torch's own two calls, which hold all logits, with our meaning of dtypes and of a batch without a live row."""
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    logits, flat = logits.to(compute_dtype(hidden)).reshape(-1, weight.shape[0]), target.reshape(-1)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if reduction == "none":
        return F.cross_entropy(logits, flat, reduction="none", **options).view(target.shape)
    loss = F.cross_entropy(logits, flat, reduction="sum", **options)
    return loss if reduction == "sum" else loss / (target != ignore_index).sum().clamp(min=1)


def _scaled(t, factor):
    # The factor in fp32: torch would round a 0-d tensor to 16 bits first.
    wide = compute_dtype(t)
    return t * factor.to(wide) if t.dtype == wide else t.to(wide).mul_(factor).to(t.dtype)


OP = Op(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index, float label_smoothing, float z_loss,"
    " float? softcap, str reduction, bool need_dhidden, bool need_dweight, bool need_dbias, str backend)"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias, Tensor scale)",
    "(Tensor dloss, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor dhidden, Tensor dweight,"
    " Tensor dbias, Tensor scale, int ignore_index, float label_smoothing, float z_loss, float? softcap, str reduction,"
    " bool need_dhidden, bool need_dweight, bool need_dbias, str backend) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    kernels={
        "torch": (partial(chunked_loss.forward, _torch_rows), partial(chunked_loss.backward, _torch_rows, _scaled)),
        "triton": (
            "linear_cross_entropy:linear_cross_entropy_fwd",
            "linear_cross_entropy:linear_cross_entropy_bwd",
        ),
    },
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _empty_gradients(hidden, weight, bias, need):
    shapes = [t.shape if needed else (0,) for t, needed in zip((hidden, weight, weight[:, 0]), need)]
    dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes))


def _fake_forward(hidden, weight, bias, target, i, s, z, c, reduction, need_dhidden, need_dweight, need_dbias, backend):
    need = (need_dhidden, need_dweight, need_dbias) if reduction != "none" else (False, False, False)
    dtype = compute_dtype(hidden)
    loss = hidden.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    return loss, *_empty_gradients(hidden, weight, bias, need), hidden.new_empty((), dtype=dtype)


def _fake_backward(dloss, hidden, weight, bias, target, *rest):
    return _empty_gradients(hidden, weight, bias, rest[-4:-1])


OP.fake(_fake_forward, _fake_backward)


@OP.autograd
class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, *options):
        options = (*options[:-4], *ctx.needs_input_grad[:3], options[-1])
        loss, dhidden, dweight, dbias, scale = OP.below(hidden, weight, bias, target, *options)
        ctx.save_for_backward(hidden, weight, bias, target, dhidden, dweight, dbias, scale)
        ctx.options = options
        ctx.mark_non_differentiable(dhidden, dweight, dbias, scale)
        ctx.set_materialize_grads(False)
        return loss, dhidden, dweight, dbias, scale

    @staticmethod
    def backward(ctx, dloss, *_):
        nothing = (None,) * len(ctx.options)
        if dloss is None:
            return None, None, None, None, *nothing
        grads = OP.backward(dloss, *ctx.saved_tensors, *ctx.options)
        return *(g if needed else None for g, needed in zip(grads, ctx.options[-4:-1])), None, *nothing


@OP.backward_reference
def _backward_reference(dloss, hidden, weight, bias, target, dhidden, dweight, dbias, scale, *options):
    options, need, dtype = options[:5], options[5:8], compute_dtype(hidden)
    fn = lambda h, w, b: OP.plain("reference", h, w, b, target, *options).to(dtype)  # noqa: E731
    grads = grad_of(fn, (hidden, weight, bias), (dloss,))
    return tuple(
        g if needed else e for g, e, needed in zip(grads, _empty_gradients(hidden, weight, bias, (False,) * 3), need)
    )


def _shard_forward(
    hidden, weight, bias, target, i, s, z, c, reduction, need_dhidden, need_dweight, need_dbias, backend
):
    from torch.distributed.tensor import Partial, Replicate, Shard

    options = [None] * 9
    whole = Replicate()
    rules = [([whole] * 5, [whole, whole, None if bias is None else whole, whole, *options])]
    # A mean over the live rows of one part is no part of the mean: the public function asks for the sum.
    if hidden.ndim > 1 and reduction != "mean":
        rows, now = Shard(0), reduction != "none"
        outputs = [
            Partial() if now else rows,
            rows if now and need_dhidden else whole,
            Partial() if now and need_dweight else whole,
            Partial() if now and need_dbias else whole,
            whole,
        ]
        rules.append((outputs, [rows, whole, None if bias is None else whole, rows, *options]))
    return rules


def _shard_backward(dloss, hidden, weight, bias, target, dhidden, dweight, dbias, scale, i, s, z, c, reduction,
                    need_dhidden, need_dweight, need_dbias, backend):  # fmt: skip
    from torch.distributed.tensor import Partial, Replicate, Shard

    options = [None] * 9
    whole = Replicate()
    none_or_whole = None if bias is None else whole
    rules = [([whole] * 3, [whole, whole, whole, none_or_whole, *[whole] * 5, *options])]
    if hidden.ndim > 1 and reduction != "mean":
        rows, now = Shard(0), reduction != "none"
        outputs = [rows if need_dhidden else whole, *(Partial() if n else whole for n in (need_dweight, need_dbias))]
        saved = [*outputs, whole] if now else [whole] * 4
        rules.append((outputs, [whole if now else rows, rows, whole, none_or_whole, rows, *saved, *options]))
    return rules


OP.sharding(_shard_forward, _shard_backward)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """F.cross_entropy(F.linear(hidden, weight, bias), target), with the logits of a chunk of rows at a time.

        z = hidden weight^T + bias;   z = softcap * tanh(z / softcap) if given;   lse = log sum_v exp(z_v)
        loss = lse - (1 - label_smoothing) z_target - label_smoothing * mean_v z_v + z_loss * lse^2

    Args:
        hidden: [..., D], fp16, bf16 or fp32 (fp64 too on reference and torch), any strides.
        weight: [V, D], any float dtype; products are in hidden's dtype, to which it is cast once per call.
        target: [...], int64, the class of each row, already shifted.
        bias: [V] or None, cast like weight.
        ignore_index: rows with this target add nothing to loss, gradients or the count of live rows.
        label_smoothing: share of the target mass spread evenly over all classes, in [0, 1].
        z_loss: coefficient of lse^2, which keeps the logits from drifting (PaLM, arXiv:2204.02311).
        softcap: bound of the logits (Gemma 2, arXiv:2408.00118), or None.
        reduction: "mean" over live rows, "sum", or "none". Without a live row the mean is 0 with zero gradients (torch: NaN).
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        The loss in fp32 (fp64 for fp64 hidden): 0-d, or target's shape for "none".

    Under autocast the products are in autocast's dtype and the loss stays fp32. For "mean" and "sum" the forward computes the
    gradients too, if any is required (three products in all), and the backward scales them; "none" recomputes the logits in
    the backward (four products). The weight's gradient is summed over chunks in fp32 and returned in weight's dtype. No host
    sync: values of targets are checked on the CPU only; elsewhere a target outside [0, V) gives a NaN loss. Deterministic.

    Raises:
        ValueError: shapes that do not fit, a target out of range (CPU), an unknown reduction or a number out of range, an
            unknown or unsupported backend. TypeError: hidden or weight not floating point, target not int64.

    Backends: triton (compute capability >= 8.0), torch (the CPU default), reference (holds all logits). Memory beyond inputs
    and gradients: 512 MiB of logits on a GPU, 64 MiB on the CPU (where torch does up to a million logits by its own means).
    Papers: Liger Kernel, arXiv:2410.10989; label smoothing,
    arXiv:1512.00567.
    """
    _check(hidden, weight, target, bias, ignore_index, label_smoothing, z_loss, softcap, reduction)
    if reduction == "mean" and type(hidden).__name__ == "DTensor":
        options = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
        }
        total = linear_cross_entropy(hidden, weight, target, bias=bias, reduction="sum", backend=backend, **options)
        return total / (target != ignore_index).sum().clamp(min=1)
    dtype = autocast_dtype(hidden)
    if dtype is not None and hidden.dtype != torch.float64:
        hidden = hidden.to(dtype)
    options = (
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        None if softcap is None else float(softcap),
        reduction,
    )
    backend = OP.choose(backend, hidden, weight, bias, target)
    if backend in OP.plain_forms:
        return OP.plain(backend, hidden, weight, bias, target, *options)
    on_cpu = type(target) is Tensor and target.device.type == "cpu"
    few = target.numel() * weight.shape[0] <= _SMALL and not z_loss and softcap is None
    if backend == "torch" and on_cpu and few:
        return _small(hidden, weight, bias, target, ignore_index, label_smoothing, reduction)
    grad = torch.is_grad_enabled()
    need = (grad and t is not None and t.requires_grad for t in (hidden, weight, bias))
    return OP.forward(hidden, weight, bias, target, *options, *need, backend)[0]


def _check(hidden, weight, target, bias, ignore_index, label_smoothing, z_loss, softcap, reduction):
    name = "linear_cross_entropy"
    for what, t in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{name}: {what} must be floating point, got {t.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"{name}: target must be int64 class numbers, got {target.dtype}")
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"{name}: weight must be [V, D] with at least one class, got {list(weight.shape)}")
    if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden must be [..., {weight.shape[1]}] like weight's rows, got {list(hidden.shape)}"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: target must be {list(hidden.shape[:-1])} like hidden's rows, got {list(target.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be [{weight.shape[0]}] like weight's rows, got {list(bias.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"{name}: z_loss must be >= 0, got {z_loss}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name}: softcap must be > 0 or None, got {softcap}")
    if type(target) is Tensor and target.device.type == "cpu" and target.numel():
        outside = target.clamp(0, weight.shape[0] - 1) != target
        if host_values(outside.any()) and (outside & (target != ignore_index)).any():
            raise ValueError(
                f"{name}: target must be in [0, {weight.shape[0]}) or ignore_index={ignore_index}, "
                f"got {target[outside & (target != ignore_index)][0].item()}"
            )
