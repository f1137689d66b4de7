"""A linear layer whose product is in fp8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import ops


class Fp8Linear(torch.nn.Linear):
    """torch.nn.Linear with its product in fp8 e4m3 (see `ops.fp8_linear`); parameters and state dict are nn.Linear's.

    The weight is kept in its own dtype and rounded at every call, so that it can be trained; gradients are those of nn.Linear.

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear.
        scaling: "row", a scale for each row of the input and of the weight, or "tensor", one for each matrix.

    Shapes: input [..., in_features] -> [..., out_features], fp16, bf16 or fp32.

    Raises:
        ValueError: scaling is neither of the two.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        scaling: str = "row",
    ) -> None:
        if scaling not in ("row", "tensor"):
            raise ValueError(f"Fp8Linear: scaling must be 'row' or 'tensor', got {scaling!r}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.scaling = scaling

    def forward(self, input: Tensor) -> Tensor:
        return ops.fp8_linear(input, self.weight, self.bias, scaling=self.scaling)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scaling={self.scaling!r}"
