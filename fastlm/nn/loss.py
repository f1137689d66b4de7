"""torch's linear layer with its cross entropy, over this library's op: same constructor, same state dict."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss

from fastlm import ops


class LinearCrossEntropyLoss(_WeightedLoss):
    """torch.nn.LinearCrossEntropyLoss (torch 2.13), computed by ops.linear_cross_entropy: the logits are never stored.

    forward(input [..., D], target int64 [...], token_weight=None [...], denominator=None) -> the loss, 0-d or like target.

    The parameters are torch's: `linear.weight` [num_classes, in_features], `linear.bias`, and the buffer `weight` of class
    weights. Tie it to an embedding by `loss.linear.weight = embedding.weight`. The weight is used inside this module's forward,
    so FSDP gathers it in time.

    Args:
        in_features, num_classes, bias, device, dtype, reduction, weight, ignore_index, label_smoothing: as in torch.
        out_features, options: as in torch, for its callers: only () is known, and the op always works in chunks, so options of
            chunking have no effect.
        scale, softcap, z_loss, weight_grad_dtype, logits_bytes: see ops.linear_cross_entropy.

    Raises ValueError for out_features other than () and for class weights of another shape, and what the op raises.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options=None,
        scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        weight_grad_dtype: torch.dtype | None = None,
        logits_bytes: int | None = None,
    ) -> None:
        if tuple(out_features) != ():
            raise ValueError(
                f"LinearCrossEntropyLoss: out_features must be (), got {tuple(out_features)}; "
                "take torch.nn.LinearCrossEntropyLoss for a loss of several dimensions"
            )
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"LinearCrossEntropyLoss: weight must be [{num_classes}], got {list(weight.shape)}")
        super().__init__(weight, reduction=reduction)
        self.num_classes, self.out_features, self.options = num_classes, (), options
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.scale, self.softcap, self.z_loss = scale, softcap, z_loss
        self.weight_grad_dtype, self.logits_bytes = weight_grad_dtype, logits_bytes
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        return ops.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            scale=self.scale,
            softcap=self.softcap,
            z_loss=self.z_loss,
            token_weight=token_weight,
            denominator=denominator,
            weight_grad_dtype=self.weight_grad_dtype,
            logits_bytes=self.logits_bytes,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
