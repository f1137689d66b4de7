"""The 8-bit codes of optimizer states: the error the docstring states, no bias, and what must not happen to small values."""

import inspect

import pytest
import torch

from fastlm import ops
from fastlm.kernels.moment_bound import least_root
from fastlm.kernels.optimizer_state import write_state
from fastlm.ops.block_quantize import BLOCK, block_dequantize, block_quantize
from fastlm.testing import planted_bug
from tests.ops.optimizer_cases import BACKENDS

each_kind = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def _values(signed, n=5000, dtype=torch.float32):
    """Magnitudes over many orders within a block."""
    x = torch.randn(n, dtype=dtype) * 10 ** (-4 * torch.rand(n, dtype=dtype))
    return x if signed else x.square()


def _part(x, scales):
    return x.abs() / scales.repeat_interleave(BLOCK)[: x.numel()]


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_stated_error(signed, dtype):
    x = _values(signed, dtype=dtype)
    codes, scales = block_quantize(x, signed)
    assert codes.dtype == (torch.int8 if signed else torch.uint8) and codes.shape == x.shape
    assert scales.dtype == dtype and scales.shape == (20,)
    padded = torch.nn.functional.pad(x, (0, 120)).view(20, BLOCK)
    assert torch.equal(scales, padded.abs().amax(1))
    found = block_dequantize(codes, scales)
    part, found_part = (t.double() for t in (_part(x, scales), _part(found, scales)))
    if not signed:
        part, found_part = part.sqrt(), found_part.sqrt()  # the root that divides
    error, stated = (found_part - part).abs() / part, (0.016 if signed else 0.008) * part**-0.25
    # Half a step is the first term of what half a code does: true to a tenth where codes are above 5.
    assert (error <= 1.1 * stated)[part**0.25 * (127 if signed else 255) > 6].all()
    assert error[part > 0.5].max() > 0.5 * (0.016 if signed else 0.008)  # nor is less stated than there is
    assert (found.sign() * x.sign() >= 0).all()


@each_kind
def test_a_second_trip_changes_nothing(signed):
    codes, scales = block_quantize(_values(signed), signed)
    again, same = block_quantize(block_dequantize(codes, scales), signed)
    assert torch.equal(again, codes) and torch.equal(same, scales)  # the largest value of a block is kept exactly
    middle = torch.full((codes.numel(),), 0.5)
    again, same = block_quantize(block_dequantize(codes, scales), signed, middle)
    assert torch.equal(again, codes) and torch.equal(same, scales)


@each_kind
def test_random_codes_have_the_right_mean(signed):
    x, total = _values(signed, 512), torch.zeros(512, dtype=torch.float64)
    for _ in range(4000):
        codes, scales = block_quantize(x, signed, (torch.randint(0, 65536, (512,)) + 0.5) / 65536)
        near = block_quantize(x, signed)[0].int()
        assert (codes.int() - near).abs().max() <= 1
        total += block_dequantize(codes, scales)
    part = _part(x, scales).double()
    step = part ** (1 - 1 / (4 if signed else 8)) * (4 / 127 if signed else 8 / 255) * scales.repeat_interleave(BLOCK)
    sure = part > (3 / 127) ** 4 if signed else part > (3 / 255) ** 8  # below, the unsigned code 0 is not allowed
    assert ((total / 4000 - x).abs() / step)[sure].max() < 6 * 0.5 / 4000**0.5  # six standard deviations


def test_small_second_moments_keep_a_code():
    x = torch.tensor([1.0, 1e-30, 1e-38, 0.0])
    for random in (None, torch.full((4,), 0.99)):
        assert block_quantize(x, False, random)[0].tolist()[1:] == [1, 1, 0]


@each_kind
def test_zeros_infinities_and_nan(signed):
    codes, scales = block_quantize(torch.zeros(3, 100), signed)
    assert codes.shape == (3, 100) and not codes.any() and not scales.any()
    assert torch.equal(block_dequantize(codes, scales), torch.zeros(3, 100))
    for bad in (float("inf"), float("nan")):
        x = _values(signed, 600)
        x[300] = bad
        found = block_dequantize(*block_quantize(x, signed, torch.full((600,), 0.5)))
        assert found[256:512].isnan().all() and found[:256].isfinite().all() and found[512:].isfinite().all()
    assert block_quantize(torch.zeros(0), signed)[1].shape == (0,)


# --- m beside v ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta1, beta2", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.9), (0.5, 0.9)])
def test_no_gradients_bring_m_further_from_v(beta1, beta2):
    least, m, v = least_root(beta1, beta2), torch.zeros(100).double(), torch.zeros(100).double()
    gradients = torch.randn(300, 100).double() * 10 ** (6 * torch.rand(300, 100).double() - 3)
    gradients[:, 0] = (beta2 / max(beta1, 1e-2)) ** -torch.arange(300.0)  # the worst, but for its direction in time
    gradients[:, 1] = gradients[:, 0].flip(0) if beta1 else 1.0
    largest = 0.0
    for g in gradients:
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        assert (v.sqrt() >= least * m.abs() * (1 - 1e-9)).all()
        largest = max(largest, (least * m.abs() / v.sqrt()).max().item())
    assert largest > 0.99  # and some come that far
    assert least_root(0.95, 0.9) == least_root(0.9, 0.0) == 0.0  # there is no such bound


def _largest_move(backend, device):
    """In units of lr, with codes of v that do not fit their m: 1 to 40 beside 1."""
    params, grads = [torch.zeros(512, device=device)], [torch.zeros(512, device=device)]
    m = torch.arange(512, device=device).remainder(41).to(torch.int8)
    v = torch.ones(512, dtype=torch.uint8, device=device)
    m[::256], v[::256] = 127, 255
    scales = [torch.full((2,), s, device=device) for s in (1.0, 1.0)]
    ops.adamw_(
        params, grads, [m], [v], exp_avg_scales=scales[:1], exp_avg_sq_scales=scales[1:], lr=1.0, beta1=0.9, beta2=0.95,
        eps=1e-30, weight_decay=0.0, step=1000, backend=backend,
    )  # fmt: skip
    return params[0].abs().max().item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_that_do_not_fit_give_no_long_step(backend, device):
    move = _largest_move(backend, device)
    assert move == pytest.approx(0.9 / 0.95**0.5 / least_root(0.9, 0.95), rel=1e-5)  # 1.08: the gradient is 0
    if backend == "triton":
        with planted_bug("adamw_", "v = tl.where(bound > v, bound, v)", "v = v + 0 * bound"):
            assert _largest_move(backend, device) > 1e6


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_of_very_large_and_small_blocks(backend, device):
    """The tests' interpreter divides exactly; a GPU's `/` gives 0 for divisors above 2^126."""
    assert "size * less[:, None] / divisor" in inspect.getsource(write_state.fn)
    for size in (2e38, 1e-36):
        momentum = torch.full((256,), size, device=device) * torch.linspace(0.1, 1, 256, device=device)
        codes, scale = torch.zeros(256, dtype=torch.int8, device=device), torch.zeros(1, device=device)
        ops.sgd_(
            [torch.zeros(256, device=device)], [momentum], [codes], momentum_buffer_scales=[scale], lr=1e-30, momentum=0.9,
            step=2, backend=backend,
        )  # fmt: skip
        want, want_scale = block_quantize(momentum, True)
        assert torch.equal(scale, want_scale) and (codes.int() - want.int()).abs().max() <= 1 and codes.min() > 50
