"""Learning-rate schedules: pure functions from a step to the multiplier of the peak learning rate.

They hold no state, so a run resumes on the same curve by knowing its step. `step` counts from 0 and is the step about to be
made; `steps` may be a float, which is how a time-boxed run says how many steps it expects to make. With torch's schedulers:

    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, 10_000, warmup=100))
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


def wsd(
    step: float, steps: float, warmup: float = 0, floor: float = 0.0, decay: float = 0.1, shape: str = "1-sqrt"
) -> float:
    """Warm-up, stable, decay: linear warm-up, then 1, and over the last `decay` (a share of `steps`) down to `floor`.

    With x the share of the decay that is done: floor + (1 - floor) * (1 - sqrt(x)) for the shape "1-sqrt", 1 - x instead of
    1 - sqrt(x) for "linear". Until the decay begins nothing depends on `steps`, so a run can be prolonged, or branched from
    any checkpoint of its stable part. Raises ValueError for a share outside [0, 1] and another shape.
    Papers: Hu et al. (MiniCPM) 2024, arXiv 2404.06395; Haegele et al. 2024, arXiv 2405.18392 (the 1-sqrt shape).
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"wsd: decay must be a share of the steps in [0, 1], got {decay}")
    if shape not in ("1-sqrt", "linear"):
        raise ValueError(f"wsd: shape must be '1-sqrt' or 'linear', got {shape!r}")
    if step < warmup:
        return _ramp(step, warmup)
    begin = steps if math.isinf(steps) else max(warmup, steps * (1 - decay))
    if step < begin:
        return 1.0
    done = _share(step, steps, begin)
    return floor + (1.0 - floor) * (1.0 - (math.sqrt(done) if shape == "1-sqrt" else done))


def inverse_sqrt(step: float, steps: float, warmup: float = 0, floor: float = 0.0) -> float:
    """Linear warm-up over `warmup` steps, then sqrt((warmup + 1) / (step + 1)), but not below `floor`. Has no end.

    Papers: Vaswani et al. 2017, arXiv 1706.03762, whose rate is this one times (warmup * width)^-0.5 at its peak; T5 (Raffel et
    al. 2020, arXiv 1910.10683) keeps 1 instead of the linear warm-up.
    """
    if step < warmup:
        return _ramp(step, warmup)
    return max(floor, math.sqrt((warmup + 1) / (step + 1)))


SCHEDULES: dict[str, Callable[..., float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": wsd,
    "inverse_sqrt": inverse_sqrt,
}


def _ramp(step: float, warmup: float) -> float:
    # One over warmup + 1 at step 0: a first step with rate 0 would be a step thrown away.
    return min(1.0, (step + 1) / (warmup + 1))


def _share(step: float, steps: float, warmup: float) -> float:
    """How much of the way from the end of the warm-up to the end of the run is done, in [0, 1]."""
    if steps <= warmup:
        return 1.0
    return min(1.0, (step - warmup) / (steps - warmup))
