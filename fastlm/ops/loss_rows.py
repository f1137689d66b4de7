"""Losses over chunks of logits in plain torch: the CPU's form of kernels/linear_cross_entropy.py and kernels/linear_logprobs.py.

Few passes, each over a block of rows that stays in the cache. x below is what a loss is taken of: scale times the logits,
bounded by softcap tanh(x / softcap).
"""

from __future__ import annotations

import torch

from fastlm.ops.softcap import slope

SCRATCH_BYTES = 1 << 19


def _blocks(logits, dtype):
    rows, vocabulary = logits.shape
    block = min(rows, max(1, SCRATCH_BYTES // (vocabulary * dtype.itemsize)))
    for start in range(0, rows, block):
        yield slice(start, min(start + block, rows))


def _scaled(z, dtype, scale):
    z = z.to(dtype)
    return z if scale == 1 else z * scale


def _capped(z, dtype, scale, softcap):
    """x of logits z; z itself where nothing is to be done."""
    x = _scaled(z, dtype, scale)
    return x if softcap is None else torch.div(x, softcap).tanh_().mul_(softcap)


def _through_cap(g, z, scale, softcap):
    """The gradient by z, in place in g, from that by x."""
    if softcap is not None:
        g.mul_(slope(_scaled(z, g.dtype, scale) / softcap))
    if scale != 1:
        g.mul_(scale)


def cross_entropy_rows(logits, target, loss, row_scale, class_weight, class_sum, with_grad, ignore_index, label_smoothing,
                       z_loss, scale, softcap):  # fmt: skip
    """The `rows` function of kernels/chunked_loss.py."""
    rows, vocabulary = logits.shape
    index = target.clamp(0, vocabulary - 1).unsqueeze(1)
    column, spread = loss.unsqueeze(1), label_smoothing / vocabulary
    ignored = target == ignore_index
    share = column.new_full((rows, 1), 1 - label_smoothing)
    if class_weight is not None:
        share = class_weight[index] * (1 - label_smoothing)
    if with_grad:
        factor = (~ignored).to(loss.dtype) if row_scale is None else row_scale.masked_fill(ignored, 0)
        factor = factor.unsqueeze(1)
    scratch = None
    for here in _blocks(logits, loss.dtype):
        z, at, out = logits[here], index[here], column[here]
        scratch = torch.empty(z.shape, dtype=loss.dtype, device=z.device) if scratch is None else scratch
        x = _capped(z, loss.dtype, scale, softcap)
        p = (torch.softmax if with_grad else torch.log_softmax)(x, -1, out=scratch[: x.shape[0]])
        # log sum exp(x - peak): the largest probability is at least 1 / V, so its logarithm is good to rounding.
        excess = p.amax(-1, keepdim=True)
        excess = (excess.log_() if with_grad else excess).neg_()
        peak, picked = x.amax(-1, keepdim=True), x.gather(1, at)
        torch.sub(peak, picked, out=out).add_(excess)
        if class_weight is not None:
            out.mul_(share[here])
            if label_smoothing:  # of x - peak: what logits share would take the digits of their sum
                below = torch.mv(x - peak, class_weight).unsqueeze(1)
                out.add_(class_sum * excess - below, alpha=spread)
        elif label_smoothing:
            out.add_((picked - x).mean(-1, keepdim=True), alpha=label_smoothing)
        if z_loss:
            out.add_((peak + excess).square_(), alpha=z_loss)
        if not with_grad:
            continue
        # Added last: together with p it would round away what is left of p - 1 where p is close to 1.
        pull = p * (2 * z_loss * (peak + excess)) if z_loss else None
        if class_weight is not None:
            p.mul_(share[here] + spread * class_sum)
            if label_smoothing:
                p.sub_(class_weight, alpha=spread)
        elif label_smoothing:
            p.sub_(spread)
        p.scatter_add_(1, at, -share[here])
        if pull is not None:
            p.add_(pull)
        _through_cap(p, z, scale, softcap)
        torch.mul(p, factor[here], out=z)
    if with_grad:  # of infinite logits p is NaN, and 0 times it
        if logits.device.type == "cpu":
            logits.index_fill_(0, ignored.nonzero().squeeze(1), 0)
        else:
            logits.masked_fill_(ignored.unsqueeze(1), 0)
    loss.masked_fill_(index.squeeze(1) != target, torch.nan).masked_fill_(ignored, 0)


def statistics(logits, target, stats, class_weight, scale, softcap):
    """Writes stats [5, R] of logits [R, V]: per row the maximum of x, sum exp(x - maximum), sum exp(x - maximum) (x - maximum),
    sum w (x - maximum) (w: class_weight [V] or ones; class_weight False: 0) and x of the target (0 if it is not in [0, V))."""
    vocabulary = logits.shape[1]
    index = target.clamp(0, vocabulary - 1).unsqueeze(1)
    elsewhere = index.squeeze(1) != target
    for here in _blocks(logits, stats.dtype):
        x = _capped(logits[here], stats.dtype, scale, softcap)
        peak = x.amax(-1, keepdim=True).clamp_(min=torch.finfo(x.dtype).min)  # finite, so that -inf - peak is -inf
        stats[0, here] = peak.squeeze(1)
        stats[4, here] = x.gather(1, index[here]).squeeze(1)
        below = x - peak
        if class_weight is not False:  # of x - peak: what logits share would take the digits of their sum
            stats[3, here] = below.sum(-1) if class_weight is None else torch.mv(below, class_weight)
        below.clamp_(min=-1000)  # -inf times its exp of 0 would be NaN
        e = below.exp()
        stats[1, here] = e.sum(-1)
        stats[2, here] = e.mul_(below).sum(-1)
    if class_weight is False:
        stats[3] = 0
    stats[4].masked_fill_(elsewhere, 0)


def gradient(logits, target, factors, class_weight, spread, entropy, ignore_index, scale, softcap):
    """Overwrites logits by hit (p - onehot) + all p - even w - dentropy p (log p + H), through scale and cap: 0 in ignored rows.

    factors [7, R]: maximum and log sum exp(x - maximum) over all classes, hit, all, even (read if `spread`), dentropy and H
    (read if `entropy`).
    """
    vocabulary = logits.shape[1]
    peak, log_sum, hit, everywhere, even, dentropy, height = factors.unsqueeze(-1)
    index = target.clamp(0, vocabulary - 1).unsqueeze(1)
    pulled = hit.neg().masked_fill_(index != target.unsqueeze(1), 0)
    ignored = (target == ignore_index).unsqueeze(1)
    for here in _blocks(logits, factors.dtype):
        z = logits[here]
        x = _capped(z, factors.dtype, scale, softcap)
        log_p = (x - peak[here]).sub_(log_sum[here]).clamp_(min=-1000)
        g = log_p.exp()
        bend = log_p.add_(height[here]).mul_(g).mul_(dentropy[here]) if entropy else None
        more = g * everywhere[here]
        g.mul_(hit[here]).scatter_add_(1, index[here], pulled[here])
        g.add_(more)
        if bend is not None:
            g.sub_(bend)
        if spread:
            g.sub_(even[here] if class_weight is None else even[here] * class_weight)
        _through_cap(g, z, scale, softcap)
        z.copy_(g.masked_fill_(ignored[here], 0))
