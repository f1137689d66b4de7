import copy

import pytest
import torch

from fastlm.errors import UserError
from fastlm.optim import AdamW, parameter_groups

OPTIONS = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8}


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def run(model, optimizer, seeds, **kwargs):
    for seed in seeds:
        set_gradients(model, seed)
        optimizer.step(**kwargs)


def assert_same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}")


def pair():
    ours, theirs = make_model(), make_model()
    return (
        ours,
        AdamW(parameter_groups(ours, 0.1), **OPTIONS),
        theirs,
        torch.optim.AdamW(parameter_groups(theirs, 0.1), **OPTIONS),
    )


def test_ten_steps_equal_torch():
    ours, our_optimizer, theirs, their_optimizer = pair()
    run(ours, our_optimizer, range(10))
    run(theirs, their_optimizer, range(10))
    assert_same(ours, theirs)


def test_the_two_load_each_others_state():
    ours, our_optimizer, theirs, their_optimizer = pair()
    run(ours, our_optimizer, range(3))
    run(theirs, their_optimizer, range(3))
    state, their_state = copy.deepcopy(our_optimizer.state_dict()), copy.deepcopy(their_optimizer.state_dict())
    assert {k for s in state["state"].values() for k in s} == {k for s in their_state["state"].values() for k in s}

    their_optimizer.load_state_dict(state)
    our_optimizer.load_state_dict(their_state)
    run(ours, our_optimizer, range(3, 6))
    run(theirs, their_optimizer, range(3, 6))
    assert_same(ours, theirs)
    assert all(float(s["step"]) == 6 for s in our_optimizer.state.values())


def test_grad_scale_is_a_scaled_gradient():
    ours, our_optimizer, theirs, their_optimizer = pair()
    # Two scales: Adam's first step alone does not depend on it.
    for seed, scale in ((1, 1.0), (2, 0.125)):
        run(ours, our_optimizer, [seed], grad_scale=torch.tensor(scale))
        set_gradients(theirs, seed)
        for p in theirs.parameters():
            p.grad *= scale
        their_optimizer.step()
    assert_same(ours, theirs)


def test_parameters_without_gradient_are_left_alone_and_count_their_own_steps():
    model = make_model()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    set_gradients(model, 0)
    model[0].weight.grad = None
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    run(model, optimizer, [1])
    assert float(optimizer.state[model[0].weight]["step"]) == 1
    assert float(optimizer.state[model[0].bias]["step"]) == 2


def test_the_closure_runs_with_gradients_on():
    model = make_model()
    optimizer = AdamW(model.parameters(), **OPTIONS)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5)).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_groups_decay_matrices_only_and_take_a_tied_weight_once():
    model = make_model()
    model.tied = torch.nn.Linear(5, 7, bias=False)
    model.tied.weight = model[0].weight
    model[2].weight.requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [p is model[0].weight for p in decayed["params"]] == [True]
    assert sorted(p.ndim for p in plain["params"]) == [1, 1, 1, 1]


def test_states_that_mean_something_else_are_refused():
    model = make_model()
    for other in (
        torch.optim.AdamW(model.parameters(), amsgrad=True),
        torch.optim.Adam(model.parameters(), weight_decay=0.1),
    ):
        run(model, other, [0])
        with pytest.raises(UserError, match="AdamW: the state dict"):
            AdamW(model.parameters()).load_state_dict(other.state_dict())


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": float("nan")}, {"betas": (0.9, 1.0)}])
def test_hyperparameters_out_of_range(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        AdamW([torch.nn.Parameter(torch.zeros(1))], **bad)
