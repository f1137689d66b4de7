"""Numbers of an optimizer step that its betas alone decide."""

from __future__ import annotations

import math


def least_root(beta1: float, beta2: float) -> float:
    """The r for which sqrt(v) >= r |m| holds for any gradients, by Cauchy and Schwarz on the two sums; 0 where none does.

    From v >= r^2 m^2 it follows again after m <- beta1 m + (1 - beta1) g and v <- beta2 v + (1 - beta2) g^2.
    """
    shrink = beta1 * beta1 / beta2 if beta2 > 0 else math.inf
    return math.sqrt((1 - beta2) * (1 - shrink)) / (1 - beta1) if shrink < 1 else 0.0


def in_two(beta: float) -> tuple[float, float]:
    """beta in [0, 1) as the sum of two fp32 numbers >= 0, the second of which holds what the first, beta cut off, lacks.

    Means of moments are beta x + (1 - beta) y, not x + (1 - beta)(y - x): that is NaN once x is infinite, and what is left of
    a y much smaller than x is rounding where beta is small. Beta itself, rounded to fp32, would shift the mean that the second
    moment settles at by 1e-5. Neither part is 0 unless beta is, since 0 times an infinite x would be NaN.
    """
    mantissa, exponent = math.frexp(beta)
    high = math.ldexp(max(math.ceil(mantissa * 2**24) - 1, 0), exponent - 24)
    return high, beta - high
