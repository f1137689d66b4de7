"""How large Adam's first moment can be beside its second."""

from __future__ import annotations

import math


def least_root(beta1: float, beta2: float) -> float:
    """The r for which sqrt(v) >= r |m| holds for any gradients, by Cauchy and Schwarz on the two sums; 0 where none does.

    From v >= r^2 m^2 it follows again after m <- beta1 m + (1 - beta1) g and v <- beta2 v + (1 - beta2) g^2.
    """
    shrink = beta1 * beta1 / beta2 if beta2 > 0 else math.inf
    return math.sqrt((1 - beta2) * (1 - shrink)) / (1 - beta1) if shrink < 1 else 0.0
