"""torch's norms over this library's ops: same constructor, same state dict, and an optional fused residual add."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import ops


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm over the last dimension, computed by ops.rms_norm.

    forward(x [..., N], residual=None) -> y, or with a residual of x's shape (y, x + residual), y being the norm of the sum.
    Raises ValueError for a normalized_shape of more than one dimension.
    """

    def __init__(self, normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)
        _check_last_only("RMSNorm", self.normalized_shape)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return ops.rms_norm(x, self.weight, eps, residual=residual)


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension, computed by ops.layer_norm.

    forward(x [..., N], residual=None) -> y, or with a residual of x's shape (y, x + residual), y being the norm of the sum.
    Raises ValueError for a normalized_shape of more than one dimension.
    """

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True, device=None, dtype=None) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype)
        _check_last_only("LayerNorm", self.normalized_shape)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual=residual)


def _check_last_only(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 1:
        raise ValueError(
            f"{name}: normalized_shape must be one dimension, the last, got {list(shape)}; flatten x first"
        )
