"""A torch.nn.Linear whose weight is int8 or int4 codes, and a call that puts it into a model."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.nn.replace import Report
from fastlm.ops._op import at_once
from fastlm.ops.quantize import QuantizedWeight, dequantize_weight, quantize_weight, zero_weight
from fastlm.ops.quantized_cpu import BF16_ROWS, PackedInt4


class QuantizedLinear(nn.Module):
    """y = x W^T + bias by ops.quantized_linear, W[n, k] = scale * (code - zero). The weight is frozen; gradients go to x.

    State dict: `codes`, `scale`, `zero` (if there is one) and `bias` (if there is one), the first three as buffers in the format
    of fastlm.ops.quantize.QuantizedWeight. `.half()` and `.to(dtype)` cast the bias and what `weight` gives, never codes and
    scales.

    Args:
        in_features, out_features, bias: as in torch.nn.Linear. A fresh layer is 0, to be loaded or made by `from_linear`.
        bits: 8 or 4.
        group_size: 32, 64 or 128 columns to a scale; None (8 bits only) for one a row.
        symmetric: False for zero points.
        scale_dtype: torch.float32 or torch.bfloat16.
        device, dtype: dtype is that of bias and of `weight`.

    Raises:
        ValueError: bits or group_size that do not exist.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.float32,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        q = zero_weight(out_features, in_features, bits, group_size, symmetric, scale_dtype, device)
        made = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        )
        self._take(q, made, torch.empty(0, device=device, dtype=dtype))

    def _take(self, q: QuantizedWeight, bias: nn.Parameter | None, like: Tensor) -> None:
        self.bits, self.group_size, self.in_features, self.out_features = q.bits, q.group_size, q.columns, len(q.codes)
        self.codes: Tensor
        self.scale: Tensor
        self.zero: Tensor | None
        for name, buffer in (("codes", q.codes), ("scale", q.scale), ("zero", q.zero)):
            self.register_buffer(name, buffer)
        self.bias = bias
        self.register_buffer("_like", like, persistent=False)  # without elements: remembers the dtype that .to() gave

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 8,
        group_size: int | None = None,
        *,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.float32,
    ) -> QuantizedLinear:
        """The layer with `linear`'s weight rounded to codes, on its device. The bias is shared with it and frozen no further.

        Raises:
            TypeError: linear is not a torch.nn.Linear. ValueError: an inf or NaN in the weight; bits or group_size that do not
            exist.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"QuantizedLinear: linear must be a torch.nn.Linear, got {type(linear).__name__}")
        return cls._made(linear, linear.weight, bits, group_size, symmetric, scale_dtype)

    @classmethod
    def _made(cls, layer: nn.Module | None, weight: Tensor, *format: Any) -> QuantizedLinear:
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        bias = None if layer is None else layer.bias
        made._take(quantize_weight(weight.detach(), *format), bias, weight.new_empty(0))
        return made if layer is None else made.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """W [out_features, in_features], dequantised anew at every access: for code that looks at a layer's weight."""
        return dequantize_weight(
            self.codes, self.scale, self.zero, bits=self.bits, group_size=self.group_size, columns=self.in_features,
            dtype=self._like.dtype,
        )  # fmt: skip

    def dequantize(self) -> nn.Linear:
        """A torch.nn.Linear with the weight that this layer stands for, in the dtype of `weight`; shares nothing with it."""
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        made.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone())
        return made

    def packed_int4(self, round_scales: bool = False) -> PackedInt4 | None:
        """The codes in the order of torch's int4 product for CPUs, made once and again when they change: a second copy of them.

        Seen are other tensors in place of codes and scale, and writes by torch's in-place operations; writes through `.data` or
        numpy are not. None for other weights than int4 ones on a CPU, with zero points, for shapes that the product does not
        take, and for scales that bf16 does not hold (scale_dtype=torch.bfloat16 makes ones that it does), unless round_scales.
        """
        tensors = (self.codes, self.scale)
        if self.bits != 4 or self.zero is not None or any(t.is_inference() or type(t) is not Tensor for t in tensors):
            return None
        # The tensors themselves: freed memory comes back under the same address, with versions that count from 0 again.
        kept = self.__dict__.get("_packed")
        if kept is None or any(a is not b or a._version != n for a, b, n in zip(tensors, *kept[:2])):
            kept = self.__dict__["_packed"] = (tensors, [t._version for t in tensors], {})
        found = kept[2]
        if round_scales not in found:
            exact = self.packed_int4() if round_scales else None
            found[round_scales] = exact or PackedInt4.of(
                *tensors, self.zero, self.group_size, self.in_features, round_scales
            )
        return found[round_scales]

    def _few_rows(self, x: Tensor) -> Tensor | None:
        """forward by torch's int4 product, which `auto` cannot take: it wants the codes packed in its own way.

        Not with a bias: the product rounds its sums to bf16, and a bias may cancel all but the error of that.
        """
        if self.bias is not None or not at_once("auto", x) or x.dtype != torch.bfloat16 or torch.is_grad_enabled():
            return None
        if not x.ndim or not x.numel() or torch.is_autocast_enabled("cpu"):
            return None
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > BF16_ROWS or rows.shape[1] != self.in_features:
            return None
        packed = self.packed_int4()
        return None if packed is None else packed.product(rows).view(*x.shape[:-1], self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_packed"}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> y [..., out_features] in x's dtype (in autocast's under autocast)."""
        if self.bits == 4:
            y = self._few_rows(x)
            if y is not None:
                return y
        return ops.quantized_linear(
            x, self.codes, self.scale, self.zero, self.bias, bits=self.bits, group_size=self.group_size
        )

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        self.__dict__.pop("_packed", None)
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:  # .half() is meant for activations
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        zero = "" if self.zero is None else ", symmetric=False"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}{zero}"
        )


