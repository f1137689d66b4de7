"""torch's norms over this library's ops: same constructor, same state dict, and an optional fused dropout and residual add."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlm import ops


class _Options:
    """What both norms have beyond torch's."""

    normalized_shape: tuple[int, ...]
    weight_offset = 0.0  # the constructor of torch's class already resets the parameters

    def _take(self, weight_offset: float, casting: str, dropout: float) -> None:
        name = type(self).__name__
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"{name}: normalized_shape must be one dimension, the last, got {list(self.normalized_shape)}; "
                "flatten x first"
            )
        if casting not in ("fp32", "llama"):
            raise ValueError(f"{name}: casting must be 'fp32' or 'llama', got {casting!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"{name}: dropout must lie in [0, 1), got {dropout}")
        self.weight_offset, self.casting, self.dropout = weight_offset, casting, dropout
        if weight_offset:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights such that weight_offset + weight is 1, and biases of 0."""
        super().reset_parameters()
        if self.weight_offset and self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def _options(self) -> dict:
        dropout_p = self.dropout if self.training else 0.0
        return {"dropout_p": dropout_p, "weight_offset": self.weight_offset, "casting": self.casting}

    def extra_repr(self) -> str:
        extra = [f"{name}={value!r}" for name, value, usual in (
            ("weight_offset", self.weight_offset, 0.0), ("casting", self.casting, "fp32"), ("dropout", self.dropout, 0.0)
        ) if value != usual]  # fmt: skip
        return ", ".join([super().extra_repr(), *extra])


class RMSNorm(_Options, nn.RMSNorm):
    """torch.nn.RMSNorm over the last dimension, computed by ops.rms_norm.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: torch's.
        weight_offset: added to the weight, which then starts at 1 - weight_offset: 1.0 is Gemma's form.
        casting: "fp32", or "llama" to round before the scale as transformers' LlamaRMSNorm does.
        dropout: probability in [0, 1) with which elements of x are dropped in training, before the residual is added.

    forward(x [..., N], residual=None) -> y, or with a residual of x's shape (y, dropout(x) + residual), y being the norm of
    the sum. Raises ValueError for a normalized_shape of more than one dimension, a bad casting or dropout.
    """

    def __init__(
        self, normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None, *,
        weight_offset: float = 0.0, casting: str = "fp32", dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)
        self._take(weight_offset, casting, dropout)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        # None is torch's default: the eps of the dtype computed in, which is fp32 for 16-bit inputs.
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
        return ops.rms_norm(x, self.weight, eps, residual=residual, **self._options())


class LayerNorm(_Options, nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension, computed by ops.layer_norm.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: torch's.
        weight_offset, casting, dropout: see RMSNorm.

    forward(x [..., N], residual=None) -> y, or with a residual of x's shape (y, dropout(x) + residual), y being the norm of
    the sum. Raises ValueError for a normalized_shape of more than one dimension, a bad casting or dropout.
    """

    def __init__(
        self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True, device=None, dtype=None, *,
        weight_offset: float = 0.0, casting: str = "fp32", dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype)
        self._take(weight_offset, casting, dropout)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual=residual, **self._options())
