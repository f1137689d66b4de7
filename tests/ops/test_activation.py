"""The ops `activation` and `glu`, which share the stem `activation`."""

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.testing import Case, check_accuracy, check_guards, check_op, check_reference, check_strides, planted_bug

BACKENDS = ("torch", "triton")
PLAIN = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}


def _args(dtype, device, shape=(2, 5, 43)):
    return ((3 * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device),)


def _args_glu(dtype, device, shape=(2, 5, 43)):
    return _args(dtype, device, shape) + _args(dtype, device, shape)


def _case(kind, gated):
    make = _args_glu if gated else _args
    fn = ops.glu if gated else ops.activation
    act = PLAIN[kind]
    return Case(
        "glu" if gated else "activation",
        lambda *args, backend: fn(*args, kind, backend=backend),
        make,
        lambda dtype, device: make(dtype, device, (2, 3, 4)),
        plain=(lambda gate, up: act(gate) * up) if gated else act,
        empty=lambda dtype, device: make(dtype, device, (3, 0)),
    )


CASES = {f"{'glu-' if gated else ''}{kind}": _case(kind, gated) for gated in (False, True) for kind in PLAIN}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@ALL
def test_reference(case):
    check_reference(case)


# The battery is the same whatever the kind, so each kind goes through it in one of the two ops.
@pytest.mark.parametrize("name", ["gelu", "relu2", "glu-gelu_tanh", "glu-silu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_contract(name, backend, device):
    check_op(CASES[name], backend, device)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(case, backend, dtype, device):
    check_accuracy(case, backend, dtype, device)


@pytest.mark.parametrize("kind", PLAIN)
def test_tails(kind, device):
    # Where exp overflows or a difference of nearly equal numbers would lose everything.
    x = torch.cat([torch.linspace(-200, 200, 801), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4])]).to(device)
    check_accuracy(CASES[kind], "triton", torch.float32, device, (x,))
    check_accuracy(CASES["glu-" + kind], "triton", torch.float32, device, (x, torch.full_like(x, -3.0)))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(kind, backend, device):
    x = torch.tensor([float("nan"), 1.0], device=device, requires_grad=True)
    y = ops.activation(x, kind, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.isnan().tolist() == [True, False]
    assert dx[0].isnan() or kind.startswith("relu")  # torch's relu has slope 0 there


def test_halves_of_one_product_are_read_in_place(device, monkeypatch):
    check_strides(CASES["glu-silu"], "triton", device)
    product = torch.randn(4, 3, 2 * 24, device=device)
    gate, up = product.chunk(2, -1)
    want = F.silu(gate) * up
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: pytest.fail("a copy was made"))
    torch.testing.assert_close(ops.glu(gate, up, backend="triton"), want)


@pytest.mark.parametrize("shape", [(), (1,), (5000,), (3, 1500), (70, 8), (2, 1, 33)], ids=str)
def test_shapes(shape, device):
    for args in (_args_glu(torch.float32, device, shape), [t.mT for t in _args_glu(torch.float32, device, shape)]
                 if len(shape) > 1 else None):  # fmt: skip
        if args is not None:
            check_accuracy(CASES["glu-silu"], "triton", torch.float32, device, tuple(args))


def test_several_rows_and_columns_of_tiles(device):
    # The strided path: rows of 1100 at a distance of 2200 need two tiles across and two down.
    gate, up = torch.randn(3, 2200, device=device).chunk(2, -1)
    check_accuracy(CASES["glu-silu"], "triton", torch.float32, device, (gate, up))


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("gelu", "tl.exp(-0.5 * x * x)", "tl.exp(-x * x)"),
        ("gelu", "x * 0.3989422804014327", "x"),  # a missing scale
        ("gelu_tanh", "0.134145", "0.044715"),  # the derivative of the cube forgotten
        ("glu-silu", "s + x * slope\n    else", "s\n    else"),
        ("glu-silu", "        dy *= up\n", ""),  # dgate not scaled by up
        ("relu2", "return r * r, 2.0 * r", "return r * r, r"),
        ("relu", "tl.where(x > 0, 1.0, 0.0)", "tl.where(x > 0, 1.0, 1.0)"),
        ("glu-silu", "return row, col, (row < M) & (col < N)", "return row, col, (row < M - 1) & (col < N)"),
        ("silu", "return row, col, (row < M) & (col < N)", "return row, col, (row < M) & (col < N - 1)"),
        ("glu-silu", "up_ptr + row * stride_um", "up_ptr + row * stride_xm // 2"),
    ],
    ids=["exponent", "scale", "cube", "slope", "gate", "two", "dead", "tail_row", "tail_column", "stride"],
)
def test_planted_bug_is_seen(name, old, new, device):
    case = CASES[name]
    args = _args(torch.float32, device) if case.op == "activation" else torch.randn(6, 80, device=device).chunk(2, -1)
    with planted_bug(case.op, old, new), pytest.raises(AssertionError, match="max error|unwritten|NaN or inf"):
        check_accuracy(case, "triton", torch.float32, device, args)
        check_guards(case, "triton", device)  # an unwritten element may by chance hold what was right


@pytest.mark.parametrize("name", ["silu", "glu-silu"])
def test_write_outside_a_tensor_is_seen(name, device):
    # Only under guard bands: without them this bug corrupts the process.
    bug = planted_bug(CASES[name].op, "(row < M) & (col < N)", "(row < M) & (col < N + 8)")
    with bug, pytest.raises(AssertionError, match="wrote outside"):
        check_guards(CASES[name], "triton", device)


def test_errors():
    x = torch.randn(2, 8)
    with pytest.raises(
        ValueError, match="activation: the activation must be one of gelu, gelu_tanh, silu, relu, relu2, got 'swish'"
    ):
        ops.activation(x, "swish")
    with pytest.raises(ValueError, match="glu: the activation must be one of"):
        ops.glu(x, x, "swiglu")
    with pytest.raises(ValueError, match=r"glu: up must have gate's shape \[2, 8\], got \[2, 7\]"):
        ops.glu(x, x[:, :7])
    with pytest.raises(TypeError, match="glu: up must have gate's dtype"):
        ops.glu(x, x.bfloat16())
    with pytest.raises(TypeError, match="activation: x must be floating point"):
        ops.activation(torch.ones(2, dtype=torch.int64), "silu")
    with pytest.raises(ValueError, match="its kernels take float32, bfloat16, float16, got float64"):
        ops.glu(x.double(), x.double(), backend="triton")
