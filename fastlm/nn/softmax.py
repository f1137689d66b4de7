"""torch's Softmax over this library's op, with a scale and a mask."""

from __future__ import annotations

from torch import Tensor, nn

from fastlm import ops


class Softmax(nn.Softmax):
    """torch.nn.Softmax, computed by ops.softmax; it has no parameters.

    Args:
        dim: the dimension that sums to 1; torch's own default, which guesses one, is not taken over.
        scale: a number that x is multiplied by first.

    forward(x, mask=None) -> softmax(scale * x + mask); mask as in ops.softmax: broadcastable to x, boolean (True is kept) or
    added.
    """

    def __init__(self, dim: int = -1, *, scale: float = 1.0) -> None:
        super().__init__(dim)
        self.scale = scale

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return ops.softmax(x, self.dim, scale=self.scale, mask=mask)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, scale={self.scale}"
