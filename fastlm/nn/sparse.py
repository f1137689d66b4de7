"""2:4 semi-structured sparsity: of every four neighbouring weights of a row two are zero, which tensor cores can leave out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def prune_2_4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps the two weights of largest magnitude of every four neighbours along the last dimension.

    Args:
        weight: [..., D], fp16, bf16, fp32 or fp64, D a multiple of 4.

    Returns:
        The pruned weight, like `weight`: what is kept bit for bit, the rest 0; and the mask, bool, True where a weight is kept.
        Of equal magnitudes the first is kept; NaN counts as the largest. Paper: Mishra et al. 2021, arXiv:2104.08378.

    Raises:
        ValueError: D is no multiple of 4. TypeError: another dtype: codes (fp8, integers) are pruned before they
        are made.
    """
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TypeError(
            f"prune_2_4: weight must be float16, bfloat16, float32 or float64, got {weight.dtype}: "
            "prune the weight first and quantize what comes out"
        )
    if weight.ndim == 0 or weight.shape[-1] % 4:
        raise ValueError(f"prune_2_4: weight must be [..., D] with D a multiple of 4, got {list(weight.shape)}")
    weight = weight.detach()
    fours = weight.abs().unflatten(-1, (weight.shape[-1] // 4, 4))
    largest = fours.sort(dim=-1, descending=True, stable=True).indices[..., :2]
    mask = torch.zeros(fours.shape, dtype=torch.bool, device=weight.device).scatter_(-1, largest, True).flatten(-2)
    return torch.where(mask, weight, 0), mask


def why_not_sparse(weight: Tensor) -> str | None:
    """The reason for which torch's 2:4 kernels cannot take a weight [F, D], or None."""
    if not weight.is_cuda:
        return f"torch's 2:4 kernels need a CUDA GPU, the weight is on {weight.device.type}"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "2:4 products need compute capability 8.0 (Ampere) or newer"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"2:4 products take float16 and bfloat16, got {weight.dtype}"
    if weight.shape[0] % 32 or weight.shape[1] % 64:
        return f"2:4 products take F a multiple of 32 and D one of 64, got {list(weight.shape)}"
    return None


class SparseLinear24(torch.nn.Linear):
    """torch.nn.Linear whose weight is 2:4 sparse; parameters and state dict are nn.Linear's.

    A weight is pruned when it is loaded, and by `prune()`; from then on the places of its zeros are fixed: they get no gradient,
    and the product and the state dict take zero there whatever `weight` holds: an optimizer whose momentum is older than the
    pruning moves it (`weight` itself is set to zero again by `prune()`, which chooses anew, or by loading). The mask is not
    in the state dict: loading finds it again from the zeros. Where no gradient is needed and torch's sparse kernels can take
    the weight, it is compressed once and they are used; elsewhere the product is dense, with the zeros in it. Whether the
    former is faster depends on the machine and on the sizes: measure it with `sparse_gain`. A weight is compressed anew when
    it has moved or was written in place; what is written through `weight.data` is seen after `prune()` only.

    Args:
        in_features: a multiple of 4. out_features, bias, device, dtype: as torch.nn.Linear.
        sparse_kernel: False never uses torch's sparse kernels.

    Shapes: input [..., in_features] -> [..., out_features].

    Raises:
        ValueError: in_features is no multiple of 4.
    """

    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        sparse_kernel: bool = True,
    ) -> None:
        if in_features % 4:
            raise ValueError(f"SparseLinear24: in_features must be a multiple of 4, got {in_features}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.sparse_kernel = sparse_kernel
        self._compressed: tuple[Any, Tensor] | None = None
        shape = (out_features, in_features)
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool, device=device), persistent=False)
        self.prune()

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, *, sparse_kernel: bool = True) -> SparseLinear24:
        """A pruned copy of a linear layer, in its mode (training or not), its parameters with or without gradients as there."""
        made = cls(
            linear.in_features, linear.out_features, linear.bias is not None, linear.weight.device, linear.weight.dtype,
            sparse_kernel=sparse_kernel,
        )  # fmt: skip
        made.load_state_dict(linear.state_dict())
        for name, parameter in linear.named_parameters():
            made.get_parameter(name).requires_grad_(parameter.requires_grad)
        return made.train(linear.training)

    @torch.no_grad()
    def prune(self) -> None:
        """Chooses the weights to keep anew, by magnitude, and sets the others to zero."""
        if self.weight.is_meta:
            return
        pruned, mask = prune_2_4(self.weight)
        self.weight.copy_(pruned)
        self.mask, self._compressed = mask, None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = self.weight
        super()._load_from_state_dict(*args, **kwargs)
        if self.weight is not before and not self.weight.is_meta:  # assign=True: the caller's own tensor stays as it is
            self.weight = torch.nn.Parameter(self.weight.detach().clone(), self.weight.requires_grad)
        self.prune()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.weight
        if not keep_vars and not weight.is_meta and weight.detach().masked_fill(self.mask, 0).any():
            destination[prefix + "weight"] = torch.where(self.mask, weight.detach(), 0)

    def forward(self, input: Tensor) -> Tensor:
        needs_grad = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if (
            self.sparse_kernel
            and not needs_grad
            and input.dtype == self.weight.dtype
            and why_not_sparse(self.weight) is None
        ):
            return F.linear(input, self._compressed_weight(), self.bias)
        return F.linear(input, torch.where(self.mask, self.weight, 0), self.bias)

    def _compressed_weight(self) -> Tensor:
        key = (self.weight.data_ptr(), self.weight._version, self.weight.device)
        if self._compressed is None or self._compressed[0] != key:
            dense = torch.where(self.mask, self.weight.detach(), 0)
            self._compressed = key, torch.sparse.to_sparse_semi_structured(dense)
        return self._compressed[1]


