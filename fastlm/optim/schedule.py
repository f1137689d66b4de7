"""Learning-rate schedules: pure functions from a step to the multiplier of the peak learning rate.

They hold no state, so a run resumes on the same curve by knowing its step. `step` counts from 0 and is the step about to be
made; `steps` may be a float, which is how a time-boxed run says how many steps it expects to make.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def constant(step: float, steps: float, warmup: float = 0, floor: float = 0.0) -> float:
    """Linear warm-up over `warmup` steps, then 1."""
    return _ramp(step, warmup)


def linear(step: float, steps: float, warmup: float = 0, floor: float = 0.0) -> float:
    """Linear warm-up over `warmup` steps, then a straight line from 1 down to `floor` at `steps`."""
    if step < warmup:
        return _ramp(step, warmup)
    return 1.0 + (floor - 1.0) * _share(step, steps, warmup)


def cosine(step: float, steps: float, warmup: float = 0, floor: float = 0.0) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine from 1 down to `floor` at `steps`.

    floor + (1 - floor) * (1 + cos(pi * (step - warmup) / (steps - warmup))) / 2; `floor` from `steps` on.
    Paper: Loshchilov and Hutter, SGDR, 2017, arXiv 1608.03983.
    """
    if step < warmup:
        return _ramp(step, warmup)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * _share(step, steps, warmup)))


SCHEDULES: dict[str, Callable[..., float]] = {"cosine": cosine, "linear": linear, "constant": constant}


def _ramp(step: float, warmup: float) -> float:
    # One over warmup + 1 at step 0: a first step with rate 0 would be a step thrown away.
    return min(1.0, (step + 1) / (warmup + 1))


def _share(step: float, steps: float, warmup: float) -> float:
    """How much of the way from the end of the warm-up to the end of the run is done, in [0, 1]."""
    if steps <= warmup:
        return 1.0
    return min(1.0, (step - warmup) / (steps - warmup))
