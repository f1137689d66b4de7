"""Splitting fp32 weights into bf16 and a remainder, and stochastic rounding."""

import pytest
import torch

from fastlm.ops.master_weights import join_master, random_halves, round_stochastic, split_master
from fastlm.ops.random_bits import philox


def _every_kind():
    """Every upper half of an fp32 word, with lower halves around the tie."""
    high = torch.arange(-32768, 32768, dtype=torch.int32) << 16
    low = torch.tensor([0x0, 0x1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return (high[:, None] + low).view(-1).view(torch.float32)


def test_every_weight_comes_back():
    x = _every_kind()
    params, remainders = split_master(x)
    back, nan = join_master(params, remainders), x.isnan()
    assert torch.equal(back.view(torch.int32)[~nan], x.view(torch.int32)[~nan])
    assert params[nan].isnan().all() and back[nan].isnan().all() and not params[~nan].isnan().any()
    # To nearest: never farther than torch's own rounding, and infinite where that is.
    nearest = x.to(torch.bfloat16)
    assert torch.equal(params.isinf(), nearest.isinf())
    finite = params.isfinite() & ~nan
    assert ((params.double() - x.double()).abs() == (nearest.double() - x.double()).abs())[finite].all()


def test_zero_remainders_mean_the_weight_itself():
    p = torch.randn(100).to(torch.bfloat16)
    assert torch.equal(join_master(p, torch.zeros(100, dtype=torch.int16)), p.float())


def test_shapes_strides_and_errors():
    x = torch.randn(6, 4).t()
    params, remainders = split_master(x)
    assert params.shape == remainders.shape == (4, 6) and torch.equal(join_master(params, remainders), x)
    with pytest.raises(TypeError, match="split_master: master must be float32, got torch.bfloat16"):
        split_master(params)
    with pytest.raises(TypeError, match="join_master: params must be bfloat16 and remainders int16"):
        join_master(x, remainders)


@pytest.mark.parametrize("half, up", [(0, False), (0x7FFF, False), (0x8000, True), (0xFFFF, True)])
def test_rounding_goes_where_the_number_says(half, up):
    x = torch.tensor([1.0, -1.0, 3.0], dtype=torch.bfloat16)
    between = (x.view(torch.int16).to(torch.int32) << 16) + 0x8000  # halfway to the next one away from zero
    found = round_stochastic(between.view(torch.float32), torch.full((3,), half, dtype=torch.int32))
    away = (x.view(torch.int16) + 1).view(torch.bfloat16)
    assert torch.equal(found, away if up else x)


def test_rounding_keeps_what_needs_none():
    x = _every_kind()
    exact, top = x.to(torch.bfloat16).float() == x, torch.finfo(torch.bfloat16).max
    for half in (0, 0xFFFF):
        found = round_stochastic(x, torch.full(x.shape, half, dtype=torch.int32))
        assert torch.equal(found.isnan(), x.isnan()) and torch.equal(found[exact].float(), x[exact])
        assert torch.equal(found.isinf(), x.isinf()), "a finite weight became infinite"
        assert (found.abs() <= top)[x.isfinite()].all()


def test_numbers_are_philox_words():
    seed = torch.tensor([5 << 40 | 7, 9 << 33 | 2])
    other, found = random_halves(seed, [(5, 8, 13), (2**31 + 3, 16, 100)], 4)
    quad = torch.arange(2, 15)
    zero = torch.zeros_like(quad)
    words = torch.stack(philox(seed[0], quad, zero + 2**31 + 3, zero + 4, zero + seed[1]), 1)
    assert torch.equal(found, torch.stack([words & 0xFFFF, words >> 16], 2).view(-1)[:100].int())
    assert torch.equal(found[8:], random_halves(seed, [(2**31 + 3, 24, 92)], torch.tensor(4.0))[0])
    assert torch.equal(other, random_halves(seed, [(5, 0, 21)], 4)[0][8:])
