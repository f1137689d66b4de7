import pytest
import torch
from torch.nn import Parameter

from fastlm import optim


def make(values, cls, **options):
    params = [Parameter(v.clone()) for v in values]
    return params, cls(params, lr=0.05, **options)


def run(params, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
    ids=lambda o: " ".join(o) or "plain",
)
def test_ten_steps_equal_torch(options):
    values = [torch.randn(7, 5), torch.randn(3), torch.randn(())]
    ours, theirs = make(values, optim.SGD, **options), make(values, torch.optim.SGD, **options)
    for seed in range(10):
        run(*ours, [seed])
        run(*theirs, [seed])
        for p, q in zip(ours[0], theirs[0]):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_a_first_skipped_step_does_not_fill_the_momentum(device, monkeypatch):
    """With dampening the first step differs from the others; a GPU's host does not know which one is the first."""
    monkeypatch.setattr(optim.FusedOptimizer, "_is_known", lambda *_: False)
    values, options = [torch.randn(7, 5, device=device)], {"momentum": 0.9, "dampening": 0.5}
    params, optimizer = make(values, optim.SGD, **options)
    from fastlm.ops import use_backend

    with use_backend("triton"):
        params[0].grad = torch.full((7, 5), torch.nan, device=device)
        optimizer.step()
        run(params, optimizer, range(3))
    theirs = make(values, torch.optim.SGD, **options)
    run(*theirs, range(3))
    torch.testing.assert_close(params[0], theirs[0][0], rtol=1e-6, atol=1e-6)


def test_state_without_momentum_is_a_count():
    params, optimizer = make([torch.ones(3)], optim.SGD)
    run(params, optimizer, range(2))
    assert set(optimizer.state[params[0]]) == {"step"}
    theirs = make([torch.ones(3)], torch.optim.SGD)
    run(*theirs, range(2))
    optimizer.load_state_dict(theirs[1].state_dict())
    theirs[1].load_state_dict(optimizer.state_dict())
    run(params, optimizer, [2])
    run(*theirs, [2])
    torch.testing.assert_close(params[0], theirs[0][0])
