import pytest
import torch

from fastlm.optim import clip_coefficient, global_norm


def test_norm_and_coefficient_are_those_of_torch():
    grads = [torch.randn(7, 5), None, torch.randn(3), torch.randn(())]
    p = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads if g is not None]
    for parameter, g in zip(p, (g for g in grads if g is not None)):
        parameter.grad = g.clone()
    norm = global_norm(grads)
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(p, 0.5), norm)
    for parameter, g in zip(p, (g for g in grads if g is not None)):
        torch.testing.assert_close(g * clip_coefficient(norm, 0.5), parameter.grad)


def test_small_gradients_are_left_alone():
    assert clip_coefficient(torch.tensor(0.3), 1.0).item() == 1.0
    assert clip_coefficient(torch.tensor(0.0), 1.0).item() == 1.0


def test_half_types_are_summed_in_fp32():
    grads = [torch.full((1000,), 1.01, dtype=torch.bfloat16), torch.ones(3)]
    expected = (1000 * grads[0][0].double() ** 2 + 3).sqrt()
    norm = global_norm(grads)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    assert global_norm(grads[:1]).dtype == torch.float32


def test_fp64_keeps_its_precision():
    assert global_norm([torch.tensor([1.0, 1e-9], dtype=torch.float64)]).dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_number_shows(bad):
    assert not global_norm([torch.ones(3), torch.tensor([1.0, bad])]).isfinite()


def test_no_gradient_at_all():
    assert global_norm([None]).item() == 0.0
