"""How tokens are drawn, and the draws of one generation."""

from __future__ import annotations

import dataclasses
import math
import operator

import torch
from torch import Tensor

from fastlm import ops
from fastlm.config import option
from fastlm.errors import UserError

_LARGEST = torch.finfo(torch.float32).max


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
        if not 0 <= self.temperature <= _LARGEST:
            raise UserError(f"generate: temperature must be a number from 0 to 3.4e38, got {self.temperature}")
        top_k = 1 if self.top_k is None else self.top_k
        if isinstance(top_k, bool) or not 1 <= top_k < math.inf or top_k != int(top_k):
            raise UserError(f"generate: top_k must be an integer of at least 1, got {top_k}; leave it out to keep all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"generate: top_p must lie above 0 and at most at 1, got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"generate: min_p must lie in 0..1, got {self.min_p}")
        if self.seed is not None and not hasattr(self.seed, "__index__"):
            raise UserError(f"generate: seed must be an integer, got {self.seed!r}")


class Draws:
    """The draws of one generation, by `fastlm.ops.sample`: `draws(logits [B, V])` gives the next token of each row, int64 [B].

    -1 for a row of NaN or of -inf alone, where tokens are drawn. Greedy takes the largest logit, the first of equal ones.
    The seeds of all steps lie on the device before the first, so that no step waits for it.
    """

    def __init__(self, config: SamplingConfig, steps: int, device: torch.device) -> None:
        self.config, self.step = config, 0
        seed = torch.Generator().seed() if config.seed is None else operator.index(config.seed)
        seeds = torch.full((steps, 2), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
        seeds[:, 1] = torch.arange(steps, device=device)
        self.seeds = seeds.unbind()

    def __call__(self, logits: Tensor) -> Tensor:
        config = self.config
        if config.temperature == 0:
            return logits.argmax(-1)
        seed, self.step = self.seeds[self.step], self.step + 1
        filters = {"top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p}
        return ops.sample(logits, temperature=config.temperature, seed=seed, **filters)