@dataclass(frozen=True)
class SparseGain:
    """What `sparse_gain` found: median times in milliseconds, and gain = dense_ms / sparse_ms; or None in all and the reason."""

    rows: int
    dense_ms: float | None
    sparse_ms: float | None
    gain: float | None
    reason: str | None

    def __str__(self) -> str:
        if self.gain is None:
            return f"2:4 sparse product, {self.rows} rows: no gain: {self.reason}"
        verdict = f"{self.gain:.2f}x" if self.gain > 1 else f"no gain ({self.gain:.2f}x)"
        return f"2:4 sparse product, {self.rows} rows: {verdict}: dense {self.dense_ms:.3f} ms, sparse {self.sparse_ms:.3f} ms"


@torch.no_grad()
def sparse_gain(weight: Tensor, rows: int, *, calls: int = 50) -> SparseGain:
    """Times x weight^T for x [rows, D], dense and by torch's 2:4 kernels on the pruned weight, in turns on this machine.

    Args:
        weight: [F, D], where and in the dtype in which it is to be used.
        rows: of x. calls: of each, whose median is taken.

    Returns:
        A SparseGain; its `reason` says why there can be none, as on a CPU.
    """
    if weight.ndim != 2:
        raise ValueError(f"sparse_gain: weight must be [F, D], got {list(weight.shape)}")
    reason = why_not_sparse(weight)
    if reason is not None:
        return SparseGain(rows, None, None, None, reason)
    x = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    pruned, _ = prune_2_4(weight)
    compressed = torch.sparse.to_sparse_semi_structured(pruned)
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(calls + 3):
        for name, matrix in (("dense", pruned), ("sparse", compressed)):
            times[name].append(_event_ms(lambda matrix=matrix: F.linear(x, matrix)))
    dense, sparse = (sorted(column[3:])[calls // 2] for column in times.values())
    return SparseGain(rows, dense, sparse, dense / sparse, None)


def _event_ms(call: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
