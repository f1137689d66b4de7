"""The ops `mlp` and `gated_mlp`, which share the stem `mlp`."""

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.testing import (
    Case,
    check_accuracy,
    check_autocast,
    check_compile,
    check_guards,
    check_op,
    check_reference,
    check_safety,
    check_strides,
    check_transforms,
)

PLAIN = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}
KINDS = pytest.mark.parametrize("kind", PLAIN)
BACKENDS = ("torch",)


def _make(bias, layers, sizes=(7, 19, 21, 13)):
    """x [2, S, D], `layers` matrices [F, D] (2.5: one of [2 F, D]) and one [D_out, F], and their biases."""

    def make(dtype, device):
        S, D, hidden, D_out = sizes
        rows = [hidden] * layers if layers in (1, 2) else [2 * hidden]
        shapes = [(2, S, D), *((n, D) for n in rows), (D_out, hidden)]
        shapes += [(n,) for n in (*rows, D_out)] if bias else []
        return tuple(
            (torch.randn(s, dtype=torch.float64) * (1 if i == 0 or len(s) == 1 else 1.5 * s[-1] ** -0.5))
            .to(dtype)
            .to(device)
            for i, s in enumerate(shapes)
        )

    return make


def _case(kind, layers=1, bias=False, recompute=False):
    act = PLAIN[kind]

    def fn(x, *rest, backend):
        options = {"activation": kind, "recompute": recompute, "backend": backend}
        if layers == 1:
            return ops.mlp(x, *rest, **options)
        if layers == 2:
            return ops.gated_mlp(x, *rest, **options)
        return ops.gated_mlp(x, rest[0], None, rest[1], *(rest[2:] and (rest[2], None, rest[3])), **options)

    def plain(x, *rest):
        weights, biases = (rest[: len(rest) // 2], rest[len(rest) // 2 :]) if bias else (rest, [None] * len(rest))
        pre = [F.linear(x, w, b) for w, b in zip(weights[:-1], biases[:-1])]
        pre = pre[0].chunk(2, -1) if layers == "packed" else pre
        return F.linear(act(pre[0]) if layers == 1 else act(pre[0]) * pre[1], weights[-1], biases[-1])

    return Case(
        "mlp" if layers == 1 else "gated_mlp",
        fn,
        _make(bias, layers),
        _make(bias, layers, (2, 3, 2, 2)),
        plain=plain,
        autocast="cast",
        empty=_make(bias, layers, (0, 5, 4, 3)),
    )


CASES = {
    "mlp": _case("gelu_tanh", bias=True),
    "mlp-recompute": _case("relu2", recompute=True),
    "gated": _case("silu", 2, bias=True),
    "gated-recompute": _case("silu", 2, recompute=True),
    "packed": _case("silu", "packed"),
    "packed-recompute": _case("gelu", "packed", bias=True, recompute=True),
}
ALL = pytest.mark.parametrize("name", CASES)


@ALL
def test_reference(name):
    check_reference(CASES[name])


@ALL
def test_contract_of_torch(name, device):
    case = CASES[name]
    if "recompute" in name or device == "cuda":
        return check_op(case, "torch", device)
    for check in (check_safety, check_guards, check_strides, check_autocast, check_transforms, check_compile):
        check(case, "torch", device)  # its derivatives of any order are torch's own
    return None


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(name, backend, dtype, device):
    check_accuracy(CASES[name], backend, dtype, device)


@KINDS
@pytest.mark.parametrize("layers", [1, "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_activation(kind, layers, backend, device):
    check_accuracy(_case(kind, layers, recompute=True), backend, torch.float32, device)


def test_errors():
    x, w, d = torch.randn(3, 8), torch.randn(12, 8), torch.randn(5, 12)
    with pytest.raises(
        ValueError, match="mlp: the activation must be one of gelu, gelu_tanh, silu, relu, relu2, got 'swish'"
    ):
        ops.mlp(x, w, d, activation="swish")
    with pytest.raises(ValueError, match=r"mlp: up_weight must be \[., 8\] like x's last dimension, got \[12, 7\]"):
        ops.mlp(x, w[:, :7], d)
    with pytest.raises(ValueError, match=r"mlp: down_weight must be \[., 12\] like up_weight's rows, got \[5, 11\]"):
        ops.mlp(x, w, d[:, :11])
    with pytest.raises(ValueError, match=r"mlp: up_bias must be \[12\] like up_weight's rows, got \[5\]"):
        ops.mlp(x, w, d, torch.randn(5))
    with pytest.raises(ValueError, match=r"gated_mlp: down_weight must be \[., 6\] like gate_weight's rows"):
        ops.gated_mlp(x, w, None, d)
    with pytest.raises(ValueError, match=r"gated_mlp: up_weight must be \[12, 8\] like gate_weight, got \[11, 8\]"):
        ops.gated_mlp(x, w, w[:11], d)
    with pytest.raises(ValueError, match=r"gated_mlp: without up_weight gate_weight must be \[2 F, D\], got \[11, 8\]"):
        ops.gated_mlp(x, w[:11], None, d)
    with pytest.raises(ValueError, match="gated_mlp: up_bias must be None without up_weight"):
        ops.gated_mlp(x, w, None, d[:, :6], None, torch.randn(6))
    with pytest.raises(TypeError, match="mlp: x must be floating point, got torch.int64"):
        ops.mlp(torch.ones(3, 8, dtype=torch.int64), w, d)
    with pytest.raises(TypeError, match="mlp: down_bias must be floating point, got torch.int64"):
        ops.mlp(x, w, d, None, torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="mlp: x must be .* got a single number"):
        ops.mlp(torch.tensor(1.0), w, d)
