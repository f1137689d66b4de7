"""Codes and scales: bit for bit round trips, the error of a code, ranges, odd shapes, what is refused."""

import pytest
import torch

from fastlm.ops.quantize import dequantize_weight, pack_int4, quantize_weight, unpack_int4

FORMATS = [(8, None), (8, 32), (8, 128), (4, 32), (4, 64), (4, 128)]
LOW = {(8, True): -127, (8, False): -128, (4, True): 1, (4, False): 0}
HIGH = {8: 127, 4: 15}


def codes_of(q):
    """[N, K] codes as integers, written from the contract alone."""
    if q.bits == 8:
        return q.codes.long()
    half, found = q.group_size // 2, torch.full((len(q.codes), q.codes.shape[1] * 2), -1)
    for byte in range(q.codes.shape[1]):
        first = byte // half * q.group_size + byte % half
        found[:, first] = q.codes[:, byte].long() % 16
        found[:, first + half] = q.codes[:, byte].long() // 16
    return found


def weight_of(q):
    """[N, K] in fp64, element by element."""
    codes = codes_of(q)[:, : q.columns].double()
    group = torch.arange(q.columns) // (q.group_size or max(q.columns, 1))
    scale = q.scale.double().reshape(len(codes), -1)[:, group]
    middle = 8 if q.bits == 4 else 0
    zero = middle if q.zero is None else q.zero.double().reshape(len(codes), -1)[:, group]
    return scale * (codes - zero)


