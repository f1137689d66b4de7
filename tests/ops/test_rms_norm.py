import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.testing import Case, check_accuracy, check_guards, check_op, check_reference, planted_bug

BACKENDS = ("torch", "triton")


def _args(dtype, device, shape=(2, 5, 40)):
    x = torch.randn(shape, dtype=torch.float64)
    weight = 1 + 0.3 * torch.randn(shape[-1], dtype=torch.float64)
    return x.to(dtype).to(device), weight.to(dtype).to(device)


def _args_residual(dtype, device, shape=(2, 5, 40)):
    x, weight = _args(dtype, device, shape)
    return x, weight, torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


def _plain(x, weight, residual=None):
    s = x if residual is None else x + residual
    y = F.rms_norm(s, s.shape[-1:], weight, 1e-5)
    return y if residual is None else (y, s)


NORM = Case(
    "rms_norm",
    lambda x, w, backend: ops.rms_norm(x, w, 1e-5, backend=backend),
    _args,
    lambda dtype, device: _args(dtype, device, (2, 3, 5)),
    plain=_plain,
    empty=lambda dtype, device: _args(dtype, device, (0, 8)),
)
ADD_NORM = Case(
    "rms_norm",
    lambda x, w, r, backend: ops.rms_norm(x, w, 1e-5, residual=r, backend=backend),
    _args_residual,
    lambda dtype, device: _args_residual(dtype, device, (2, 3, 5)),
    plain=_plain,
    empty=lambda dtype, device: _args_residual(dtype, device, (0, 8)),
)
CASES = pytest.mark.parametrize("case", [NORM, ADD_NORM], ids=["norm", "add_norm"])


@CASES
def test_reference(case):
    check_reference(case)


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


def test_no_weight(device):
    x = torch.randn(3, 20, device=device)
    torch.testing.assert_close(ops.rms_norm(x, backend="triton"), ops.rms_norm(x, backend="reference"))


def test_fp32_residual_stream_with_bf16_branch(device):
    x, weight, _ = _args_residual(torch.bfloat16, device)
    residual = torch.randn(x.shape, device=device)
    want_y, want_sum = ops.rms_norm(x, weight, residual=residual, backend="reference")
    for backend in BACKENDS:
        y, total = ops.rms_norm(x, weight, residual=residual, backend=backend)
        assert y.dtype == torch.bfloat16 and total.dtype == torch.float32
        torch.testing.assert_close(total, want_sum)
        torch.testing.assert_close(y, want_y)


@pytest.mark.parametrize(
    "old, new",
    [
        ("tl.sum(x * x, 1) / N + eps", "tl.sum(x * x, 1) / BLOCK_N + eps"),  # the mean over the padded width
        ("dx = rstd * (g -", "dx = (g -"),  # a missing scale
        ("xhat * (tl.sum(g * xhat, 1) / N)[:, None]", "xhat * 0"),  # the projection forgotten
        ("row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)\n    col", "row = tl.program_id(0) * BLOCK_M + "
         "tl.arange(0, BLOCK_M)\n    M = M - 1\n    col"),  # the last row not written
    ],
    ids=["mean", "scale", "projection", "tail"],
)  # fmt: skip
def test_planted_bug_is_seen(old, new, device):
    with planted_bug("rms_norm", old, new), pytest.raises(AssertionError):
        check_accuracy(NORM, "triton", torch.float32, device)
        check_op(NORM, "triton", device)


def test_write_outside_a_tensor_is_seen(device):
    # Only under guard bands: without them this bug corrupts the process.
    bug = planted_bug(
        "rms_norm", "live = live & (col < N)[None, :]\n    row64", "live = live & (col < N + 8)[None, :]\n    row64"
    )
    with bug, pytest.raises(AssertionError, match="wrote outside"):
        check_guards(NORM, "triton", device)


def test_errors():
    x, weight = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \[8\]"):
        ops.rms_norm(x, weight[:7])
    with pytest.raises(ValueError, match="rms_norm: residual must have x's shape"):
        ops.rms_norm(x, weight, residual=x[:1])
    with pytest.raises(TypeError, match="rms_norm: x must be floating point"):
        ops.rms_norm(torch.ones(2, 8, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        ops.rms_norm(x, weight, backend="tritn")
    with pytest.raises(ValueError, match="its kernels take float32, bfloat16, float16, got float64"):
        ops.rms_norm(x.double(), backend="triton")


@CASES
def test_torch_form_differentiates_twice(case):
    args = [a.requires_grad_() for a in case.tiny(torch.float64, "cpu")]
    assert torch.autograd.gradgradcheck(lambda *a: case.fn(*a, backend="torch"), args)
