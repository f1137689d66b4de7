"""From logits to a token: filters and a draw. Pure functions of logits [B, V], none of which waits for the device.

They are applied in the order temperature, top-k, top-p, min-p, each to what the one before left, as transformers does.
A filter sets the logits it removes to -inf and never removes the most probable token.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastlm.config import option
from fastlm.errors import UserError

_NUCLEUS = 1024  # tokens that top-p looks at first


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. Raises UserError for a value out of range."""

    temperature: float = option(
        1.0, "logits are divided by it: below 1 safer, above 1 wilder; 0 takes the most probable token"
    )
    top_k: int | None = option(None, "keep only this many most probable tokens; none keeps all")
    top_p: float | None = option(
        None, "keep the fewest most probable tokens that hold this much probability; none keeps all"
    )
    min_p: float | None = option(
        None, "keep tokens at least this share as probable as the most probable one; none keeps all"
    )
    seed: int | None = option(None, "seed of the draws; none for another text every time")

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"generate: temperature must be a number of at least 0, got {self.temperature}")
        if self.top_k is not None and (self.top_k != int(self.top_k) or self.top_k < 1):
            raise UserError(
                f"generate: top_k must be an integer of at least 1, got {self.top_k}; leave it out to keep all"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"generate: top_p must lie above 0 and at most at 1, got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"generate: min_p must lie in 0..1, got {self.min_p}")


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits of each row, the others -inf; those equal to the k-th largest all stay (Fan et al. 2018, arXiv
    1805.04833)."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def keep_top_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """The smallest set of most probable tokens whose probabilities softmax(logits) sum to at least p, the others -inf; a
    token stays if those more probable than it sum to less than p (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751)."""
    ordered, order = logits.sort()
    remove = ordered.softmax(-1).cumsum(-1) <= 1 - p
    remove[..., -1] = False
    return logits.masked_fill(remove.scatter(-1, order, remove), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """The tokens with probability of at least p times the largest, the others -inf (Nguyen et al. 2024, arXiv 2407.01082)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def filter_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """fp32 logits (fp64 stays) after temperature, top-k, top-p and min-p. The temperature must be above 0."""
    logits = _tempered(logits, config)
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None and config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p:
        logits = keep_min_p(logits, config.min_p)
    return logits


def sample(logits: Tensor, config: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
    """Draws one token a row from softmax(filter_logits(logits)), looking at as few tokens as the filters allow.

    Args:
        logits: [B, V], any floating dtype.
        config: temperature 0 takes the largest logit, the first of equal ones, and draws nothing.
        generator: of the logits' device; None for torch's own.

    Returns:
        int64 [B]. One uniform number a row is looked up in the fp64 running sum of the probabilities: ten times faster than
        torch.multinomial, which draws a number for every token and waits for the device.
    """
    if config.temperature == 0:
        return logits.argmax(-1)
    logits = _tempered(logits, config)
    ids, top_p = None, config.top_p
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        logits, ids = logits.topk(config.top_k)
    elif top_p is not None and top_p < 1 and logits.device.type == "cpu" and logits.shape[-1] > 2 * _NUCLEUS:
        # Sorting 50,000 logits takes 4 ms, as long as many a model. Where few hold the share p they are found in 0.6.
        largest, found = logits.topk(_NUCLEUS)
        share = (largest.logsumexp(-1, True) - logits.logsumexp(-1, True)).exp()
        if bool((share > top_p).all()):
            logits, ids, top_p = largest, found, top_p / share
    if top_p is not None and config.top_p < 1:
        logits = keep_top_p(logits, top_p)
    if config.min_p:
        logits = keep_min_p(logits, config.min_p)
    sums = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    # In (0, total]: the first sum that reaches it belongs to a token with a probability above 0.
    place = 1 - torch.rand(sums.shape[0], 1, dtype=sums.dtype, device=sums.device, generator=generator)
    drawn = torch.searchsorted(sums, place * sums[:, -1:])
    return (drawn if ids is None else ids.gather(-1, drawn))[:, 0]


def _tempered(logits: Tensor, config: SamplingConfig) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / config.temperature


def make_generator(seed: int | None, device: torch.device | str) -> torch.Generator:
    """A generator on a device with this seed, or with a fresh one for None."""
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    return generator