@pytest.mark.parametrize("group", [2, 32, 64, 128])
def test_packing_is_its_own_inverse_and_has_the_documented_layout(group):
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (5, 3 * group), dtype=torch.uint8)
    packed = pack_int4(codes, group)
    assert packed.dtype == torch.uint8 and packed.shape == (5, 3 * group // 2)
    assert torch.equal(unpack_int4(packed, group), codes)
    assert torch.equal(pack_int4(unpack_int4(packed, group), group), packed)
    for byte in range(packed.shape[1]):
        first = byte // (group // 2) * group + byte % (group // 2)
        assert torch.equal(packed[:, byte], codes[:, first] + 16 * codes[:, first + group // 2])


def test_every_byte_has_its_pair_of_codes():
    every = torch.arange(256, dtype=torch.uint8).view(8, 32)
    assert torch.equal(pack_int4(unpack_int4(every, 64), 64), every)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits, group", FORMATS)
def test_every_weight_is_within_half_a_scale(bits, group, symmetric):
    torch.manual_seed(1)
    for K in (1, 31, 33, 64, 130):
        weight = torch.randn(6, K, dtype=torch.float64)
        weight[1] *= 1e30
        weight[2] = weight[2].abs()  # all to one side of 0
        weight[3] = 0
        weight[4] *= 1e-42  # below what fp32 can divide by
        q = quantize_weight(weight, bits, group, symmetric)
        codes = codes_of(q)
        assert codes.min() >= LOW[bits, symmetric] and codes.max() <= HIGH[bits]
        assert q.columns == K and q.codes.shape[1] == (K if bits == 8 else -(-K // group) * group // 2)
        got = dequantize_weight(q.codes, q.scale, q.zero, bits=bits, group_size=group, columns=K, dtype=torch.float64)
        assert torch.equal(got, weight_of(q))
        step = q.scale.double().reshape(6, -1).repeat_interleave(group or K, 1)[:, :K]
        room = 0.5 if symmetric else 1.0
        assert ((got - weight).abs() <= room * (1 + 1e-5) * step).all()
        assert (got[3] == 0).all()
        if symmetric:
            largest = weight.abs().reshape(6, -1).amax(1)
            assert (got.abs().amax(1)[:3] >= largest[:3] * (1 - 1e-6)).all()  # the largest weight has the last code


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits, group", FORMATS)
def test_quantising_again_changes_nothing(bits, group, dtype):
    torch.manual_seed(2)
    q = quantize_weight(torch.randn(9, 70).to(dtype), bits, group)
    weight = dequantize_weight(q.codes, q.scale, bits=bits, group_size=group, columns=70)
    again = quantize_weight(weight, bits, group)
    assert torch.equal(again.codes, q.codes)
    torch.testing.assert_close(again.scale, q.scale, rtol=2e-7, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits, group", FORMATS)
def test_a_zero_is_exact(bits, group, symmetric):
    weight = torch.randn(7, 96).relu() + 0.5 * (torch.arange(7) == 3)[:, None]
    weight[:, ::3] = 0
    q = quantize_weight(weight, bits, group, symmetric)
    got = dequantize_weight(q.codes, q.scale, q.zero, bits=bits, group_size=group)
    assert (got[:, ::3] == 0).all()


def test_a_bf16_scale_is_the_one_that_the_codes_were_made_for():
    torch.manual_seed(3)
    weight = torch.randn(16, 128)
    for symmetric in (True, False):
        q = quantize_weight(weight, 4, 32, symmetric, torch.bfloat16)
        assert q.scale.dtype == torch.bfloat16
        got = dequantize_weight(q.codes, q.scale, q.zero, bits=4, group_size=32)
        step = q.scale.float().repeat_interleave(32, 1)
        # A scale that was rounded down leaves the largest weight beyond the last code, by 2^-9 of it.
        assert ((got - weight).abs() <= 0.5 * step + 2**-8 * 16 * step).all()
        rounded = (weight / step).round()
        if symmetric:
            assert torch.equal(codes_of(q), rounded.clamp(-7, 7).long() + 8)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits, group", FORMATS)
def test_the_largest_numbers_stay_finite(bits, group, symmetric, scale_dtype):
    most = torch.finfo(torch.float32).max
    weight = torch.stack((torch.full((64,), most), torch.full((64,), -most), torch.linspace(-1, 1, 64) * most))
    q = quantize_weight(weight, bits, group, symmetric, scale_dtype)
    got = dequantize_weight(q.codes, q.scale, q.zero, bits=bits, group_size=group, columns=64)
    assert got.isfinite().all()
    step = q.scale.double().reshape(3, -1).amax(1, keepdim=True)
    # A bf16 scale that was rounded down leaves the largest weights beyond the last code, by 2^-7 of them at most.
    room = 2**-7 * most if scale_dtype == torch.bfloat16 else 0
    assert ((got.double() - weight.double()).abs() <= 0.5 * (1 + 1e-4) * step * (1 if symmetric else 2) + room).all()


def test_strides_and_empty_matrices():
    weight = torch.randn(40, 12)
    q, want = quantize_weight(weight.t(), 4, 32), quantize_weight(weight.t().contiguous(), 4, 32)
    assert torch.equal(q.codes, want.codes) and q.codes.is_contiguous()
    for shape in ((0, 8), (3, 0)):
        q = quantize_weight(torch.randn(shape), 8)
        assert dequantize_weight(q.codes, q.scale, bits=8).shape == shape
    q = quantize_weight(torch.randn(0, 40), 4, 32)
    assert dequantize_weight(q.codes, q.scale, bits=4, group_size=32, columns=40).shape == (0, 40)


def test_errors():
    weight = torch.randn(4, 40)
    for bad in (torch.inf, torch.nan):
        wrong = weight.clone()
        wrong[2, 3] = bad
        with pytest.raises(ValueError, match="quantize_weight: weight holds inf or NaN"):
            quantize_weight(wrong)
    with pytest.raises(ValueError, match="weight holds inf"):
        quantize_weight(weight.double() * 1e300)
    with pytest.raises(ValueError, match=r"weight must be \[N, K\], got \[4\]"):
        quantize_weight(weight[:, 0])
    with pytest.raises(TypeError, match="weight must be floating point, got torch.int8"):
        quantize_weight(weight.to(torch.int8))
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 3"):
        quantize_weight(weight, 3)
    with pytest.raises(ValueError, match="group_size must be 32, 64 or 128 for 4 bits, got None"):
        quantize_weight(weight, 4)
    with pytest.raises(ValueError, match="group_size must be 32, 64 or 128, or None for whole rows, got 48"):
        quantize_weight(weight, 8, 48)
    with pytest.raises(ValueError, match="scale_dtype must be torch.float32 or torch.bfloat16"):
        quantize_weight(weight, scale_dtype=torch.float16)
    with pytest.raises(ValueError, match="pack_int4: K = 40 must be a multiple of group_size 32"):
        pack_int4(torch.zeros(2, 40, dtype=torch.uint8), 32)
    for function in (pack_int4, unpack_int4):
        name = function.__name__
        with pytest.raises(TypeError, match=f"{name}: codes must be torch.uint8, got torch.int64"):
            function(torch.zeros(2, 32, dtype=torch.int64), 32)
        with pytest.raises(ValueError, match=rf"{name}: codes must be a matrix, got \[32\]"):
            function(torch.zeros(32, dtype=torch.uint8), 32)
        for size in (0, 3, None):
            with pytest.raises(ValueError, match=f"{name}: group_size must be an even number above 0, got {size}"):
                function(torch.zeros(2, 96, dtype=torch.uint8), size)
    with pytest.raises(ValueError, match="unpack_int4: 20 bytes a row are not whole groups of 32"):
        unpack_int4(torch.zeros(2, 20, dtype=torch.uint8), 32)
