import torch
from torch.nn import Parameter

from fastlm.optim import Lion


def test_ten_steps_follow_the_paper():
    """Chen et al. 2023, program 1, in fp64 and by hand."""
    lr, (beta1, beta2), decay = 0.02, (0.9, 0.99), 0.1
    values = [torch.randn(7, 5), torch.randn(3), torch.randn(())]
    params = [Parameter(v.clone()) for v in values]
    optimizer = Lion(params, lr=lr, betas=(beta1, beta2), weight_decay=decay)
    weights, momenta = [v.double() for v in values], [torch.zeros_like(v).double() for v in values]
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator)
            g = p.grad.double()
            update = torch.sign(g * (1 - beta1) + momenta[i] * beta1) + weights[i] * decay
            momenta[i] = g * (1 - beta2) + momenta[i] * beta2
            weights[i] = weights[i] - lr * update
        optimizer.step()
        for p, w in zip(params, weights):
            torch.testing.assert_close(p.double(), w, rtol=1e-6, atol=1e-6)
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg"}


def test_a_gradient_of_zero_moves_by_the_decay_alone():
    p = Parameter(torch.full((4,), 2.0))
    p.grad = torch.zeros(4)
    Lion([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p, torch.full((4,), 1.9), check_stride=False)
