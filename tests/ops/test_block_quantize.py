"""The 8-bit codes of optimizer states: the error the docstring states, no bias, and what must not happen to small values."""

import pytest
import torch

from fastlm.ops.block_quantize import BLOCK, block_dequantize, block_quantize

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
