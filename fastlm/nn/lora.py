"""A torch.nn.Linear with a low-rank update that is trained in its place."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.kernels.matmul import cast
from fastlm.nn.quantized_linear import QuantizedLinear
from fastlm.ops._tensor import autocast_dtype


class LoRALinear(nn.Module):
    """base(x) + (alpha / rank) * (x a^T) b^T, computed by ops.lora_linear (Hu et al. 2021, arXiv:2106.09685).

    At first the update is zero: a [rank, in_features] is drawn as torch.nn.Linear draws its weight, b [out_features, rank] is 0.
    The state dict holds `base.weight`, `base.bias` (if there is one), `a` and `b`, merged or not. There is no dropout on the
    update's input.

    Args:
        linear: the layer to wrap, kept as `base`; its parameters are frozen (requires_grad becomes False). Only its weight and
            bias are used: its forward, and hooks on it, do not run. A QuantizedLinear runs itself, on its codes (QLoRA,
            Dettmers et al. 2023, arXiv:2305.14314), and the update is added to what it gives; it cannot be merged.
        rank: r >= 1.
        alpha: the update is scaled by alpha / rank; None means rank, a scale of 1.

    Raises:
        TypeError: linear is not a torch.nn.Linear or a QuantizedLinear. ValueError: rank < 1.
    """

    def __init__(self, linear: nn.Linear | QuantizedLinear, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        if not isinstance(linear, (nn.Linear, QuantizedLinear)):
            raise TypeError(
                f"LoRALinear: linear must be a torch.nn.Linear or nn.QuantizedLinear, got {type(linear).__name__}"
            )
        if rank < 1:
            raise ValueError(f"LoRALinear: rank must be at least 1, got {rank}")
        weight = linear._like if isinstance(linear, QuantizedLinear) else linear.weight
        self.base = linear.requires_grad_(False)
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        options = {"device": weight.device, "dtype": weight.dtype}
        self.a = nn.Parameter(torch.empty(rank, linear.in_features, **options))
        self.b = nn.Parameter(torch.empty(linear.out_features, rank, **options))
        self.merged_weight: Tensor | None
        self.register_buffer("merged_weight", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A fresh update, which is zero; what was merged is forgotten."""
        self.unmerge()
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    @property
    def scale(self) -> float:
        """The factor of the update, alpha / rank."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> y [..., out_features]."""
        if self.merged_weight is not None and not torch.is_grad_enabled() and x.is_floating_point():
            dtype = autocast_dtype(x)
            dtype = x.dtype if dtype is None or x.dtype == torch.float64 else dtype  # as in the op
            return nn.functional.linear(*cast(dtype, x, self.merged_weight, self.base.bias))
        if isinstance(self.base, QuantizedLinear):
            return self._over_codes(x)
        return ops.lora_linear(x, self.base.weight, self.a, self.b, self.base.bias, scale=self.scale)

    def _over_codes(self, x: Tensor) -> Tensor:
        y = self.base(x)
        a, b = cast(y.dtype, self.a, self.b)
        u = nn.functional.linear(x.to(y.dtype), a)
        # One product with the sum: an update that is rounded first would be rounded twice.
        rows = torch.addmm(y.reshape(-1, y.shape[-1]), u.reshape(-1, self.rank), b.t(), alpha=self.scale)
        return rows.view(y.shape)

    @torch.no_grad()
    def merge(self) -> None:
        """Makes calls without gradients a single product, with weight + scale * b a, rounded once to weight's dtype.

        A second matrix of weight's size, from the a and b of now, beside the weight itself: so `unmerge` gives back the very
        bits, and the state dict stays what it is. Calls with gradients enabled go on computing the update.

        Raises:
            TypeError: the base is a QuantizedLinear.
        """
        if isinstance(self.base, QuantizedLinear):
            raise TypeError(
                "LoRALinear.merge: the base is a QuantizedLinear, whose codes cannot hold the update and whose weight is stored "
                "nowhere else; take to_linear() for a layer with the dequantised weight and the update"
            )
        self.merged_weight = self._sum()

    def _sum(self) -> Tensor:
        """weight + scale * b a, rounded once to weight's dtype."""
        weight = self.base.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        update = self.b.to(wide) @ self.a.to(wide)
        return update.mul_(self.scale).add_(weight).to(weight.dtype)

    def unmerge(self) -> None:
        """Undoes `merge`."""
        self.merged_weight = None

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain torch.nn.Linear with weight + scale * b a, for export; shares nothing with this layer."""
        made = nn.Linear(self.base.in_features, self.base.out_features, self.base.bias is not None, device="meta")
        made.weight = nn.Parameter(self._sum())
        if self.base.bias is not None:
            made.bias = nn.Parameter(self.base.bias.detach().clone())
        return made

    def _load_from_state_dict(self, *args) -> None:
        self.unmerge()  # what was merged is not what is being loaded
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"
