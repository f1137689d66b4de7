"""Guard bands around tensors, and poisoned torch.empty: what the interpreter does not catch by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_GUARD = 64  # elements on either side of a guarded tensor
_SENTINEL = 113


def guarded(t: Tensor, band: float = float("nan")) -> tuple[Tensor, Tensor]:
    """A copy of t between bands of `band` (113 for integers), and the whole buffer to inspect with `bands_intact`."""
    band = band if t.is_floating_point() else _SENTINEL
    buffer = torch.full((t.numel() + 2 * _GUARD,), band, dtype=t.dtype, device=t.device)
    inner = buffer[_GUARD : _GUARD + t.numel()].view(t.shape)
    inner.copy_(t.detach())
    return inner, buffer


def bands_intact(buffer: Tensor) -> bool:
    """True if nothing was written into the bands of a guarded buffer."""
    bands = torch.cat([buffer[:_GUARD], buffer[-_GUARD:]])
    return bool(
        (bands.isnan() if bands.is_floating_point() else bands == _SENTINEL).all() or (bands == _SENTINEL).all()
    )


@contextmanager
def poison_empty() -> Iterator[None]:
    """Within the block torch.empty and torch.empty_like give NaN between guard bands: an unwritten output is seen as NaN,
    and a write outside a buffer fails when the block ends. Launchers allocate with these two only."""
    real_empty, real_like, buffers = torch.empty, torch.empty_like, []

    def empty(*size, dtype=None, device=None, **kwargs):
        shape = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)) else size
        proto = real_empty(shape, dtype=dtype, device=device, **kwargs)
        if proto.device.type == "meta" or type(proto) is not Tensor or proto.dtype is torch.bool:
            return proto
        proto.fill_(float("nan") if proto.is_floating_point() else _SENTINEL)
        # Not NaN bands here: a stray NaN, read from an input's band, would be written unseen.
        inner, buffer = guarded(proto, band=_SENTINEL)
        buffers.append(buffer)
        return inner

    def empty_like(t, *, dtype=None, device=None, **kwargs):
        return empty(t.shape, dtype=dtype or t.dtype, device=device or t.device)

    torch.empty, torch.empty_like = empty, empty_like
    try:
        yield
    finally:
        torch.empty, torch.empty_like = real_empty, real_like
    for buffer in buffers:
        assert bands_intact(buffer), f"a kernel wrote outside a buffer of {buffer.numel() - 2 * _GUARD} elements"
