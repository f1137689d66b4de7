"""Numbers among an op's arguments: one check for all of them.

Kernels hold numbers in fp32: 1e39 is inf there and 1e-46 is 0, of which a loss would be NaN without a word.
"""

from __future__ import annotations

import numbers

import torch

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # normal numbers of fp32
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt, numbers.Real)


def check_number(op: str, name: str, value, lowest=-LARGEST, largest=LARGEST, wanted="finite in fp32") -> None:
    """Raises TypeError unless value is a number, and ValueError unless lowest <= value <= largest (NaN is not). wanted says so in
    words, after "must be"."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        hint = "; take t.item()" if isinstance(value, torch.Tensor) else ""
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__} {value!r}{hint}")
    if not lowest <= value <= largest:
        raise ValueError(f"{op}: {name} must be {wanted}, got {value}")


def check_divisor(op: str, name: str, value, hint: str = "") -> None:
    """check_number of what kernels divide by: a positive, normal number of fp32."""
    check_number(op, name, value, SMALLEST, LARGEST, f"> 0{hint}: a normal number of fp32, 1.2e-38 to 3.4e38")
