"""Log probabilities, log-sum-exp and entropy of a linear layer's logits, without ever holding all of them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels import chunked_loss
from fastlm.ops import loss_checks as checks
from fastlm.ops._op import Op
from fastlm.ops._tensor import autocast_dtype, compute_dtype, grad_of
from fastlm.ops.loss_rows import gradient, statistics
from fastlm.ops.softcap import capped

_SMALL = 1 << 15  # logits up to which the CPU takes torch's own calls, of which autograd makes fewer than _Kept


class LogProbs(NamedTuple):
    """What linear_logprobs returns, each [...] like target: fp32 (fp64 for fp64 input), but hit is bool."""

    logp: Tensor  # log probability of the target
    lse: Tensor  # log-sum-exp of the logits
    entropy: Tensor  # of the distribution over the classes, in nats
    hit: Tensor  # whether the target's logit is the largest (or equal to it)


def _logits(hidden, weight, bias, dtype, scale, softcap):
    hidden, weight, bias = (None if t is None else t.to(dtype) for t in (hidden, weight, bias))
    z = F.linear(hidden, weight, bias).to(compute_dtype(hidden))
    if scale != 1:
        z = z * scale
    return z if softcap is None else capped(z, softcap)


def _outputs(z, logp, lse, below, target, ignore_index):
    """LogProbs from logits, all log probabilities, and lse - z with finite values for classes of probability 0."""
    index = target.clamp(0, z.shape[-1] - 1)
    pick = lambda t: t.gather(-1, index.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    live, valid = target != ignore_index, (target >= 0) & (target < z.shape[-1])
    found = pick(logp), lse, (logp.exp() * below).sum(-1)
    hit = (pick(z) >= z.amax(-1)) & live & valid
    return LogProbs(*(t.where(valid, torch.nan).where(live, 0) for t in found), hit)


def _reference(hidden, weight, bias, target, ignore_index, scale, softcap, *_):
    z = _logits(hidden, weight, bias, compute_dtype(hidden), scale, softcap)
    logp, lse = z.log_softmax(-1), z.logsumexp(-1)  # not z - lse: a large lse would round the digits away
    return _outputs(z, logp, lse, -logp.masked_fill(z == -torch.inf, 0), target, ignore_index)


def _fusible(hidden, weight, bias, target, ignore_index, scale, softcap):
    """In torch's own calls: for torch.compile to fuse, and where a call's own time is what counts."""
    z = _logits(hidden, weight, bias, hidden.dtype, scale, softcap)
    logp = z.log_softmax(-1)
    peak, at = z.max(-1)
    lse = peak - logp.gather(-1, at.unsqueeze(-1)).squeeze(-1)
    return _outputs(z, logp, lse, logp.neg().clamp_(max=1000), target, ignore_index)


OP = Op(
    "linear_logprobs",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index, float scale, float? softcap,"
    " int? logits_bytes, str backend) -> (Tensor logp, Tensor lse, Tensor entropy, Tensor hit, Tensor saved)",
    "(Tensor? dlogp, Tensor? dlse, Tensor? dentropy, Tensor hidden, Tensor weight, Tensor? bias, Tensor target,"
    " Tensor entropy, Tensor saved, int ignore_index, float scale, float? softcap, int? logits_bytes, bool need_dhidden,"
    " bool need_dweight, bool need_dbias, str backend) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    kernels={
        "torch": (
            partial(chunked_loss.logprobs_forward, statistics),
            partial(chunked_loss.logprobs_backward, gradient),
        ),
        "triton": ("linear_logprobs:linear_logprobs_fwd", "linear_logprobs:linear_logprobs_bwd"),
    },
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _fake_forward(hidden, weight, bias, target, *rest):
    dtype = compute_dtype(hidden)
    each = [hidden.new_empty(target.shape, dtype=d) for d in (dtype, dtype, dtype, torch.bool)]
    return *each, hidden.new_empty((2, *target.shape), dtype=dtype)


def _fake_backward(dlogp, dlse, dentropy, hidden, weight, bias, target, entropy, saved, *rest):
    shapes = [t.shape if needed else (0,) for t, needed in zip((hidden, weight, weight[:, 0]), rest[-4:-1])]
    dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes))


OP.fake(_fake_forward, _fake_backward)


@OP.autograd
class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, *options):
        logp, lse, entropy, hit, saved = OP.below(hidden, weight, bias, target, *options)
        ctx.save_for_backward(hidden, weight, bias, target, entropy, saved)
        ctx.options = (*options[:-1], *ctx.needs_input_grad[:3], options[-1])
        ctx.mark_non_differentiable(hit, saved)
        ctx.set_materialize_grads(False)
        return logp, lse, entropy, hit, saved

    @staticmethod
    def backward(ctx, dlogp, dlse, dentropy, *_):
        nothing = (None,) * 6
        if dlogp is dlse is dentropy is None:
            return None, None, None, *nothing
        grads = OP.backward(dlogp, dlse, dentropy, *ctx.saved_tensors, *ctx.options)
        return *(g if needed else None for g, needed in zip(grads, ctx.options[-4:-1])), *nothing


@OP.backward_reference
def _backward_reference(dlogp, dlse, dentropy, hidden, weight, bias, target, entropy, saved, *options):
    dtype, need = compute_dtype(hidden), options[-4:-1]
    fn = lambda h, w, b: tuple(t.to(dtype) for t in OP.plain("reference", h, w, b, target, *options)[:3])  # noqa: E731
    grads = grad_of(fn, (hidden, weight, bias), (dlogp, dlse, dentropy))
    empty = _fake_backward(dlogp, dlse, dentropy, hidden, weight, bias, target, entropy, saved, False, False, False, "")
    return tuple(g if needed else e for g, e, needed in zip(grads, empty, need))


class _Kept(torch.autograd.Function):
    """The torch form where all logits fit the budget: kept for the backward, so three products in all."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, *options):
        ((_, logits),) = chunked_loss.Chunks(hidden, weight, bias, 1 << 62)
        flat = target.reshape(-1)
        stats = torch.empty((5, flat.shape[0]), dtype=compute_dtype(hidden), device=hidden.device)
        statistics(logits, flat, stats, False, *options[1:])
        *found, saved = chunked_loss.logprobs_of(stats, flat, weight.shape[0], options[0])
        found = [t.view(target.shape) for t in found]
        ctx.save_for_backward(hidden, weight, bias, target, found[2], saved, logits)
        ctx.options = options
        ctx.mark_non_differentiable(found[3])
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx, dlogp, dlse, dentropy, _):
        nothing, need = (None,) * 4, ctx.needs_input_grad[:3]
        if dlogp is dlse is dentropy is None:
            return None, None, None, *nothing
        *tensors, logits = ctx.saved_tensors
        options = *ctx.options, 1 << 62, *need
        if torch.is_grad_enabled():  # create_graph
            grads = _backward_reference(dlogp, dlse, dentropy, *tensors, *options, "torch")
        else:
            grads = chunked_loss.logprobs_backward(
                gradient, dlogp, dlse, dentropy, *tensors, *options, logits=logits.clone()
            )
        return *(g if needed else None for g, needed in zip(grads, need)), *nothing


