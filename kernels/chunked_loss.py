"""The loop over row chunks that every loss on top of a linear layer shares. Plain torch: it runs on any device.

Logits exist for one chunk of rows at a time, in one buffer that is used again for the next chunk. A `rows` function turns a
chunk's logits into losses and, in place, into the gradient with respect to them; two products then spend that gradient
before the buffer is overwritten. So the gradient costs three products in all and no second look at the logits (the idea of
Liger Kernel's fused loss, arXiv:2410.10989).

    rows(logits, target, loss, row_scale, class_weight, class_sum, with_grad, ignore_index, label_smoothing, z_loss, scale,
         softcap)
        logits [R, V], of unit stride along V, is overwritten by d(sum_r row_scale[r] * loss[r]) / d(logits) if with_grad;
        row_scale [R] fp32 or None for ones; loss [R] is written; class_weight [V] fp32 and its sum (0-d), or None twice.
        Rows whose target is ignored get 0 in both. Columns up to the row stride may be overwritten with anything.
"""

from __future__ import annotations

import torch

# Bytes of logits held at a time. On the CPU one chunk is the fastest (1024 x 8192 in fp32, two cores: 113 ms in one or two
# chunks, 131 in four); on a GPU larger chunks only cost memory once a product fills it.
LOGITS_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
# Elements a row of logits is padded to a multiple of. On a GPU neither a product nor a kernel can use 16-byte accesses on
# rows of, say, 50,257 elements; torch's softmax on the CPU wants them without gaps.
ROW_MULTIPLE = {"cpu": 1, "cuda": 16}
_PART = 1 << 18  # elements of an intermediate result


def kind_of(device):
    return "cpu" if device.type == "cpu" else "cuda"


