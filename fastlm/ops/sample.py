"""Draws a token from each row of logits: temperature, top-k, top-p, min-p and the draw in one op."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from fastlm.ops._cuda import not_measured
from fastlm.ops._op import Op
from fastlm.ops._tensor import can_read, compute_dtype
from fastlm.ops.random_bits import philox, seed_tensor

_STREAM = 0x73616D70  # third word of the counter: other numbers than dropout's
_NUCLEUS = 1024  # tokens in which the torch form looks for top-p's share first
_LARGEST = torch.finfo(torch.float32).max
_MOST_COLUMNS = 2**24 - 1  # of the kernel, whose masses are integers: more could overflow


def _gumbel(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Gumbel noise of 32 random bits. Their u is near 0 for the large values that win, where floats are dense."""
    u = ((words.to(dtype) + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def _noise(seed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns]: of token t in row r word t % 4 of Philox at (t // 4, r, _STREAM, offset)."""
    group = torch.arange(-(-columns // 4), device=seed.device)[None]
    row = torch.arange(rows, device=seed.device)[:, None]
    words = torch.stack(philox(seed[0], group, row, seed.new_full((), _STREAM), seed[1]), -1)
    return _gumbel(words.flatten(1)[:, :columns], dtype)


def _noise_of(seed: Tensor, row: Tensor, token: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for some tokens."""
    words = torch.stack(philox(seed[0], token // 4, row, seed.new_full((), _STREAM), seed[1]))
    return _gumbel(words.gather(0, token[None] % 4)[0], dtype)


def _column(each: Tensor | None, all_: float, like: Tensor) -> Tensor:
    """A setting as [rows, 1] or [1, 1]."""
    return like.new_full((1, 1), all_, dtype=like.dtype) if each is None else each[:, None].to(like.dtype)


def _top_k_threshold(x: Tensor, top_ks: Tensor | None, top_k: int) -> Tensor | None:
    """The k-th largest of each row [rows, 1], or -inf; None if every row keeps all."""
    columns = x.shape[-1]
    if top_ks is None:
        return x.topk(top_k).values[:, -1:] if 1 <= top_k < columns else None
    k = top_ks[:, None]
    kth = x.sort(-1, descending=True).values.gather(1, k.clamp(1, columns) - 1)
    return torch.where(k >= 1, kth, -math.inf)


def _top_p_threshold(x: Tensor, s: Tensor, keep: Tensor, top_p: Tensor, total: Tensor | None = None) -> Tensor:
    """The largest value of each row [rows, 1] at and above which the share top_p of the mass that `keep` leaves lies."""
    ordered, order = x.masked_fill(~keep, -math.inf).sort(-1, descending=True)
    # Of integers, 2^62 at most: on a GPU the running sum of a single row of floats differs from run to run.
    one = 2.0**62 / x.shape[-1]
    mass = (s.masked_fill(~keep, -math.inf).gather(1, order).exp().double() * one).long().cumsum(-1)
    wanted = top_p.clamp_min(0).double() * (mass[:, -1:] if total is None else total * one)
    threshold = ordered.gather(1, (mass < wanted).sum(-1, keepdim=True).clamp_max(x.shape[-1] - 1))
    return torch.where(top_p < 1, threshold, -math.inf)


def _reference(logits, temperatures, top_ks, top_ps, min_ps, seed, temperature, top_k, top_p, min_p, with_logprobs):
    x = logits.detach().to(compute_dtype(logits))
    rule = _Rule(x, temperatures, temperature)
    keep = rule.kept(top_ks, top_k, top_ps, top_p, min_ps, min_p)
    drawn = torch.where(keep, rule.s + _noise(seed, *x.shape, x.dtype), -math.inf).argmax(-1)
    return rule.result(drawn, with_logprobs)


def _torch(logits, temperatures, top_ks, top_ps, min_ps, seed, temperature, top_k, top_p, min_p, with_logprobs):
    """The same; where values can be read noise is made for the tokens that are left alone."""
    settings = (temperatures, top_ks, top_ps, min_ps, seed, temperature, top_k, top_p, min_p, with_logprobs)
    if temperatures is None and temperature == 0:
        x = logits.detach().to(compute_dtype(logits))
        return _Rule(x, None, 0.0).result(None, with_logprobs)
    filtered = any(t is not None for t in (top_ks, top_ps, min_ps)) or top_k > 0 or top_p < 1 or min_p > 0
    if not filtered or not can_read(logits) or not logits.shape[0]:
        return _reference(logits, *settings)
    x = logits.detach().to(compute_dtype(logits))
    rule = _Rule(x, temperatures, temperature)
    keep = rule.kept(top_ks, top_k, top_ps, top_p, min_ps, min_p, look=_NUCLEUS)
    row, token = keep.nonzero(as_tuple=True)
    score = torch.full_like(x, -math.inf)
    score[row, token] = rule.s[row, token] + _noise_of(seed, row, token, x.dtype)
    return rule.result(score.argmax(-1), with_logprobs)


class _Rule:
    """Logits x [rows, columns], and s = (x - top) / temperature; s is 0 at the top, be it infinite."""

    def __init__(self, x: Tensor, temperatures: Tensor | None, temperature: float) -> None:
        self.x, self.top = x, x.amax(-1, keepdim=True)
        self.temperature = _column(temperatures, temperature, x)
        info = torch.finfo(x.dtype)  # not 0, times which -inf would be NaN, where the temperature is infinite
        self.s = self._below_top((1 / self.temperature).clamp(info.smallest_normal * info.eps, info.max))

    def _below_top(self, factor: Tensor | float) -> Tensor:
        return torch.where(self.x == self.top, 0.0, (self.x - self.top) * factor)

    def kept(self, top_ks, top_k, top_ps, top_p, min_ps, min_p, look=0) -> Tensor:
        """Which tokens the filters leave. look: where so many of the largest logits hold top_p's share, no more are sorted."""
        x, s = self.x, self.s
        keep = x > -math.inf
        kth = _top_k_threshold(x, top_ks, top_k)
        if kth is not None:
            keep = keep & (x >= kth)
        if top_ps is not None or top_p < 1:
            keep = keep & (x >= self._nucleus(keep, _column(top_ps, top_p, x), look))
        if min_ps is not None or min_p > 0:
            floor = _column(min_ps, min_p, x).clamp_min(0).log().clamp_max(0)
            keep = keep & (s >= floor)
        return keep

    def _nucleus(self, keep: Tensor, top_p: Tensor, look: int) -> Tensor:
        x, s = self.x, self.s
        if 0 < look < x.shape[-1] // 2:
            total = s.masked_fill(~keep, -math.inf).exp().sum(-1, keepdim=True, dtype=torch.float64)
            largest, order = x.topk(look)
            near, left = s.gather(1, order), keep.gather(1, order)
            held = near.masked_fill(~left, -math.inf).exp().sum(-1, keepdim=True, dtype=torch.float64)
            # Not for tops that hold it only by rounding.
            if bool(((held * (1 - 1e-6) >= top_p * total) | (top_p >= 1)).all()):
                return _top_p_threshold(largest, near, left, top_p, total)
        return _top_p_threshold(x, s, keep, top_p)

    def result(self, drawn: Tensor | None, with_logprobs: bool) -> tuple[Tensor, Tensor]:
        """The drawn tokens, those of greedy rows and those of rows that hold nothing to draw; their log-probabilities."""
        nothing = (self.top.isnan() | (self.top == -math.inf))[:, 0]
        tokens = self.x.argmax(-1)
        if drawn is not None:
            tokens = torch.where(self.temperature[:, 0] > 0, drawn, tokens)
        logprobs = self.x.new_empty(0, dtype=torch.float32)
        if with_logprobs:
            below = self._below_top(1.0)
            logprobs = below.gather(1, tokens[:, None])[:, 0] - below.exp().sum(-1).log()
            logprobs = torch.where(nothing, math.nan, logprobs).float()
        return torch.where(nothing, -1, tokens), logprobs


def _supports(backend, logits):
    if backend == "cuda" and (logits.shape[1] > _MOST_COLUMNS or logits.shape[0] >= 2**28):
        return f"it takes fewer than 2^28 rows of fewer than 2^24 logits, got {list(logits.shape)}"
    return None


OP = Op(
    "sample",
    "(Tensor logits, Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, Tensor seed, float temperature, "
    "int top_k, float top_p, float min_p, bool with_logprobs, str backend) -> (Tensor tokens, Tensor logprobs)",
    reference=_reference,
    torch=_torch,
    kernels={"cuda": ("sample", None)},
    supports=_supports,
    slower=not_measured,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _fake(logits, *rest):
    rows, with_logprobs = logits.shape[0], rest[-2]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows if with_logprobs else 0, dtype=torch.float32),
    )


OP.fake(_fake)


def _setting(name: str, value, logits: Tensor, off: float, wanted: str, valid) -> tuple[Tensor | None, float]:
    """A setting -> (each row's [rows] in the dtype of the kernel, the number of all)."""
    if value is None:
        return None, off
    whole = name == "top_k"
    if isinstance(value, Tensor):
        rows = logits.shape[0]
        if value.shape not in ((rows,), ()):
            raise ValueError(
                f"sample: {name} must be a number or a tensor [{rows}], one for each row, got {list(value.shape)}"
            )
        if value.device != logits.device:
            raise ValueError(f"sample: {name} must be on logits' device {logits.device}, got {value.device}")
        if value.dtype == torch.bool or value.is_complex() or (whole and value.is_floating_point()):
            raise TypeError(f"sample: {name} must be {'integers' if whole else 'real numbers'}, got {value.dtype}")
        dtype = torch.int64 if whole else torch.float32
        return value.detach().to(dtype).expand(rows).contiguous(), off
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not valid(value):
        raise ValueError(f"sample: {name} must be {wanted}, got {value!r}")
    return None, value


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    seed: int | Tensor | None = None,
    return_logprobs: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """One token a row, drawn from softmax(logits / temperature) after the filters top-k, top-p, min-p.

    The filters work in this order, each on what the one before left, as in transformers. Each keeps the tokens whose
    logit is at or above a threshold, so that equal logits stay or go together:
    top-k keeps those at least as large as the k-th largest; top-p those before which (strictly more probable) less than the
    share top_p of what top-k left lies; min-p those at least min_p times as probable as the most probable one. That one always
    stays.

    The draw is the largest of (logit - largest logit) / temperature + g (Gumbel-max), g for token t the Gumbel noise of word
    t % 4 of Philox at (t // 4, row, a constant, offset). So every backend draws the same token, but where the best two come
    nearer to each other than fp32 rounding, or a token's place at a filter's edge does: a share top_p that is, but for rounding,
    a sum of probabilities, or a probability that is min_p times the largest. Of equal sums the first wins. Rows draw
    independently of each other.

    Args:
        logits: [B, V], fp16, bf16, fp32 (any float dtype on the reference), any strides. +inf has all the probability, shared
            among equals.
        temperature: logits are divided by it; 0 takes the largest logit (the first of equal ones) and needs no filter. A number
            is at most the largest fp32; a tensor may hold inf, with which all logits above -inf are as good. Like the other
            settings a number, or a tensor [B] with one for each row; tensors are read without waiting for the device, and
            so their range is not checked: at or below 0 is greedy.
        top_k: at least 1; None keeps all, and so does a tensor's value below 1.
        top_p: above 0, at most 1; None and 1 keep all.
        min_p: 0 to 1; None and 0 keep all.
        seed: an int, or an int64 tensor [2] (seed, offset), read when the kernel runs: count its offset up inside a CUDA graph.
            None draws one.
        return_logprobs: also return log softmax(logits) of the tokens: those of the model, before temperature and filters.
        backend: "auto", "reference", "torch" or "cuda".

    Returns:
        int64 [B]; with return_logprobs a tuple with fp32 [B]. A row with NaN, or of -inf alone, gives -1 and NaN. No gradient
        flows. Bitwise repeatable; no host sync.

    Raises:
        ValueError: logits not [B, V] with V >= 1, a setting out of range or of another shape, on another device, an unknown or
        unsupported backend. TypeError: logits not floating point, a setting's or the seed's dtype.

    Backends: torch (the default), cuda (one launch; compute capability >= 8.0, V below 2^24, B below 2^28, not chosen by
    "auto"), reference.
    Papers: Fan et al. 2018, arXiv:1805.04833; Holtzman et al. 2019, arXiv:1904.09751; Nguyen et al. 2024, arXiv:2407.01082; the
    draw as in Kool et al. 2019, arXiv:1903.06059; thresholds instead of sorting: Ye et al. 2025, arXiv:2501.01005.
    """
    if not logits.is_floating_point():
        raise TypeError(f"sample: logits must be floating point, got {logits.dtype}")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"sample: logits must be [B, V] with V of at least 1, got {list(logits.shape)}")
    number = "a number of at least 0 and at most fp32's largest, 3.4e38"
    temperatures, temperature = _setting("temperature", temperature, logits, 1.0, number, lambda t: 0 <= t <= _LARGEST)
    whole = "an integer of at least 1"
    top_ks, top_k = _setting("top_k", top_k, logits, 0, whole, lambda k: 1 <= k < math.inf and k == int(k))
    top_k = min(int(top_k), 2**63 - 1)  # what the kernels are handed; more than any row has
    top_ps, top_p = _setting("top_p", top_p, logits, 1.0, "above 0 and at most 1", lambda p: 0 < p <= 1)
    min_ps, min_p = _setting("min_p", min_p, logits, 0.0, "in 0..1", lambda p: 0 <= p <= 1)
    seed = seed_tensor("sample", seed, logits)
    backend = OP.choose(backend, logits)
    settings = (temperatures, top_ks, top_ps, min_ps, seed, float(temperature), top_k, float(top_p), float(min_p))
    if backend in OP.plain_forms:
        tokens, logprobs = OP.plain(backend, logits, *settings, return_logprobs)
    else:
        tokens, logprobs = OP.forward(logits, *settings, return_logprobs, backend)
    return (tokens, logprobs) if return_logprobs else tokens
