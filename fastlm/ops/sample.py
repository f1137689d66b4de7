"""Draws a token from each row of logits: temperature, top-k, top-p, min-p and the draw in one op."""

from __future__ import annotations

import math
import numbers
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastlm.ops._cuda import not_measured
from fastlm.ops._op import Op
from fastlm.ops._tensor import can_read, compute_dtype
from fastlm.ops.random_bits import philox, philox_words, seed_tensor

_STREAM = 0x73616D70  # third word of the counter: other numbers than dropout's
_LARGEST = torch.finfo(torch.float32).max
_AHEAD, _STEPS = 4096, 16  # logits for which the torch form makes the noise of so many steps of decoding at once
_MOST_COLUMNS = 2**24 - 1  # of the kernel, whose masses are integers: more could overflow


def _noise(seed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Gumbel noise [rows, columns]: of token t in row r from word t % 4 of Philox at (t // 4, r, _STREAM, offset)."""
    group = torch.arange(-(-columns // 4), device=seed.device)[None]
    row = torch.arange(rows, device=seed.device)[:, None]
    words = torch.stack(philox(seed[0], group, row, seed.new_full((), _STREAM), seed[1]), -1)
    # u is near 0 for the large values that win, where floats are dense.
    u = ((words.flatten(1)[:, :columns].to(dtype) + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def _host_noise(seed: list[int], rows: int, columns: int, dtype: torch.dtype, ids: Tensor | None = None) -> Tensor:
    """The same, negative and made by numpy; with ids of the tokens row * columns + token in ids alone, in the shape of ids."""
    if 0 < seed[1] < 2**31 and rows * columns <= _AHEAD:  # somebody counts offsets up
        block, place = divmod(seed[1], _STEPS)
        noise = _noise_of_steps(seed[0], block * _STEPS, rows, columns, dtype)[place]
        return noise if ids is None else noise.take(ids)
    if ids is None:
        group = np.empty((rows, -(-columns // 4)), np.uint32)
        group[:] = np.arange(group.shape[1])
        words = philox_words(seed[0], group, np.arange(rows)[:, None], _STREAM, seed[1])
        return _gumbel_(words.transpose(1, 2, 0).reshape(rows, -1)[:, :columns], dtype)
    row, token = np.divmod(ids.numpy(), columns) if rows > 1 else (0, ids.numpy())
    return _gumbel_(np.choose(token & 3, philox_words(seed[0], token >> 2, row, _STREAM, seed[1])), dtype)


@lru_cache(maxsize=4)
def _noise_of_steps(seed: int, first: int, rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    """That of _STEPS offsets: for so few tokens the calls are what takes time, and these are as many as for one."""
    group = np.empty((_STEPS, rows, -(-columns // 4)), np.uint32)
    group[:] = np.arange(group.shape[2])
    offsets = np.arange(first, first + _STEPS)[:, None, None]
    words = philox_words(seed, group, np.arange(rows)[None, :, None], _STREAM, offsets)
    return list(_gumbel_(np.moveaxis(words, 0, -1).reshape(_STEPS, rows, -1)[:, :, :columns], dtype).unbind())


def _gumbel_(words: np.ndarray, dtype: torch.dtype) -> Tensor:
    u = torch.from_numpy(words.astype(np.float64 if dtype == torch.float64 else np.float32))
    return u.add_(0.5).mul_(-(2.0**-32)).clamp_min_(2.0**-24 - 1).log1p_().neg_().log_()


def _column(each: Tensor | None, all_: float, dtype: torch.dtype) -> Tensor | float:
    """A setting as [rows, 1] or, where it is one for all, as a number; rounded to the dtype."""
    if each is not None:
        return each[:, None].to(dtype)
    return float(all_ if dtype == torch.float64 else np.float32(all_))


def _reference(logits, temperatures, top_ks, top_ps, min_ps, seed, temperature, top_k, top_p, min_p, with_logprobs):
    x = logits.detach().to(compute_dtype(logits))
    rule = _Rule(x, temperatures, temperature)
    if temperatures is None and temperature == 0:
        return rule.result(None, with_logprobs)
    s = rule.tempered(x)
    keep = rule.kept(s, top_ks, top_k, top_ps, top_p, min_ps, min_p)
    score = s + _noise(seed, *x.shape, x.dtype)
    return rule.result((score if keep is None else torch.where(keep, score, -math.inf)).argmax(-1), with_logprobs)


def _torch(logits, temperatures, top_ks, top_ps, min_ps, seed, temperature, top_k, top_p, min_p, with_logprobs):
    """The same; where values can be read, with noise for those alone that the filters leave."""
    each = (temperatures, top_ks, top_ps, min_ps)
    if not can_read(logits) or not logits.shape[0] or (temperatures is None and temperature == 0):
        return _reference(logits, *each, seed, temperature, top_k, top_p, min_p, with_logprobs)
    x = logits.detach().to(compute_dtype(logits))
    rule = _Rule(x, temperatures, temperature, host=True)
    s = rule.tempered(x)
    keep = rule.kept(s, top_ks, top_k, top_ps, top_p, min_ps, min_p)
    return rule.result(_drawn(s, keep, seed.tolist()), with_logprobs)


def _triton(logits, temperatures, top_ks, top_ps, min_ps, seed, temperature, top_k, top_p, min_p, with_logprobs):
    """The thresholds by the reference's code, all else by the kernel."""
    from fastlm.kernels.sample import draw  # needs triton

    threshold = None
    filters = top_ks is not None or top_k > 0 or top_ps is not None or top_p < 1
    if filters and (temperatures is not None or temperature > 0):
        threshold = _Rule(logits.detach(), temperatures, temperature).threshold(top_ks, top_k, top_ps, top_p)
        threshold = None if threshold is None else threshold[:, 0].float()
    return draw(logits, temperatures, threshold, min_ps, seed, temperature, min_p, with_logprobs)


def _drawn(s: Tensor, keep: Tensor | None, seed: list[int]) -> Tensor:
    """The tokens with the largest s + noise among those that are kept; None: all."""
    ids = None if keep is None or s.numel() <= _AHEAD else keep.flatten().nonzero()[:, 0]
    if ids is None or 4 * len(ids) > s.numel():  # Philox makes four words at once
        score = s - _host_noise(seed, *s.shape, s.dtype)
        return (score if keep is None else score.masked_fill_(~keep, -math.inf)).argmax(-1)
    score = s.flatten()[ids] - _host_noise(seed, *s.shape, s.dtype, ids)
    if len(s) == 1 and len(ids) > 0:  # none of NaN
        return ids[score.argmax(-1, keepdim=True)]
    return torch.full_like(s, -math.inf).put_(ids, score).argmax(-1)


def _none(x: Tensor) -> Tensor:
    """No log-probabilities."""
    return x.new_empty(0, dtype=torch.float32)


class _Rule:
    """What is done to logits x [rows, columns]: what is not only compared or sorted, in `compute_dtype`. host: values can be
    read."""

    def __init__(self, x: Tensor, temperatures: Tensor | None, temperature: float, host: bool = False) -> None:
        self.x, self.host, self.temperatures, self.dtype = x, host, temperatures, compute_dtype(x)
        self.top = x.amax(-1, keepdim=True).to(self.dtype)
        self.finite = host and all(map(math.isfinite, self.top.flatten().tolist()))
        info = torch.finfo(self.dtype)  # not 0, times which -inf would be NaN, where the temperature is infinite
        if temperatures is not None:
            inverse = 1 / _column(temperatures, temperature, self.dtype)
            self.factor = inverse.clamp(info.smallest_normal * info.eps, info.max)
        else:
            inverse = 1 / _column(None, temperature, self.dtype) if temperature else math.inf
            self.factor = min(max(inverse, info.smallest_normal * info.eps), info.max)

    def below(self, x: Tensor) -> Tensor:
        """x - top of any logits of these rows; 0 at the top, be it infinite."""
        x = x.to(self.dtype)
        return x - self.top if self.finite else torch.where(x == self.top, 0.0, x - self.top)

    def tempered(self, x: Tensor) -> Tensor:
        """(x - top) / temperature."""
        return self.below(x) * self.factor

    def kept(self, s, top_ks, top_k, top_ps, top_p, min_ps, min_p) -> Tensor | None:
        """Which tokens the filters leave, None: all; s: the tempered logits. (Those of -inf cannot win.)"""
        threshold = self.threshold(top_ks, top_k, top_ps, top_p)
        keep = None if threshold is None else self.x >= threshold
        if min_ps is None and min_p == 0:
            return keep
        if min_ps is not None:
            probable = s >= _column(min_ps, min_p, self.dtype).clamp_min(0).log().clamp_max(0)
        else:
            probable = s >= math.log(_column(None, min_p, self.dtype))
        return probable if keep is None else keep & probable

    def threshold(self, top_ks, top_k, top_ps, top_p) -> Tensor | None:
        """The logit of each row [rows, 1] at and above which top-k, and then top-p, keep; None: they keep all."""
        x, columns = self.x, self.x.shape[-1]
        falling = kth = None
        if top_ks is not None:
            falling, k = self._falling(x), top_ks[:, None]
            kth = torch.where(k >= 1, falling.gather(1, k.clamp(1, columns) - 1), -math.inf)
            falling = falling.masked_fill(falling < kth, -math.inf)
        elif 1 <= top_k < columns:
            falling = x.topk(top_k).values
            kth = falling[:, -1:]
        if top_ps is None and top_p >= 1:
            return kth
        share = _column(top_ps, top_p, self.dtype)
        wanted = share if top_ps is None else share.clamp_min(0).double()
        if falling is None and self.host:
            falling, total = self._most_of_the_mass(wanted)
            mass = self._mass(falling).cumsum(-1)
        else:
            falling = self._falling(x) if falling is None else falling
            each = self._mass(falling)
            mass = each.cumsum(-1)
            total = mass[:, -1:]
            if falling.shape[-1] < columns:  # equals of the k-th logit that are not among the first k
                total = total + each[:, -1:] * ((x >= kth).sum(-1, keepdim=True) - top_k)
        last = falling.shape[-1] - 1
        threshold = falling.gather(1, (mass < wanted * total.double()).sum(-1, keepdim=True).clamp_max(last))
        if top_ps is None:
            return threshold
        return torch.where(share < 1, threshold, -math.inf if kth is None else kth)

    def _mass(self, x: Tensor) -> Tensor:
        """exp(s) of any logits of these rows, as integers whose sum over a row is 2^62 at most: on a GPU the running sum of a
        single row of floats differs from run to run."""
        return self.tempered(x).exp().mul(2.0 ** (62 - (self.x.shape[-1] - 1).bit_length())).long()

    def _most_of_the_mass(self, share: Tensor | float) -> tuple[Tensor, Tensor]:
        """Where values can be read: the largest logits of each row, falling, that hold the share of its mass; the whole mass."""
        mass = self._mass(self.x)
        total = mass.sum(-1, keepdim=True)
        # Tokens below 1 / columns of the rest hold less than the rest together. Somewhat less than it: products are rounded.
        rest = (1 - share) * total.double() * ((1 - 1e-6) / self.x.shape[-1])
        return self._falling(self.x, max(1, int((mass > rest).sum(-1).max()))), total

    def _falling(self, x: Tensor, many: int | None = None) -> Tensor:
        """Each row sorted, the largest first; where values can be read, so many of them."""
        if not self.host:
            return x.sort(-1, descending=True).values
        values = x.numpy()  # sorted in a quarter of the time of torch's, which sorts places too
        if many is not None and many < values.shape[1]:
            values = np.partition(values, values.shape[1] - many)[:, values.shape[1] - many :]
        return torch.from_numpy(np.sort(values)).flip(-1)

    def result(self, drawn: Tensor | None, with_logprobs: bool) -> tuple[Tensor, Tensor]:
        """The drawn tokens, those of greedy rows and those of rows that hold nothing to draw; their log-probabilities."""
        tokens = self.x.argmax(-1) if drawn is None else drawn
        if self.temperatures is not None:
            tokens = torch.where(self.temperatures > 0, tokens, self.x.argmax(-1))
        if self.finite and not with_logprobs:
            return tokens, _none(self.x)
        nothing = (self.top.isnan() | (self.top == -math.inf))[:, 0]
        logprobs = _none(self.x)
        if with_logprobs:
            below = self.below(self.x)
            logprobs = below.gather(1, tokens[:, None])[:, 0] - below.exp().sum(-1).log()
            logprobs = torch.where(nothing, math.nan, logprobs).float()
        return torch.where(nothing, -1, tokens), logprobs


def _supports(backend, logits):
    if backend == "triton" and (logits.shape[1] >= 2**30 or logits.shape[0] >= 2**31):
        return f"it takes fewer than 2^31 rows of fewer than 2^30 logits, got {list(logits.shape)}"
    if backend == "cuda" and (logits.shape[1] > _MOST_COLUMNS or logits.shape[0] >= 2**28):
        return f"it takes fewer than 2^28 rows of fewer than 2^24 logits, got {list(logits.shape)}"
    return None


OP = Op(
    "sample",
    "(Tensor logits, Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, Tensor seed, float temperature, "
    "int top_k, float top_p, float min_p, bool with_logprobs, str backend) -> (Tensor tokens, Tensor logprobs)",
    reference=_reference,
    torch=_torch,
    kernels={"triton": (_triton, None), "cuda": ("sample", None)},
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
        backend: "auto", "reference", "torch", "triton" or "cuda".

    Returns:
        int64 [B]; with return_logprobs a tuple with fp32 [B]. A row with NaN, or of -inf alone, gives -1 and NaN. No gradient
        flows. Bitwise repeatable; no host sync.

    Raises:
        ValueError: logits not [B, V] with V >= 1, a setting out of range or of another shape, on another device, an unknown or
        unsupported backend. TypeError: logits not floating point, a setting's or the seed's dtype.

    Backends: torch (the CPU default), triton (the GPU default; one launch, or three where rows are few and wide, behind torch's
    own calls for the thresholds of top-k and top-p; V below 2^30, B below 2^31), cuda (one launch for all; V below 2^24, B below
    2^28, not chosen by "auto"), reference. GPUs: compute capability >= 8.0.
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
