"""Losses from logits as modules: what ops.kl_div computes, with the options held by the module."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.cross_entropy import check_loss_options, cross_entropy
from fastlm.ops.kl_div import check_options, kl_div


class KLDivLoss(torch.nn.Module):
    """Divergence between a student's and a teacher's distributions: forward KL (beta 0), reverse KL (1), or between.

    Takes logits, unlike torch.nn.KLDivLoss, which takes log-probabilities and leaves the softmaxes to its caller; means are over
    rows (torch's "batchmean"). For the formula and the options see ops.kl_div.

    forward(student_logits [..., V], teacher_logits [..., V], mask=None, token_weight=None, denominator=None) -> the loss, 0-d, or
    [...] for reduction "none". Raises ValueError for an option out of range.
    """

    def __init__(self, beta: float = 0.0, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        check_options("KLDivLoss", torch.Size(), beta, temperature, None, None, reduction, None)
        self.beta, self.temperature, self.reduction = beta, temperature, reduction

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        mask: Tensor | None = None,
        token_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        return kl_div(
            student_logits,
            teacher_logits,
            beta=self.beta,
            temperature=self.temperature,
            mask=mask,
            token_weight=token_weight,
            reduction=self.reduction,
            denominator=denominator,
        )

    def extra_repr(self) -> str:
        return f"beta={self.beta}, temperature={self.temperature}, reduction={self.reduction!r}"


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss over logits [..., V] and class numbers [...], computed by ops.cross_entropy, in fp32.

    Same constructor (size_average and reduce only None, which torch has deprecated) and state dict, and scale, softcap and z_loss
    beside (see ops.cross_entropy). Two differences: classes lie along the last dimension whatever the number of dimensions, and a
    mean without a row that counts is 0 instead of NaN.

    forward(input, target, token_weight=None, denominator=None) -> the loss, 0-d, or [...] for reduction "none".
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: None = None,
        ignore_index: int = -100,
        reduce: None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
    ) -> None:
        if size_average is not None or reduce is not None:
            raise ValueError(
                "CrossEntropyLoss: size_average and reduce must be None (torch has deprecated them), got "
                f"{size_average!r} and {reduce!r}; pass reduction='mean', 'sum' or 'none'"
            )
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        check_loss_options("CrossEntropyLoss", reduction, label_smoothing, scale, softcap, z_loss)
        self.scale, self.softcap, self.z_loss = scale, softcap, z_loss

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            scale=self.scale,
            softcap=self.softcap,
            z_loss=self.z_loss,
            token_weight=token_weight,
            denominator=denominator,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, scale={self.scale}, softcap={self.softcap}, z_loss={self.z_loss}"