def _shard_forward(hidden, weight, bias, target, *options):
    from torch.distributed.tensor import Replicate, Shard

    whole, nothing = Replicate(), [None] * len(options)
    head = [whole, None if bias is None else whole]
    rules = [([whole] * 5, [whole, *head, whole, *nothing])]
    if hidden.ndim > 1:
        rules.append(([Shard(0)] * 4 + [Shard(1)], [Shard(0), *head, Shard(0), *nothing]))
    return rules


def _shard_backward(dlogp, dlse, dentropy, hidden, weight, bias, target, entropy, saved, *options):
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, nothing, need = Replicate(), [None] * len(options), options[-4:-1]
    head = [whole, None if bias is None else whole]
    given = lambda p: [None if t is None else p for t in (dlogp, dlse, dentropy)]  # noqa: E731
    rules = [([whole] * 3, [*given(whole), whole, *head, *[whole] * 3, *nothing])]
    if hidden.ndim > 1:
        rows = Shard(0)
        outputs = [rows if need[0] else whole, *(Partial() if n else whole for n in need[1:])]
        rules.append((outputs, [*given(rows), rows, *head, rows, rows, Shard(1), *nothing]))
    return rules


OP.sharding(_shard_forward, _shard_backward)


def linear_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    logits_bytes: int | None = None,
    group=None,
    check: bool = False,
    backend: str = "auto",
) -> LogProbs:
    """Log probability of the target, log-sum-exp, entropy and hit of each row of a linear layer's logits, for any loss on them.

        z = scale (input linear_weight^T + linear_bias);   z = softcap tanh(z / softcap) if given
        lse = log sum_v exp(z_v);   p_v = exp(z_v - lse)
        logp = z_target - lse;   entropy = -sum_v p_v log p_v;   hit = z_target >= max_v z_v

    Differentiable in logp, lse and entropy together: dz = dlogp (onehot - p) + dlse p - dentropy p (log p + entropy). Losses on
    it are ordinary PyTorch (`mask` marks the tokens that count, `old` and `ref` are logp of other models):

        sft  = -(logp * mask).sum() / mask.sum()
        dpo  = -F.logsigmoid(beta * ((logp - ref)[chosen].sum(-1) - (logp - ref)[rejected].sum(-1))).mean()
        r    = (logp - old).exp()
        grpo = -(torch.minimum(r * a, r.clamp(1 - eps, 1 + eps) * a) * mask).sum() / mask.sum() - c * (entropy * mask).mean()

    Args:
        input: [..., D], fp16, bf16 or fp32 (fp64 too on reference and torch), any strides.
        linear_weight: [V, D], any float dtype; products are in input's dtype, to which it is cast once per call.
        target: [...], int64, the class of each row, already shifted.
        linear_bias: [V] or None, cast like linear_weight. -inf rules a class out, which then adds nothing to the entropy.
        scale: factor of the logits, e.g. 1 / temperature.
        softcap: bound of the logits (Gemma 2, arXiv:2408.00118), or None.
        ignore_index: rows with this target give 0 (False) in all and no gradient.
        logits_bytes: budget of the one logits buffer; None: 512 MiB on a GPU, 64 MiB on the CPU. At least a row is held.
        group: a torch.distributed ProcessGroup over which the vocabulary is divided, as in linear_cross_entropy.
        check: check the values of target on a GPU too, at the price of a wait.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        LogProbs(logp, lse, entropy, hit), each like target, in fp32 (fp64 for fp64 input); hit is bool.

    Under autocast the products are in autocast's dtype and the results stay fp32. The forward keeps only rows of numbers; the
    backward makes the logits anew (four products in all) and sums linear_weight's gradient in fp32. On the CPU logits that fit
    the budget are kept instead. Accurate near entropy 0 and for huge logits. No host sync: values of targets are checked on the
    CPU or with check=True; elsewhere a target outside [0, V) gives NaN. Deterministic.

    Raises:
        ValueError: shapes that do not fit, a checked target out of range, a number out of range, an unknown or unsupported
            backend. TypeError: input or linear_weight not floating point, target not int64.

    Backends: triton (compute capability >= 8.0), torch (the CPU default), reference (holds all logits).
    Papers: DPO, arXiv:2305.18290; GRPO, arXiv:2402.03300; the chunks, Liger Kernel, arXiv:2410.10989.
    """
    name = "linear_logprobs"
    checks.check_linear(name, input, linear_weight, linear_bias, target)
    checks.check_logits(name, scale, softcap, logits_bytes)
    checks.check_ignore_index(name, ignore_index)
    dtype = autocast_dtype(input)
    if dtype is not None and input.dtype != torch.float64:
        input = input.to(dtype)
    tensors = (input, linear_weight, linear_bias, target)
    options = (ignore_index, float(scale), None if softcap is None else float(softcap))
    if group is not None:
        from fastlm.ops import vocab_parallel

        return LogProbs(*vocab_parallel.linear_logprobs(*tensors, *options, logits_bytes, group, check, backend))
    checks.check_target_values(name, target, linear_weight.shape[0], ignore_index, check)
    backend = OP.choose(backend, *tensors)
    if backend in OP.plain_forms:
        return OP.plain(backend, *tensors, *options)
    if backend == "torch" and type(target) is Tensor and target.device.type == "cpu" and target.numel():
        budget = chunked_loss.LOGITS_BYTES["cpu"] if logits_bytes is None else logits_bytes
        if target.numel() * linear_weight.shape[0] * input.element_size() <= budget:
            if torch.compiler.is_compiling() or target.numel() * linear_weight.shape[0] <= _SMALL:
                return _fusible(*tensors, *options)
            with torch.autocast("cpu", enabled=False):
                return LogProbs(*_Kept.apply(*tensors, *options))
    return LogProbs(*OP.forward(*tensors, *options, logits_bytes, backend)[:4])