def chunk_rows(n, width, itemsize, device, logits_bytes=None):
    """Rows per chunk: what the budget (None: LOGITS_BYTES) allows, evened out so that the last chunk is about as long as the
    others."""
    budget = LOGITS_BYTES[kind_of(device)] if logits_bytes is None else logits_bytes
    most = max(1, budget // (width * itemsize))
    if most >= n:
        return max(n, 1)
    step = 1 if most < 128 else 128  # whole tiles of a product
    most = most // step * step
    chunks = -(-n // most)
    return min(most, -(-n // (chunks * step)) * step)


def compute_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


def logits_of(h, weight, bias, out):
    return torch.mm(h, weight.t(), out=out) if bias is None else torch.addmm(bias, h, weight.t(), out=out)


def add_product(total, a, b, first):
    """total = a b, or total += a b, in total's dtype."""
    if total.dtype == a.dtype:
        return torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    if total.device.type == "cpu":  # has no 16-bit product with an fp32 result
        # Nor a mixed sum without an fp32 copy: parts that are small, and in the cache.
        rows = max(1, _PART // max(b.shape[1], 1))
        for out, factor in zip(total.split(rows), a.split(rows)):
            part = torch.mm(factor, b)
            out.copy_(part) if first else out.add_(part)
        return total
    if first:
        return torch.mm(a, b, out_dtype=total.dtype, out=total)
    return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def narrowed(t, dtype):
    """t [any shape, contiguous] in `dtype`. From 32 to 16 bits within t's own storage, which the result keeps: a copy would hold
    three times the result's bytes at once. Every block is as long as all before it, so what it overwrites has been read."""
    if 2 * dtype.itemsize != t.dtype.itemsize:
        return t.to(dtype)
    n, source = t.numel(), t.view(-1)
    result = source.view(dtype)[:n]
    done = min(n, _PART)
    result[:done] = source[:done].to(dtype)
    while done < n:
        stop = min(n, 2 * done)
        result[done:stop] = source[done:stop]
        done = stop
    return result.view(t.shape)


class Chunks:
    """Iterating gives (slice of rows, their logits) until all rows of hidden are through; logits share one buffer."""

    def __init__(self, hidden, weight, bias, logits_bytes=None):
        self.h = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])  # not -1: there may be no column
        self.weight = weight.to(self.h.dtype)  # once per call, not once per chunk
        self.bias = None if bias is None else bias.to(self.h.dtype)
        n, vocabulary = self.h.shape[0], weight.shape[0]
        multiple = ROW_MULTIPLE[kind_of(self.h.device)]
        width = -(-vocabulary // multiple) * multiple
        self.step = chunk_rows(n, width, self.h.element_size(), self.h.device, logits_bytes)
        self.count = -(-n // self.step)
        self.shape = (min(self.step, n), width)

    def __iter__(self):
        n, vocabulary = self.h.shape[0], self.weight.shape[0]
        buffer = torch.empty(self.shape, dtype=self.h.dtype, device=self.h.device)[:, :vocabulary]
        for start in range(0, n, self.step):
            here = slice(start, min(start + self.step, n))
            yield here, logits_of(self.h[here], self.weight, self.bias, buffer[: here.stop - start])


class Gradients:
    """Gradients of hidden, weight and bias, gathered chunk by chunk; an empty tensor for each that is not needed.

    narrow: sum the weight's gradient over chunks in h's dtype.
    """

    def __init__(self, h, weight, bias, chunks, need, narrow=False):
        self.need_dh, self.need_dw, self.need_db = need
        wide = compute_dtype(h.dtype)
        self.weight_dtype = weight.dtype
        self.bias_dtype = weight.dtype if bias is None else bias.dtype
        # A sum over chunks rounded to 16 bits at every chunk loses small terms: fp32 where there is more than one.
        sum_dtype = h.dtype if narrow or (chunks == 1 and weight.dtype == h.dtype) else wide
        self.dh = torch.empty(h.shape if self.need_dh else 0, dtype=h.dtype, device=h.device)
        self.dw = torch.empty(weight.shape if self.need_dw else 0, dtype=sum_dtype, device=h.device)
        self.db = torch.zeros(weight.shape[0] if self.need_db else 0, dtype=wide, device=h.device)
        if h.shape[0] == 0:
            self.dw.zero_()

    def add(self, dlogits, h, weight, start):
        if self.need_dh:
            torch.mm(dlogits, weight, out=self.dh[start : start + h.shape[0]])
        if self.need_dw:
            add_product(self.dw, dlogits.t(), h, start == 0)
        if self.need_db:
            self.db += dlogits.sum(0, dtype=self.db.dtype)

    def result(self, shape):
        dh = self.dh.view(shape) if self.need_dh else self.dh
        return dh, narrowed(self.dw, self.weight_dtype), self.db.to(self.bias_dtype)


def _run(rows, hidden, weight, bias, target, row_scale, class_weight, options, narrow, logits_bytes, need):
    """-> loss [N], gradients of `sum(row_scale * loss)` (row_scale None: of the plain sum)."""
    chunks, target = Chunks(hidden, weight, bias, logits_bytes), target.reshape(-1)
    wide = compute_dtype(hidden.dtype)
    loss = torch.empty(target.shape, dtype=wide, device=hidden.device)
    class_sum = None
    if class_weight is not None:
        class_weight = class_weight.to(wide).contiguous()
        class_sum = class_weight.sum()
    gradients = Gradients(chunks.h, weight, bias, chunks.count, need, narrow)
    for here, logits in chunks:
        scale = None if row_scale is None else row_scale[here]
        rows(logits, target[here], loss[here], scale, class_weight, class_sum, any(need), *options)
        gradients.add(logits, chunks.h[here], chunks.weight, here.start)
    return loss, gradients.result(hidden.shape)


def inverse(denominator, dtype):
    """1 / denominator (0-d) without a look at it, and 0 for 0: a batch without a live row has loss 0, not 0 / 0."""
    denominator = denominator.to(dtype)
    nothing = denominator == 0
    return denominator.masked_fill(nothing, 1).reciprocal().masked_fill(nothing, 0)


def row_scales(hidden, token_weight, denominator):
    """What multiplies every row's gradient, [N] in fp32 or None for ones, and what is left to multiply the sum by, 0-d.

    The products' results are rounded once if the denominator is in the former. Not so in fp16, where probabilities over the
    number of rows would often be below the smallest number; that the sum stays below the largest is the caller's to see to.
    """
    wide = compute_dtype(hidden.dtype)
    left = torch.empty((), dtype=wide, device=hidden.device).fill_(1.0)
    scale = None if token_weight is None else token_weight.reshape(-1).to(wide).contiguous()
    if denominator is None:
        return scale, left
    share = inverse(denominator, wide)
    if hidden.dtype == torch.float16:
        return scale, share
    if scale is None:
        return share.expand(hidden.shape[:-1].numel()).contiguous(), left
    return scale * share, left


def reduced(loss, target, token_weight, denominator, ignore_index, reduction):
    """The op's result from the losses [N] before token weights. Ignored rows stay 0 whatever their weight."""
    if token_weight is not None:
        loss = (loss * token_weight.reshape(-1).to(loss.dtype)).masked_fill_(target.reshape(-1) == ignore_index, 0)
    if reduction == "none":
        return loss.view(target.shape)
    return loss.sum() if denominator is None else loss.sum() * inverse(denominator, loss.dtype)


def forward(rows, hidden, weight, bias, target, token_weight, class_weight, denominator, ignore_index, label_smoothing,
            z_loss, scale, softcap, reduction, narrow, logits_bytes, need_dhidden, need_dweight, need_dbias):  # fmt: skip
    """-> loss (0-d, or target's shape for "none"), gradients of the sum of losses, and what they must be multiplied by (0-d).

    "none" has no gradients yet: they depend on the upstream ones. Token weights and the denominator enter every row's gradient
    here, before the products sum over rows.
    """
    options = (ignore_index, label_smoothing, z_loss, scale, softcap)
    need = (need_dhidden, need_dweight, need_dbias) if reduction != "none" else (False, False, False)
    row_scale, left = row_scales(hidden, token_weight, denominator)
    loss, gradients = _run(
        rows, hidden, weight, bias, target, row_scale, class_weight, options, narrow, logits_bytes, need
    )
    return reduced(loss, target, token_weight, denominator, ignore_index, reduction), *gradients, left


def backward(rows, scaled, dloss, hidden, weight, bias, target, token_weight, class_weight, denominator, dhidden, dweight,
             dbias, left, ignore_index, label_smoothing, z_loss, scale, softcap, reduction, narrow, logits_bytes, need_dhidden,
             need_dweight, need_dbias):  # fmt: skip
    """-> gradients of hidden, weight and bias, new tensors. `scaled(t, factor)` multiplies by a 0-d tensor in fp32."""
    if reduction != "none":
        factor = dloss * left
        return tuple(scaled(t, factor) for t in (dhidden, dweight, dbias))
    options = (ignore_index, label_smoothing, z_loss, scale, softcap)
    need = (need_dhidden, need_dweight, need_dbias)
    row_scale = dloss.reshape(-1)
    if token_weight is not None:
        row_scale = row_scale * token_weight.reshape(-1).to(row_scale.dtype)
    row_scale = row_scale.contiguous()
    return _run(rows, hidden, weight, bias, target, row_scale, class_weight, options, narrow, logits_bytes, need)[1]


def logprobs_of(stats, target, vocabulary, ignore_index):
    """stats [5, N] (see linear_logprobs.py) over all classes -> log probability of the target, log-sum-exp, entropy, whether the
    target's logit is the largest: [N] each, 0 in ignored rows, NaN for a target that is no class; and [2, N] for the backward."""
    peak, sums, moments, _, picked = stats
    log_sum = sums.log()
    ignored, valid = target == ignore_index, (target >= 0) & (target < vocabulary)
    # picked - peak first: it is exact where the target is the maximum, and the log probability small.
    found = (picked - peak) - log_sum, peak + log_sum, log_sum - moments / sums
    logp, lse, entropy = (t.masked_fill_(~valid, torch.nan).masked_fill_(ignored, 0) for t in found)
    return logp, lse, entropy, (picked >= peak) & valid & ~ignored, torch.stack((peak, log_sum))


def logprobs_statistics(statistics, hidden, weight, bias, target, scale, softcap, logits_bytes):
    """-> stats [5, N] of all rows."""
    chunks, flat = Chunks(hidden, weight, bias, logits_bytes), target.reshape(-1)
    stats = torch.empty((5, flat.shape[0]), dtype=compute_dtype(hidden.dtype), device=hidden.device)
    for here, logits in chunks:
        statistics(logits, flat[here], stats[:, here], False, scale, softcap)
    return stats


def logprobs_forward(statistics, hidden, weight, bias, target, ignore_index, scale, softcap, logits_bytes):
    """-> logp, lse, entropy, hit, each like target, and what the backward needs of them, [2, *target.shape]."""
    stats = logprobs_statistics(statistics, hidden, weight, bias, target, scale, softcap, logits_bytes)
    *found, saved = logprobs_of(stats, target.reshape(-1), weight.shape[0], ignore_index)
    return *(t.view(target.shape) for t in found), saved.view(2, *target.shape)


def logprobs_backward(gradient, dlogp, dlse, dentropy, hidden, weight, bias, target, entropy, saved, ignore_index, scale,
                      softcap, logits_bytes, *need, logits=None):  # fmt: skip
    """-> gradients of hidden, weight and bias. A missing cotangent is 0. The logits are made anew, unless all of them are given:
    these are overwritten."""
    chunks, flat = Chunks(hidden, weight, bias, logits_bytes), target.reshape(-1)
    factors = torch.empty((7, flat.shape[0]), dtype=saved.dtype, device=hidden.device)
    factors[:2] = saved.reshape(2, -1)
    rest = (None if dlogp is None else -dlogp, dlse, None, dentropy, entropy)
    for row, t in zip(factors[2:], rest):
        row.zero_() if t is None else row.copy_(t.reshape(-1))
    gradients = Gradients(chunks.h, weight, bias, chunks.count, need)
    bent = dentropy is not None
    for here, z in chunks if logits is None else [(slice(0, flat.shape[0]), logits)]:
        gradient(z, flat[here], factors[:, here], None, False, bent, ignore_index, scale, softcap)
        gradients.add(z, chunks.h[here], chunks.weight, here.start)
    return gradients.result(hidden.shape)
