import math

import pytest
import torch

from fastlm.optim import SCHEDULES, constant, cosine, inverse_sqrt, linear, wsd


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


def test_wsd_values():
    plan = {"steps": 1000, "warmup": 100, "decay": 0.2}
    assert wsd(49, **plan) == pytest.approx(50 / 101)
    assert [wsd(step, **plan) for step in (100, 500, 799, 800)] == [1.0] * 4
    assert wsd(850, **plan) == pytest.approx(1 - math.sqrt(0.25))
    assert wsd(850, **plan, shape="linear") == pytest.approx(0.75)
    assert wsd(850, **plan, floor=0.2) == pytest.approx(0.2 + 0.8 * 0.5)
    assert [wsd(step, **plan, floor=0.1) for step in (1000, 5000)] == [pytest.approx(0.1)] * 2
    # The stable part knows nothing of the end: a longer run has the same rates there.
    assert [wsd(step, 1000, 100) for step in range(900)] == [wsd(step, 9000, 100) for step in range(900)]
    assert wsd(5, 10, decay=0.0) == 1.0 and wsd(10, 10, decay=0.0) == 0.0
    assert wsd(5, 10, decay=1.0, shape="linear") == 0.5
    with pytest.raises(ValueError, match="decay must be a share"):
        wsd(0, 10, decay=20)
    with pytest.raises(ValueError, match="shape must be"):
        wsd(0, 10, shape="cosine")


def test_inverse_sqrt_values():
    assert inverse_sqrt(49, 0, warmup=99) == 0.5
    assert inverse_sqrt(99, 0, warmup=99) == 1.0
    assert inverse_sqrt(399, 0, warmup=99) == 0.5
    assert inverse_sqrt(999_999, math.inf, warmup=99, floor=0.02) == 0.02
    # Vaswani et al., equation 3, up to its constant; their steps count from 1.
    paper = [min(n**-0.5, n * 4000**-1.5) for n in range(1, 20_000, 333)]
    ours = [inverse_sqrt(n - 1, 0, warmup=3999) for n in range(1, 20_000, 333)]
    assert ours == pytest.approx([value / 4000**-0.5 for value in paper])


@pytest.mark.parametrize("name", SCHEDULES)
def test_with_torch_schedulers(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    plan = {"steps": 30, "warmup": 5, "floor": 0.1}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: SCHEDULES[name](step, **plan))
    seen = []
    for _ in range(35):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == [2.0 * SCHEDULES[name](step, **plan) for step in range(35)]


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "inverse_sqrt"])  # which falls without end
def test_every_schedule_without_an_end_stays_at_the_peak(name):
    assert SCHEDULES[name](12345, math.inf, warmup=10, floor=0.1) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warmup_longer_than_the_run_does_not_divide_by_zero(name):
    values = [SCHEDULES[name](step, 5, warmup=5) for step in range(6)]
    assert all(0 <= value <= 1 for value in values)
