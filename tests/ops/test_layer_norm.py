from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.testing import Case, check_accuracy, check_guards, check_op, check_reference, planted_bug

BACKENDS = ("torch", "triton")


def _args(dtype, device, shape=(2, 5, 40)):
    # A mean well away from 0: a one-pass variance would show.
    x = 3 + torch.randn(shape, dtype=torch.float64)
    weight = 1 + 0.3 * torch.randn(shape[-1], dtype=torch.float64)
    bias = 0.5 * torch.randn(shape[-1], dtype=torch.float64)
    return tuple(t.to(dtype).to(device) for t in (x, weight, bias))


def _args_residual(dtype, device, shape=(2, 5, 40)):
    return *_args(dtype, device, shape), torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


def _plain(x, weight, bias, residual=None):
    s = x if residual is None else x + residual
    y = F.layer_norm(s, s.shape[-1:], weight, bias, 1e-5)
    return y if residual is None else (y, s)


NORM = Case(
    "layer_norm",
    lambda x, w, b, backend: ops.layer_norm(x, w, b, 1e-5, backend=backend),
    _args,
    lambda dtype, device: _args(dtype, device, (2, 3, 5)),
    plain=_plain,
    empty=lambda dtype, device: _args(dtype, device, (0, 8)),
)
ADD_NORM = Case(
    "layer_norm",
    lambda x, w, b, r, backend: ops.layer_norm(x, w, b, 1e-5, residual=r, backend=backend),
    _args_residual,
    lambda dtype, device: _args_residual(dtype, device, (2, 3, 5)),
    plain=_plain,
    empty=lambda dtype, device: _args_residual(dtype, device, (0, 8)),
)
CASES = pytest.mark.parametrize("case", [NORM, ADD_NORM], ids=["norm", "add_norm"])


@CASES
def test_reference(case):
    check_reference(case)


def test_reference_is_torchs_formula():
    x, weight, bias = _args(torch.float64, "cpu")
    torch.testing.assert_close(
        ops.layer_norm(x, weight, bias, 1e-3, backend="reference"), F.layer_norm(x, (40,), weight, bias, 1e-3)
    )


@CASES
@pytest.mark.parametrize("backend", BACKENDS)
def test_contract(case, backend, device):
    check_op(case, backend, device)


@CASES
@pytest.mark.parametrize("dtype", NORM.dtypes, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(case, backend, dtype, device):
    check_accuracy(case, backend, dtype, device)


@pytest.mark.parametrize("n", [1, 16, 64, 123, 1024, 1030])
def test_widths(n, device):
    check_accuracy(ADD_NORM, "triton", torch.float32, device, _args_residual(torch.float32, device, (7, n)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["neither", "weight", "bias"])
def test_optional_parameters(backend, which, device):
    x, weight, bias = (t.requires_grad_() for t in _args(torch.float32, device))
    weight, bias = weight if which == "weight" else None, bias if which == "bias" else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    got, want = (ops.layer_norm(x, weight, bias, backend=name) for name in (backend, "reference"))
    torch.testing.assert_close(got, want)
    for g, w in zip(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (got, want))):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameters_get_no_gradient(backend, device):
    x, weight, bias = _args(torch.float32, device)
    x.requires_grad_()
    bias.requires_grad_()
    ops.layer_norm(x, weight, bias, backend=backend).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 10.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_parameters_with_bf16_input(backend, device):
    x, weight, bias = _args(torch.bfloat16, device)
    mixed = replace(NORM, plain=None)  # F.layer_norm takes mixed dtypes on the CPU only
    check_accuracy(mixed, backend, torch.bfloat16, device, (x, weight.float(), bias.float()))
    assert ops.layer_norm(x, weight.float(), bias.float(), backend=backend).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameter_gradients_are_summed_in_fp32(backend, device):
    args = _args(torch.bfloat16, device, (1000, 8))  # torch's own CPU kernel sums them in bf16 and is off by 10 %
    check_accuracy(replace(NORM, plain=None), backend, torch.bfloat16, device, args)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_residual_stream_with_bf16_branch(backend, parameters, device):
    x, weight, bias = (
        t.to(dtype) for t, dtype in zip(_args(torch.bfloat16, device), (torch.bfloat16, parameters, parameters))
    )
    inputs = (x, weight, bias, torch.randn(x.shape, device=device))
    check_accuracy(replace(ADD_NORM, plain=None), backend, torch.bfloat16, device, inputs)
    y, total = ops.layer_norm(*inputs[:3], residual=inputs[3], backend=backend)
    assert y.dtype == torch.bfloat16 and total.dtype == torch.float32


@pytest.mark.parametrize(
    "old, new",
    [
        ("centred = tl.where(live, x - mean[:, None], 0.0)", "centred = x - mean[:, None]"),  # the padding in the variance
        ("tl.sum(centred * centred, 1) / N", "tl.sum(x * x, 1) / N"),  # not centred
        ("dx = rstd * (g -", "dx = (g -"),  # a missing scale
        ("- (tl.sum(g, 1) / N)[:, None]", ""),  # the mean of the gradient forgotten
        ("xhat * (tl.sum(g * xhat, 1) / N)[:, None]", "xhat * 0"),  # the projection forgotten
        ("dbias += dy", "dbias = dy"),  # only the last block of rows counted
        ("row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)\n    col", "row = tl.program_id(0) * BLOCK_M + "
         "tl.arange(0, BLOCK_M)\n    M = M - 1\n    col"),  # the last row not written
        ("mask=live)\n    partial", "mask=live & (row < M - 1)[:, None])\n    partial"),  # the last row of dx not written
    ],
    ids=["padding", "centre", "scale", "mean", "projection", "dbias", "tail", "dx_tail"],
)  # fmt: skip
def test_planted_bug_is_seen(old, new, device):
    args = _args(torch.float32, device, (130, 40))  # on the CPU each program of the backward walks over two blocks
    with planted_bug("layer_norm", old, new), pytest.raises(AssertionError, match="max error|unwritten|NaN or inf"):
        check_accuracy(NORM, "triton", torch.float32, device, args)
        check_guards(NORM, "triton", device)


def test_write_outside_a_tensor_is_seen(device):
    # Only under guard bands: without them this bug corrupts the process.
    bug = planted_bug(
        "layer_norm", "live = live & (col < N)[None, :]\n    row64", "live = live & (col < N + 8)[None, :]\n    row64"
    )
    with bug, pytest.raises(AssertionError, match="wrote outside"):
        check_guards(NORM, "triton", device)


def test_errors():
    x, weight = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(ValueError, match=r"layer_norm: weight must be \[8\]"):
        ops.layer_norm(x, weight[:7])
    with pytest.raises(ValueError, match=r"layer_norm: bias must be \[8\]"):
        ops.layer_norm(x, weight, weight[:7])
    with pytest.raises(ValueError, match="layer_norm: residual must have x's shape"):
        ops.layer_norm(x, weight, residual=x[:1])
    with pytest.raises(TypeError, match="layer_norm: x must be floating point"):
        ops.layer_norm(torch.ones(2, 8, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        ops.layer_norm(x, weight, backend="tritn")
    with pytest.raises(ValueError, match="its kernels take float32, bfloat16, float16, got float64"):
        ops.layer_norm(x.double(), backend="triton")
