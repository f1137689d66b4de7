"""torch's own fast functions that have no public name yet: one thin wrapper each, so that a change in torch is met here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, step: Tensor, **options: Any) -> None:
    """torch's fused AdamW step over lists of equal dtype and memory order, one 0-d `step` (from 1) for all. In place."""
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, [], [step] * len(params), amsgrad=False, maximize=False, **options
    )
