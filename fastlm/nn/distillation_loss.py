"""Losses from logits as modules: what ops.kl_div computes, with the options held by the module."""

from __future__ import annotations

import torch
from torch import Tensor

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
