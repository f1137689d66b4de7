"""The MLP of a transformer as a module, plain and gated, over ops.mlp and ops.gated_mlp."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.nn.replace_table import projection
from fastlm.ops.activation import FORMS


def fusable(*layers: nn.Module) -> bool:
    """Whether every layer is no more than its weight and bias, so that an op may take these in its place: exactly a
    torch.nn.Linear, without hooks, a forward of its own or a weight that multiplies in a way of its own."""
    for layer in layers:
        if type(layer) is not nn.Linear:
            return False
        common = not (  # the usual answer without a call: a few calls are a tenth of a small MLP
            layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or "forward" in layer.__dict__
        ) and (type(layer._parameters.get("weight")) is nn.Parameter)
        if not common and projection(layer):
            return False
    return True


class MLP(nn.Module):
    """down(act(up(x))): x [..., d_model] -> y [..., d_out], computed by ops.mlp.

    `up` and `down` are torch.nn.Linear layers. With something else in their place (nn.LoRALinear, a quantised layer) or hooks
    on them they are called one after the other, with ops.activation between; `recompute` is then without effect.

    Args:
        d_model, d_hidden: widths of x and of the hidden layer. d_out: width of y; None means d_model.
        bias: whether both layers have one.
        activation: "gelu", "gelu_tanh", "silu", "relu" or "relu2"; see ops.activation.
        recompute: save x alone for the backward, and pay one more product there.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        d_out: int | None = None,
        *,
        bias: bool = True,
        activation: str = "gelu_tanh",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check("MLP", activation)
        self.activation, self.recompute = activation, recompute
        self.up = nn.Linear(d_model, d_hidden, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(d_hidden, d_out or d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up, self.down
        if not fusable(up, down):
            return down(ops.activation(up(x), self.activation))
        options = {"activation": self.activation, "recompute": self.recompute}
        return ops.mlp(x, up.weight, down.weight, up.bias, down.bias, **options)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, recompute={self.recompute}"


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): x [..., d_model] -> y [..., d_out], computed by ops.gated_mlp (SwiGLU with "silu").

    `gate`, `up` and `down` are torch.nn.Linear layers; what holds for others in their place, and the arguments, are MLP's.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        d_out: int | None = None,
        *,
        bias: bool = False,
        activation: str = "silu",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check("GatedMLP", activation)
        self.activation, self.recompute = activation, recompute
        self.gate = nn.Linear(d_model, d_hidden, bias=bias, device=device, dtype=dtype)
        self.up = nn.Linear(d_model, d_hidden, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(d_hidden, d_out or d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate, self.up, self.down
        if not fusable(gate, up, down):
            return down(ops.glu(gate(x), up(x), self.activation))
        options = {"activation": self.activation, "recompute": self.recompute}
        return ops.gated_mlp(x, gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias, **options)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, recompute={self.recompute}"


def _check(name: str, activation: str) -> None:
    if activation not in FORMS:
        raise ValueError(f"{name}: activation must be one of {', '.join(FORMS)}, got {activation!r}")
