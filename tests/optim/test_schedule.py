import math

import pytest

from fastlm.optim import SCHEDULES, constant, cosine, linear


def test_cosine_values():
    assert cosine(0, 1000, warmup=9) == pytest.approx(0.1)
    assert cosine(4, 1000, warmup=9) == pytest.approx(0.5)
    assert cosine(9, 1000, warmup=9) == 1.0
    assert cosine(500, 1000, floor=0.2) == pytest.approx(0.6)
    assert cosine(250, 1000) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert cosine(1000, 1000, floor=0.1) == pytest.approx(0.1)
    assert cosine(5000, 1000, floor=0.1) == pytest.approx(0.1)


def test_linear_values():
    assert linear(550, 1000, warmup=100, floor=0.1) == pytest.approx(0.55)
    assert linear(1000, 1000, warmup=100, floor=0.1) == pytest.approx(0.1)
    assert linear(99, 1000, warmup=100) == pytest.approx(100 / 101)


def test_constant_values():
    assert [constant(step, 10, warmup=1) for step in (0, 1, 9, 100)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_without_an_end_stays_at_the_peak(name):
    assert SCHEDULES[name](12345, math.inf, warmup=10, floor=0.1) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warmup_longer_than_the_run_does_not_divide_by_zero(name):
    values = [SCHEDULES[name](step, 5, warmup=5) for step in range(6)]
    assert all(0 <= value <= 1 for value in values)