@dataclass
class QuantizeReport(Report):
    """What `quantize_` did to a model: `replaced` and `kept` as in fastlm.nn.Report.

    Attributes:
        bytes_before, bytes_after: of the weights that were replaced.
    """

    bytes_before: int = 0
    bytes_after: int = 0
    _swapped: list[tuple[weakref.ref, str, nn.Module | None, nn.Module]] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.bytes_before:,} bytes of weights are {self.bytes_after:,} now"

    def undo(self) -> None:
        """Puts the original layers back. What has taken the place of ours since is left alone.

        Bit for bit if nothing was cast in between: an original takes the dtype and the device that our layer has by now.
        """
        for parent, name, before, ours in self._swapped:
            module = parent()
            if module is None:
                continue
            if name == _HEAD:
                if module.__dict__.get(name) is ours:
                    del module.__dict__[name]
                    if before is not None:
                        module.__dict__[name] = before
            elif module._modules.get(name) is ours:
                like = ours._like
                if (before.weight.dtype, before.weight.device) != (like.dtype, like.device):
                    before.to(like)
                module._modules[name] = before.train(ours.training)
        self._swapped.clear()


_HEAD = "quantized_head"  # not a submodule: it would be in the state dict
_SKIP = ("head", "lm_head")


def quantize_(
    model: nn.Module,
    bits: int = 8,
    group_size: int | None = None,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
    skip: Sequence[str] = _SKIP,
    tied: bool = False,
) -> QuantizeReport:
    """Turns every torch.nn.Linear of a model into a QuantizedLinear, in place; `undo()` of what it returns puts them back.

    Hugging Face's Conv1D (GPT-2), a Linear with a transposed weight, too. Subclasses of Linear, layers with hooks or a forward of
    their own, and layers whose weight another module holds as well are kept; the report says which and why. Embeddings and norms
    stay as they are.

    Args:
        model: the model. Its name for a layer does not change, its state dict has `codes`, `scale` (and `zero`) for `weight`.
        bits, group_size, symmetric, scale_dtype: see QuantizedLinear.
        skip: layers whose name, or last part of it, is one of these are kept; ("head", "lm_head") spares the output layer, which
            is the most sensitive one. A name that no layer has stands in the report's `kept`.
        tied: True gives a layer whose weight another module shares codes of its own, and to a fastlm Transformer with tied
            embeddings a quantised copy of its output matrix, `model.quantized_head`, with which a CPU decodes (it is not in the
            state dict, and does not follow the embedding if that is trained on). A `skip` of its name still spares the layer.
            A model of transformers whose tied lm_head became codes must not call tie_weights() any more (resizing the
            embedding, from_pretrained and save_pretrained may): it looks for the weight that is gone. undo() first.

    Returns:
        A QuantizeReport. It holds the original layers, for undo(): their memory is free as soon as it is dropped.

    Raises:
        TypeError: model is not an nn.Module, or is itself a torch.nn.Linear; skip is a string.
        ValueError: a weight with an inf or NaN, by name; nothing was changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise TypeError("quantize_: model is itself a torch.nn.Linear; take nn.QuantizedLinear.from_linear(model)")
    if isinstance(skip, str):
        raise TypeError(f"quantize_: skip must be a sequence of names, got the string {skip!r}; write ({skip!r},)")
    report, format = QuantizeReport(), (bits, group_size, symmetric, scale_dtype)
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append((f"{path}.{name}", module))
    made: dict[int, QuantizedLinear] = {}
    for path, parent in list(model.named_modules()):
        for name, layer in parent._modules.items():
            weight = _weight_of(layer)
            if weight is None:
                continue
            full = f"{path}.{name}" if path else name
            reason = _why_kept(full, layer, skip, tied, owners)
            if reason is not None:
                report.kept[full] = f"{type(layer).__name__}: {reason}"
                continue
            if id(layer) not in made:
                made[id(layer)] = _named(full, layer, weight, format)
                _count(report, weight, made[id(layer)])
            report.replaced[full] = f"{type(layer).__name__}: QuantizedLinear of {bits} bits"
            report._swapped.append((weakref.ref(parent), name, layer, made[id(layer)]))
    if tied and "head" not in skip and getattr(getattr(model, "config", None), "tie_embeddings", False):
        head = getattr(model, "head_weight", None)
        if isinstance(head, Tensor):
            ours = _named(_HEAD, None, head, format)
            report.replaced[_HEAD] = f"tied output matrix: QuantizedLinear of {bits} bits beside it"
            report._swapped.append((weakref.ref(model), _HEAD, vars(model).get(_HEAD), ours))
    seen = {part for full in (*report.kept, *report.replaced) for part in (full, full.rsplit(".", 1)[-1])}
    report.kept.update({name: "no layer has this name of skip" for name in skip if name not in (*seen, *_SKIP)})
    for parent, name, _, ours in report._swapped:
        if name == _HEAD:
            parent().__dict__[name] = ours
        else:
            parent()._modules[name] = ours
    return report


def _weight_of(layer: nn.Module | None) -> Tensor | None:
    """[out, in] of a Linear or of a Conv1D of transformers; None for anything else."""
    if isinstance(layer, nn.Linear):
        return layer.weight
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and isinstance(layer.weight, nn.Parameter):
        return layer.weight.t()
    return None


_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def _why_kept(name: str, layer: nn.Module, skip: Sequence[str], tied: bool, owners: dict[int, list]) -> str | None:
    if name in skip or name.rsplit(".", 1)[-1] in skip:
        return "its name is in skip"
    if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
        return "not exactly a torch.nn.Linear"
    if type(layer.weight) is not nn.Parameter or not layer.weight.is_floating_point() or layer.weight.is_meta:
        return "its weight is not a plain floating point tensor"
    if any(getattr(layer, hooks, None) for hooks in _HOOKS) or "forward" in vars(layer):
        return "it has hooks or a forward of its own"
    others = [] if tied else [other for other, module in owners[id(layer.weight)] if module is not layer]
    return f"{others[0]} is the same weight" if others else None


def _named(name: str, layer: nn.Module | None, weight: Tensor, format: tuple) -> QuantizedLinear:
    try:
        return QuantizedLinear._made(layer, weight, *format)
    except ValueError as error:
        raise ValueError(f"quantize_: {name}: {error}") from None


def _count(report: QuantizeReport, weight: Tensor, ours: QuantizedLinear) -> None:
    report.bytes_before += weight.nbytes
    report.bytes_after += sum(b.nbytes for b in (ours.codes, ours.scale, ours.zero) if b is not None)
